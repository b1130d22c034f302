"""debug_unwrap: what is inside of the tensors that functions under a transform are given."""

from __future__ import annotations

import torch

from torchlift import _C
from torchlift._errors import TransformError
from torchlift._names import describe


def debug_unwrap(tensor: torch.Tensor, *, recurse: bool = True) -> torch.Tensor:
    """The plain tensor behind one that belongs to a transform, batch dims and all; for debugging.

    Computing with it in the function is undefined: it is for looking at. As torch.func.debug_unwrap.

    Args:
        tensor: any tensor; one that belongs to no transform is returned as it is.
        recurse: through all transforms; else one.

    >>> import torch, torchlift
    >>> def f(x):
    ...     print(x.shape, torchlift.debug_unwrap(x).shape)
    ...     return x
    >>> y = torchlift.vmap(f)(torch.zeros(5, 3))
    torch.Size([3]) torch.Size([5, 3])
    """
    if not isinstance(tensor, torch.Tensor):
        raise TransformError(f"[debug_unwrap] takes a tensor, got {describe(tensor)}.")
    while _C.is_lifted(tensor):
        lowered = _C.lower_lifted(tensor)
        assert lowered is not None
        tensor = lowered[0]
        if not recurse:
            break
    return tensor
