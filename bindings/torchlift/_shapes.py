"""Arguments of which only the shape is known: tensors on the meta device, and ShapeDtype.

NOTE [tracing by shapes]
Nothing of a graph depends on the numbers in the arguments, so they need not be known. The tensors that
the function sees then say that they are of the given device, and have no memory: see the note of that
name in compile/trace_scope.h.
"""

from __future__ import annotations

import contextlib
import operator
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from torchlift._errors import TransformError
from torchlift._names import describe


@dataclass(frozen=True)
class ShapeDtype:
    """Stands for a tensor among the arguments of `trace`, `make_fx` and `save`, without its numbers.

    A graph does not depend on them. So a model that is too large for this machine's memory can be
    traced, and a slow function is traced at once. (`torch.empty(8, 3, device="meta")` stands for a
    tensor on the CPU in the same way.)

    Args:
        shape: the sizes of the tensor, which is contiguous.
        dtype: its dtype.
        device: the device that it is to be on when the graph runs.

    Raises:
        TransformError (a ValueError): for a size below 0, or what is no size, dtype or device.

    >>> import torch, torchlift
    >>> x = torchlift.ShapeDtype((8, 3), torch.float32)
    >>> print(torchlift.trace(torch.sin)(x))
    def graph(arg0: f32[8, 3]):
        sin = aten.sin(arg0)  # f32[8, 3]
        return sin
    <BLANKLINE>
    """

    shape: "tuple[int, ...]"
    dtype: torch.dtype
    device: "torch.device"

    def __init__(
        self,
        shape: "Sequence[int]",
        dtype: torch.dtype = torch.float32,
        device: "str | torch.device" = "cpu",
    ) -> None:
        try:
            sizes = tuple(operator.index(size) for size in shape)
        except TypeError:
            sizes = (-1,)
        if any(size < 0 for size in sizes):
            raise TransformError(
                f"[ShapeDtype] shape must be sizes, such as (8, 3), got {describe(shape)}."
            )
        if not isinstance(dtype, torch.dtype):
            raise TransformError(
                f"[ShapeDtype] dtype must be one of torch, such as torch.float32, got {describe(dtype)}."
            )
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError):
            place = torch.device("meta")
        if place.type == "meta":
            raise TransformError(
                f"[ShapeDtype] device must be one that the graph is to run on, such as 'cpu', got "
                f"{device!r}."
            )
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "device", place)

    @staticmethod
    def of(tensor: torch.Tensor) -> "ShapeDtype":
        """That of a tensor. For the parameters of a model: `tree_map(ShapeDtype.of, params)`."""
        return ShapeDtype(tensor.shape, tensor.dtype, tensor.device)


def tensors_for(leaves: "list[Any]", by_shapes: bool = False) -> "tuple[list[Any], list[str] | None]":
    """(leaves with tensors in the place of each ShapeDtype, the device of each tensor).

    No devices where all tensors have numbers, unless by_shapes; else the tensors are on the meta
    device, and their numbers do not count.
    """
    if not (by_shapes or any(_is_shape(leaf) for leaf in leaves)):
        return leaves, None
    given = [_on_meta(leaf) for leaf in leaves]
    devices = [_device_of(leaf) for leaf in leaves if isinstance(leaf, (torch.Tensor, ShapeDtype))]
    return given, devices


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, ShapeDtype) or (isinstance(leaf, torch.Tensor) and leaf.is_meta)


def _on_meta(leaf: Any) -> Any:
    if isinstance(leaf, ShapeDtype):
        return torch.empty(leaf.shape, dtype=leaf.dtype, device="meta")
    return leaf.detach() if isinstance(leaf, torch.Tensor) else leaf


def _device_of(leaf: Any) -> str:
    device = leaf.device
    return "cpu" if device.type == "meta" else str(device)


# --- meta kernels in Python -----------------------------------------------------------------------

_hint = threading.local()


@contextlib.contextmanager
def device_hints(devices: "list[str] | None") -> "Iterator[None]":
    """Meta kernels that torch has in Python take the tensors of this thread as being on these devices.

    They ask torch._meta_registrations.device_hint(tensor), which says "cuda" of a meta tensor, and give
    strides, and a few shapes, as that device does.
    """
    if not devices or not _tell_hints():
        yield
        return
    before = getattr(_hint, "type", None)
    _hint.type = torch.device(devices[0]).type
    try:
        yield
    finally:
        _hint.type = before


def _tell_hints() -> bool:
    """Puts our answer in front of torch's; False where this torch has no such function."""
    import torch._meta_registrations as registrations

    original = getattr(registrations, "device_hint", None)
    if original is None:
        return False
    if getattr(original, "_torchlift", False):
        return True

    def device_hint(tensor: Any) -> str:
        hint = getattr(_hint, "type", None)
        is_meta = type(tensor) is torch.Tensor and tensor.is_meta
        return hint if hint is not None and is_meta else original(tensor)

    device_hint._torchlift = True  # type: ignore[attr-defined]
    registrations.device_hint = device_hint
    return True
