"""Compilers of fx graphs: functions of (GraphModule, example inputs)."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Sequence

import torch

from torchlift._errors import UnsupportedError
from torchlift.compile._aot import aot_function, aot_module
from torchlift.compile._boxed import make_boxed_compiler
from torchlift.compile._draw import draw_graph
from torchlift.compile._partition import min_cut_rematerialization_partition

GraphModule = torch.fx.GraphModule


@make_boxed_compiler
def nop(fx_g: GraphModule, _: Any) -> GraphModule:
    """Runs the graph as it is, operator by operator.

    >>> import torch
    >>> from torchlift.compile import aot_function, nop
    >>> aot_function(torch.exp, nop)(torch.zeros(2))
    tensor([1., 1.])
    """
    return fx_g


@make_boxed_compiler
def print_compile(fx_g: GraphModule, _: Any) -> GraphModule:
    """Prints the graph's code, and runs it as it is.

    >>> import torch
    >>> from torchlift.compile import aot_function, print_compile
    >>> y = aot_function(torch.exp, print_compile)(torch.zeros(2))  # doctest: +ELLIPSIS
    <BLANKLINE>
    ...
    def forward(self, primals_1):
        exp_default = torch.ops.aten.exp.default(primals_1);  primals_1 = None
        return [exp_default]
    ...
    """
    print(fx_g.code)
    return fx_g


# --- TorchScript -----------------------------------------------------------------------------------


def _scriptable(fx_g: GraphModule) -> GraphModule:
    """A copy that TorchScript can read: operators without overloads, devices by name."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(fx_g.graph, {}))
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
        if node.target is torch.ops.aten._to_copy and list(node.kwargs) == ["dtype"]:
            node.target = torch.ops.aten.to
        node.kwargs = {
            name: str(value) if isinstance(value, torch.device) else value
            for name, value in node.kwargs.items()
        }
    graph.lint()
    return GraphModule(fx_g, graph)


def _refuse_assumptions(fx_g: GraphModule) -> None:
    """TorchScript takes checks for dead code. Those of what a trace assumes are known by their words, which
    decompositions and other traces of the graph keep."""
    for node in fx_g.graph.nodes:
        checks = node.target is torch.ops.aten._assert_async.msg
        if checks and "the function was traced" in str(node.args[1]):
            message = node.args[1].removeprefix("[trace] ").partition(" was ")[0]
            raise UnsupportedError(
                f"[ts_compile] the graph is right for some numbers alone ({message}), and "
                f"TorchScript drops the check of them. Use another compiler: the backends 'eager' and "
                f"'inductor' keep it."
            )


def _script(fx_g: GraphModule, finish: "Callable[[Any], Any]" = lambda script: script) -> Any:
    _refuse_assumptions(fx_g)
    before = torch._C._jit_set_autocast_mode(False)
    try:
        with warnings.catch_warnings():  # torch says that TorchScript is deprecated.
            warnings.simplefilter("ignore")
            return finish(torch.jit.freeze(torch.jit.script(_scriptable(fx_g)).eval()))
    finally:
        torch._C._jit_set_autocast_mode(before)


@make_boxed_compiler
def simple_ts_compile(fx_g: GraphModule, _: Any) -> Any:
    """Compiles the graph with TorchScript.

    >>> import torch
    >>> from torchlift.compile import aot_function, simple_ts_compile
    >>> aot_function(torch.exp, simple_ts_compile)(torch.zeros(2))
    tensor([1., 1.])
    """
    return _script(fx_g)


@make_boxed_compiler
def ts_compile(fx_g: GraphModule, inps: "Sequence[Any]") -> Any:
    """Compiles the graph with TorchScript, with its optimizations for inference.

    >>> import torch
    >>> from torchlift.compile import aot_function, ts_compile
    >>> aot_function(torch.exp, ts_compile)(torch.zeros(2))
    tensor([1., 1.])
    """
    return _script(fx_g, torch.jit.optimize_for_inference)


def nnc_jit(f: Callable[..., Any]) -> Callable[..., Any]:
    """`aot_function` with TorchScript, whose fuser for CPUs was called NNC.

    Whether anything is fused is TorchScript's choice; `jit(f, backend="inductor")` is today's way to
    fused kernels.

    >>> import torch
    >>> from torchlift.compile import nnc_jit
    >>> nnc_jit(torch.exp)(torch.zeros(2))
    tensor([1., 1.])
    """
    return aot_function(f, simple_ts_compile)


# --- looking at graphs -----------------------------------------------------------------------------


def draw_graph_compile(name: str) -> Callable[..., Any]:
    """A compiler that prints the graph, draws it into the file `name`, and runs it as it is.

    >>> import os, tempfile, torch
    >>> from torchlift.compile import aot_function, draw_graph_compile
    >>> path = os.path.join(tempfile.mkdtemp(), "exp.svg")
    >>> y = aot_function(torch.exp, draw_graph_compile(path))(torch.zeros(2))  # doctest: +ELLIPSIS
    <BLANKLINE>
    ...
    >>> os.path.exists(path)
    True
    """

    def compiler(fx_g: GraphModule, _: Any) -> GraphModule:
        print(fx_g.code)
        draw_graph(fx_g, name)
        return fx_g

    return make_boxed_compiler(compiler)


def debug_compile(fx_g: GraphModule, inps: "Sequence[torch.Tensor]") -> Any:
    """Writes the graph into the folder "foo", prints how to minimize it, and compiles it with
    TorchScript.

    >>> import contextlib, os, tempfile, torch
    >>> from torchlift.compile import aot_function, debug_compile
    >>> with contextlib.chdir(tempfile.mkdtemp()):
    ...     y = aot_function(torch.exp, debug_compile)(torch.zeros(2))  # doctest: +ELLIPSIS
    ...     os.path.exists("foo/module.py")
    # The graph is in the folder foo. To minimize it:
    ...
    True
    """
    fx_g.to_folder("foo")
    kinds = [(tuple(t.shape), t.dtype, str(t.device)) for t in inps]
    print(
        f"# The graph is in the folder foo. To minimize it:\n"
        f"import torch\n"
        f"from torchlift.compile import minifier\n"
        f"from foo import FxModule\n"
        f"kinds = {kinds}\n"
        f"inputs = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]\n"
        f"minifier(torch.fx.symbolic_trace(FxModule()), inputs, fails)  # fails(module, inputs)\n"
    )
    return ts_compile(fx_g, inps)


# --- decompositions --------------------------------------------------------------------------------

_DECOMPOSED = (
    "detach gelu_backward leaky_relu_backward sigmoid_backward threshold_backward hardtanh_backward "
    "hardsigmoid_backward hardswish_backward tanh_backward silu_backward elu_backward "
    "cudnn_batch_norm cudnn_batch_norm_backward masked_fill.Scalar masked_fill.Tensor elu leaky_relu "
    "hardtanh hardswish hardsigmoid conj_physical is_same_size"
)


def _default_decompositions() -> "dict[Any, Callable[..., Any]]":
    from torch._decomp import get_decompositions

    operators = []
    for name in _DECOMPOSED.split():
        packet, _, overload = name.partition(".")
        operator = getattr(torch.ops.aten, packet)
        operators.append(getattr(operator, overload) if overload else operator)
    return dict(get_decompositions(operators))


def memory_efficient_fusion(fn: Any, **kwargs: Any) -> Any:
    """`aot_function` or `aot_module` that saves little for the backward pass and computes the rest
    again: min_cut_rematerialization_partition, default_decompositions and TorchScript.

    Args:
        fn: a function, or a module.
        kwargs: other options of `aot_function`.

    >>> import torch
    >>> from torchlift.compile import memory_efficient_fusion
    >>> x = torch.zeros(2, requires_grad=True)
    >>> memory_efficient_fusion(lambda x: x.sin().exp())(x).sum().backward()
    >>> x.grad
    tensor([1., 1.])
    """
    options = {
        "fw_compiler": ts_compile,
        "bw_compiler": ts_compile,
        "partition_fn": min_cut_rematerialization_partition,
        "decompositions": _default_decompositions(),
        **kwargs,
    }
    return (aot_module if isinstance(fn, torch.nn.Module) else aot_function)(fn, **options)
