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


TransformError.__module__ = UnsupportedError.__module__ = "torchlift"
_C.set_error_types(TransformError, UnsupportedError)
