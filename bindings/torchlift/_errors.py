"""The exceptions of torchlift."""

from __future__ import annotations

from torchlift import _C


class TransformError(ValueError):
    """Bad use of a transform: wrong in_dims, inconsistent sizes, cotangents of another structure...

    >>> import torch, torchlift
    >>> try:
    ...     torchlift.vmap(torch.sin, in_dims=2)(torch.ones(3, 5))
    ... except torchlift.TransformError as error:
    ...     print("got [3, 5]" in str(error) or "has shape [3, 5]" in str(error))
    True
    """


class UnsupportedError(RuntimeError):
    """A sensible request that cannot be met: data-dependent control flow under vmap, an operator
    without a batching rule in strict mode...

    >>> import torch, torchlift
    >>> try:
    ...     torchlift.vmap(lambda x: x.sum().item())(torch.ones(3, 5))
    ... except torchlift.UnsupportedError:
    ...     print("no .item() under vmap")
    no .item() under vmap
    """


class AssumptionError(RuntimeError):
    """What the run of a graph raises where the shape of a result that depends on numbers (of
    nonzero, x[mask], unique...) would be another one than that the function was traced with.

    Attributes:
        number: which of the numbers that the graph assumes, in the order of the trace.
        found: what they are in this run.

    >>> import torch, torchlift
    >>> positive = torchlift.trace(lambda x: x[x > 0])(torch.tensor([1.0, 2.0, -1.0]))
    >>> positive(torch.tensor([-1.0, 3.0, 4.0]))
    tensor([3., 4.])
    >>> try:
    ...     positive(torch.tensor([1.0, -3.0, -4.0]))
    ... except torchlift.AssumptionError as error:
    ...     print("was 2 when the function was traced, and is 1 in this run" in str(error))
    True
    """

    def __init__(self, message: str, number: int = 0, found: "list[int] | None" = None) -> None:
        super().__init__(message)
        self.number = number
        self.found = found or []


TransformError.__module__ = UnsupportedError.__module__ = "torchlift"
AssumptionError.__module__ = "torchlift"
_C.set_error_types(TransformError, UnsupportedError, AssumptionError)
