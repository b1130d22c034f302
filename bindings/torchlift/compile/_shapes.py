"""What tensors the nodes of an fx graph give: node.meta["val"], as torch's own tools write it."""

from __future__ import annotations

from typing import Any, Sequence

import torch


class _Propagate(torch.fx.Interpreter):
    def run_node(self, n: "torch.fx.Node") -> Any:
        value = super().run_node(n)
        n.meta["val"] = value
        return value


class _Measure(torch.fx.Interpreter):
    """On real tensors: meta["val"] are tensors of the same kind without numbers."""

    def run_node(self, n: "torch.fx.Node") -> Any:
        value = super().run_node(n)
        n.meta["val"] = torch.utils._pytree.tree_map_only(torch.Tensor, _without_numbers, value)
        return value


def _without_numbers(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def is_known(module: "torch.fx.GraphModule") -> bool:
    return all("val" in node.meta for node in module.graph.nodes if node.op != "output")


def propagate(module: "torch.fx.GraphModule", inputs: "Sequence[Any]") -> None:
    """Fills in meta["val"] of all nodes, for inputs like these (flat, in the placeholders' order)."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    if is_known(module):
        return
    inputs = list(inputs)
    given = next((t.fake_mode for t in inputs if isinstance(t, FakeTensor)), None)
    mode = given or FakeTensorMode(allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(t) if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor) else t
        for t in inputs
    ]
    interpreter = _Propagate(module)
    try:
        with torch.no_grad(), mode:
            interpreter.run(*fakes, enable_io_processing=False)
    except Exception:  # An operator that fake tensors do not know.
        if given is not None:
            raise
        with torch.no_grad(), torch.random.fork_rng():
            _Measure(module).run(*inputs, enable_io_processing=False)


def value_of(node: "torch.fx.Node") -> Any:
    """The tensor, or else, that a node is known to give; None if nothing is known."""
    if "val" in node.meta:
        return node.meta["val"]
    return node.meta.get("tensor_meta")


def bytes_of(value: Any) -> int:
    """The memory that keeping this value keeps."""
    if isinstance(value, torch.Tensor):
        try:
            return int(value.untyped_storage().nbytes())
        except (NotImplementedError, RuntimeError):
            return int(value.numel()) * value.element_size()
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is None or dtype is None:
        return 0
    return int(torch.Size(shape).numel()) * dtype.itemsize


def example_of(value: Any, device: "torch.device | None" = None) -> Any:
    """A real tensor of zeros like a known one."""
    if not isinstance(value, torch.Tensor):
        return value
    where = value.device if value.device.type != "meta" else device
    return torch.empty_strided(
        tuple(int(n) for n in value.shape),
        tuple(int(n) for n in value.stride()),
        dtype=value.dtype,
        device=where,
    ).zero_()
