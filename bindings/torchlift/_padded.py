"""nonzero, masked_select and unique with a result of a fixed size, for use under vmap."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torchlift import _C
from torchlift._errors import TransformError
from torchlift._names import describe

Number = "int | float | bool | complex"


class Nonzero(NamedTuple):
    """`indices` of shape [size, x.dim()], and `count`, of how many elements there are."""

    indices: Tensor
    count: Tensor


class Selection(NamedTuple):
    """`values` of shape [size], and `count`, of how many elements there are."""

    values: Tensor
    count: Tensor


class Unique(NamedTuple):
    """`values` of shape [size], ascending, and `count`, of how many there are. `counts` of shape [size]:
    how often each occurs; `inverse` of x's shape: `values[inverse]` is x."""

    values: Tensor
    count: Tensor
    counts: Tensor
    inverse: Tensor


def nonzero(x: Tensor, size: int, fill_value: int = -1) -> Nonzero:
    """The indices of the first `size` elements of x that are not zero, then rows of fill_value.

    torch.nonzero, but of a fixed shape, so that it works under vmap. `count` may be larger than size.

    >>> import torch, torchlift
    >>> torchlift.nonzero(torch.tensor([0, 3, 0, 5]), size=3)
    Nonzero(indices=tensor([[ 1],
            [ 3],
            [-1]]), count=tensor(2))
    """
    _check_tensor("nonzero", "x", x)
    return Nonzero(*_C.nonzero(x, size, fill_value))


def masked_select(x: Tensor, mask: Tensor, size: int, fill_value: Number = 0) -> Selection:
    """The first `size` elements of x where mask is true, then fill_value; differentiable in x.

    torch.masked_select, or x[mask], but of a fixed shape, so that it works under vmap. `count` may be
    larger than size.

    >>> import torch, torchlift
    >>> x = torch.tensor([[1.0, -2.0, 3.0], [-4.0, -5.0, 6.0]])
    >>> torchlift.vmap(lambda row: torchlift.masked_select(row, row > 0, size=2))(x)
    Selection(values=tensor([[1., 3.],
            [6., 0.]]), count=tensor([2, 1]))
    """
    _check_tensor("masked_select", "x", x)
    _check_tensor("masked_select", "mask", mask)
    return Selection(*_C.masked_select(x, mask, size, fill_value))


def unique(x: Tensor, size: int, fill_value: "Number | None" = None) -> Unique:
    """The `size` smallest of the different values in x, then fill_value (the smallest, by default).

    torch.unique, but of a fixed shape, so that it works under vmap. Differentiable: the gradient of a
    value goes to one of the elements that have it. `count` may be larger than size; `inverse` then
    also refers to values that were left out.

    >>> import torch, torchlift
    >>> torchlift.unique(torch.tensor([3, 1, 3, 2]), size=4, fill_value=0).values
    tensor([1, 2, 3, 0])
    """
    _check_tensor("unique", "x", x)
    return Unique(*_C.unique(x, size, fill_value))


def _check_tensor(function: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TransformError(f"[{function}] {name} must be a tensor, got {describe(value)}.")
