"""How lifted tensors print."""

from __future__ import annotations

import functools
from typing import Any

import torch

from torchlift import _C


def install() -> None:
    """Makes torch's printing show what a lifted tensor holds. Other tensors print as ever."""
    torch_str = torch._tensor_str._str
    if getattr(torch_str, "__torchlift__", False):
        return

    @functools.wraps(torch_str)
    def _str(self: torch.Tensor, *, tensor_contents: Any = None) -> str:
        if tensor_contents is None and _C.is_lifted(self):
            return _lifted_str(self)
        if tensor_contents is None and _C.is_hollow(self):  # traced by shapes
            return f"tensor(..., size={tuple(self.shape)}, dtype={self.dtype})"
        return torch_str(self, tensor_contents=tensor_contents)

    _str.__torchlift__ = True  # type: ignore[attr-defined]
    torch._tensor_str._str = _str  # type: ignore[assignment]
    torch_format = torch.Tensor.__format__

    @functools.wraps(torch_format)
    def _format(self: torch.Tensor, format_spec: str) -> str:
        # f"{x}" of a 0-d tensor is its number; of one with a number for each example, what it holds.
        if not format_spec and self.dim() == 0 and _differs(self):
            return str(self)
        return torch_format(self, format_spec)

    torch.Tensor.__format__ = _format  # type: ignore[method-assign]


def _differs(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a batch dim at any level."""
    while _C.is_lifted(tensor):
        tensor, bdim, _, _ = _C.lower_lifted(tensor)
        if bdim is not None:
            return True
    return False


def _lifted_str(tensor: torch.Tensor) -> str:
    depth, size, alive = _C.level_of(tensor)
    value, bdim, _, _ = _C.lower_lifted(tensor)
    parts = [
        f"vmap level {depth}" + ("" if alive else " (ended)"),
        f"size {size}",
        "no batch dim" if bdim is None else f"batch dim {bdim}",
        f"value={value!r}",
    ]
    if tensor.grad_fn is not None:
        parts.append(f"grad_fn=<{tensor.grad_fn.name()}>")
    elif tensor.requires_grad:
        parts.append("requires_grad=True")
    return f"LiftedTensor({', '.join(parts)})"


def dump_tensor(x: torch.Tensor) -> str:
    """What a tensor is made of, as text: one line for each level it belongs to, from the deepest to the
    plain value, with dims, dispatch keys and autograd state.

    >>> import torch, torchlift
    >>> print(torchlift.dump_tensor(torch.ones(2)).split(";")[0])
    plain tensor: shape [2], strides [1], Float cpu
    >>> def f(x):
    ...     print(torchlift.dump_tensor(x).split(";")[0])
    ...     return x
    >>> _ = torchlift.vmap(f)(torch.ones(3, 2))
    vmap level 1 (size 3): shape [2], batch dim 0, Float cpu
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"dump_tensor: expected a tensor, got {type(x).__name__}")
    return _C.dump_tensor(x)
