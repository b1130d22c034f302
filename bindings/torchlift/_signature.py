"""What a traced function depends on besides the numbers in its tensors: the keys of caches of graphs."""

from __future__ import annotations

from typing import Any

import torch

from torchlift._errors import TransformError


def leaf_key(transform: str, leaf: Any) -> Any:
    """Of a leaf of the arguments."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.shape, leaf.stride(), leaf.device)
    try:
        hash(leaf)
    except TypeError:
        raise TransformError(
            f"[{transform}] an argument holds a {type(leaf).__name__}, which cannot be hashed, so that "
            f"it cannot be known whether it is the same in the next call. Pass tensors, numbers or "
            f"strings, or let the function capture it."
        ) from None
    return (type(leaf), exact(leaf))


def exact(leaf: Any) -> Any:
    """What equals that of another leaf of this type only where the graph is the same: -0.0 equals 0.0,
    and nan not even itself."""
    return repr(leaf) if type(leaf) in (float, complex) else leaf


def same_leaf(a: Any, b: Any) -> bool:
    """Whether a graph that was traced with the one, which is no tensor, is that of the other."""
    return type(a) is type(b) and (a is b or bool(exact(a) == exact(b)))


def mode_key() -> "tuple[Any, ...]":
    """(whether autograd records, autocast of each kind of device)."""
    return (torch.is_grad_enabled(), _autocast("cpu"), _autocast("cuda"))


def _autocast(device: str) -> Any:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def module_key(func: Any) -> "tuple[bool, ...]":
    """Of a module: which of its parts are in training mode."""
    if not isinstance(func, torch.nn.Module):
        return ()
    return tuple(module.training for module in func.modules())


def module_state(func: Any) -> "dict[str, torch.Tensor] | None":
    """Of a module: its parameters and buffers, the parameters first."""
    if not isinstance(func, torch.nn.Module):
        return None
    return {**dict(func.named_parameters()), **dict(func.named_buffers())}
