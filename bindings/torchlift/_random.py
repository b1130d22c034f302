"""Loops that draw the numbers of vmap(..., randomness="reproducible")."""

from __future__ import annotations

from typing import Any, ContextManager

from torchlift import _C
from torchlift._errors import TransformError


class random_rows:
    """The rows of a batch for a loop, with the random numbers that vmap gives them.

    `rows = random_rows()` takes the place of a call of vmap with randomness="reproducible": it takes from
    the default generator what that call would take. Inside of `with rows(i):` random operators draw the
    numbers of row i.

    Rows may come in any order, on any thread, and more than once. A vmap, or further random_rows, inside
    of a row are the inner ones of a nested pair.

    >>> import torch, torchlift
    >>> xs = torch.ones(3, 4)
    >>> _ = torch.manual_seed(0)
    >>> mapped = torchlift.vmap(torch.nn.functional.dropout, randomness="reproducible")(xs)
    >>> _ = torch.manual_seed(0)
    >>> rows = torchlift.random_rows()
    >>> for i in range(3):
    ...     with rows(i):
    ...         assert torch.equal(torch.nn.functional.dropout(xs[i]), mapped[i])
    """

    def __init__(self) -> None:
        self._rows = _C.RandomRows()

    def __call__(self, row: int) -> "ContextManager[Any]":
        if not isinstance(row, int) or row < 0:
            raise TransformError(f"random_rows: a row is an int of at least 0, got {row!r}.")
        return _C.RandomRow(self._rows, row)
