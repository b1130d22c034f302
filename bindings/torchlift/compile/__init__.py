"""torchlift.compile: the names of functorch.compile, on graphs of torchlift's own tracer.

    aot_function      compiles the forward and the backward pass of a function, each as one graph;
                      aot_module a module's; memory_efficient_fusion both, with little memory
    default_partition cuts the joint graph in two, min_cut_rematerialization_partition so that few
                      bytes are saved; partition_report tells how many
    nop               and print_compile, ts_compile, draw_graph_compile, ...: compilers of graphs
    list_backends     of torchlift.jit; register_backend adds one
    export            to torch.export; from_exported, from_torchscript: the other way
    minifier          a smaller graph that fails in the same way; draw_graph

See docs/compile.md.

>>> import torch
>>> from torchlift.compile import aot_function, nop
>>> x = torch.zeros(3, requires_grad=True)
>>> aot_function(torch.sin, nop)(x).sum().backward()
>>> x.grad
tensor([1., 1., 1.])
"""

from typing import Any as _Any

from torchlift._backends import list_backends, register_backend, unregister_backend
from torchlift._decomposition import pythonkey_decompose
from torchlift.compile import config
from torchlift.compile._aot import (
    aot_function,
    aot_module,
    aot_module_simplified,
    compiled_function,
    compiled_module,
)
from torchlift.compile._boxed import make_boxed_compiler, make_boxed_func
from torchlift.compile._compilers import (
    debug_compile,
    draw_graph_compile,
    memory_efficient_fusion,
    nnc_jit,
    nop,
    print_compile,
    simple_ts_compile,
    ts_compile,
)
from torchlift.compile._context import (
    get_aot_compilation_context,
    get_aot_graph_name,
    get_graph_being_compiled,
)
from torchlift.compile._draw import draw_graph
from torchlift.compile._export import export, from_exported, from_torchscript
from torchlift.compile._minifier import minifier
from torchlift.compile._partition import (
    PartitionReport,
    default_partition,
    min_cut_rematerialization_partition,
    partition_report,
)

__all__ = [
    "PartitionReport",
    "aot_function",
    "aot_module",
    "aot_module_simplified",
    "compiled_function",
    "compiled_module",
    "config",
    "debug_compile",
    "default_decompositions",
    "default_partition",
    "draw_graph",
    "draw_graph_compile",
    "export",
    "from_exported",
    "from_torchscript",
    "get_aot_compilation_context",
    "get_aot_graph_name",
    "get_graph_being_compiled",
    "list_backends",
    "make_boxed_compiler",
    "make_boxed_func",
    "memory_efficient_fusion",
    "min_cut_rematerialization_partition",
    "minifier",
    "nnc_jit",
    "nop",
    "partition_report",
    "print_compile",
    "pythonkey_decompose",
    "register_backend",
    "simple_ts_compile",
    "ts_compile",
    "unregister_backend",
]


def __getattr__(name: str) -> _Any:
    # Torch's decompositions take a moment to import.
    if name == "default_decompositions":
        from torchlift.compile._compilers import _default_decompositions

        globals()[name] = _default_decompositions()
        return globals()[name]
    raise AttributeError(f"module 'torchlift.compile' has no attribute {name!r}")
