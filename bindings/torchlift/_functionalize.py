"""functionalize: a function without writes."""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError
from torchlift._graph_outputs import Frame
from torchlift._names import wraps
from torchlift._trace import trace_leaves

_REMOVE = ("mutations", "mutations_and_views")


def functionalize(func: Callable[..., Any], *, remove: str = "mutations") -> Callable[..., Any]:
    """The same function without in-place operators, as torch.func.functionalize.

    What `func` writes, through views too, becomes new values; what it writes into its arguments is
    copied into them at the end. Each call traces the function, so this is of use inside of make_fx,
    trace or jit, for compilers that know no writes.

    Args:
        func: a function of pytrees. Tensors that belong to a transform around it must be arguments,
            not captured.
        remove: "mutations", or "mutations_and_views": view operators become the ones that copy
            (`view_copy`), too.

    Raises:
        UnsupportedError: for what a graph cannot say (see `torchlift.trace`), and writes without a
            functional form (`resize_`).

    >>> import torch
    >>> from torchlift import functionalize, make_fx
    >>> def f(x):
    ...     y = x.clone()
    ...     y[0].mul_(2)
    ...     return y
    >>> module = make_fx(functionalize(f))(torch.ones(2, 2))
    >>> [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    ['aten.clone.default', 'aten.select.int', 'aten.mul.Tensor', 'aten.select_scatter.default']
    """
    if remove not in _REMOVE:
        raise TransformError(f"[functionalize] remove must be one of {_REMOVE}, got {remove!r}.")

    @wraps(func)
    def functional(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = _pytree.flatten((args, kwargs))
        is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        out: "list[Any]" = []

        def run(values: "list[torch.Tensor]") -> "tuple[list[Any], int]":
            rest = iter(values)
            given = [next(rest) if tensor else leaf for tensor, leaf in zip(is_tensor, leaves)]
            inner_args, inner_kwargs = spec.unflatten(given)
            found, out_spec = _pytree.flatten(func(*inner_args, **inner_kwargs))
            out[:] = [found, out_spec]
            return found, len(found)

        names = [f"x{i}" for i in range(len(tensors))]
        examples = [_example(tensor) for tensor in tensors]
        devices = None
        if any(_C.is_hollow(example) for example in examples):  # a function around is traced by shapes
            devices = [str(example.device) for example in examples]
        with torch.random.fork_rng():
            graph = trace_leaves(run, examples, names, "functionalize", devices)
        made = iter(_run(graph, tensors, names, remove == "mutations_and_views"))
        found, out_spec = out
        return out_spec.unflatten(
            [next(made) if isinstance(leaf, torch.Tensor) else leaf for leaf in found]
        )

    return functional


def _run(
    graph: "_C.Graph", tensors: "list[torch.Tensor]", names: "list[str]", copy_views: bool
) -> "list[Any]":
    frame = Frame("functionalize", graph, once=True)
    tensors = frame.inputs(tensors)
    frame.check_aliases(tensors)
    if copy_views:
        frame.compute_views()
    module = frame.module(names)
    if copy_views:
        _copy_views(module)
    return frame.finish(tensors, list(module(*tensors)))


def _example(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of no level with the numbers of (one example of) a tensor that may belong to some."""
    dims: "list[int]" = []
    while _C.is_lifted(tensor):
        lowered = _C.lower_lifted(tensor)
        assert lowered is not None
        tensor, dim = lowered[:2]
        if dim is not None:
            dims.append(dim)
    tensor = tensor.detach()
    for dim in reversed(dims):
        tensor = tensor.select(dim, 0) if tensor.size(dim) else tensor.sum(dim)
    return tensor


def _copy_views(module: "torch.fx.GraphModule") -> None:
    for node in module.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is None or not any(r.alias_info for r in schema.returns):
            continue
        name = schema.name.removeprefix("aten::") + "_copy"
        overload = schema.overload_name or "default"
        copying = getattr(getattr(torch.ops.aten, name, None), overload, None)
        if copying is not None:
            node.target = copying
    module.recompile()
