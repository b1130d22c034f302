"""What runs the graphs of jit, by name.

A backend is a function of (a torch.fx.GraphModule of plain operators, example inputs) that returns a
function of the inputs, which gives a list of tensors (or what make_boxed_func makes of it). "eager" needs no fx: jit runs it by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Callable, Sequence

import torch

from torchlift._errors import TransformError, UnsupportedError
from torchlift._native import compiler_errors

Backend = Callable[..., Callable[..., Any]]


def _inductor(module: "torch.fx.GraphModule", inputs: "Sequence[torch.Tensor]") -> Any:
    from torch._inductor.compile_fx import compile_fx

    with compiler_errors("jit", "The backends 'eager' and 'ts' do not."):
        with _sizes_of_loops() if _control_flow_in(module) else contextlib.nullcontext():
            return compile_fx(module, list(inputs))


def _ts(module: "torch.fx.GraphModule", inputs: "Sequence[torch.Tensor]") -> Any:
    from torchlift.compile import ts_compile

    if kinds := _control_flow_in(module):
        raise UnsupportedError(
            f"[jit] the backend 'ts' has no form of {kinds[0]}, which the function calls on values that "
            f"depend on its arguments. The backends 'eager' and 'inductor' have one."
        )
    return ts_compile(module, inputs)


def _control_flow_in(module: "torch.fx.GraphModule") -> "list[str]":
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    return [str(each) for each in targets if isinstance(each, torch._ops.HigherOrderOperator)]


@contextlib.contextmanager
def _sizes_of_loops() -> "Iterator[None]":
    """Inductor asks for the sizes of what a loop carries before it has made a context to ask."""
    from torch._guards import TracingContext, tracing
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    with tracing(TracingContext(FakeTensorMode(shape_env=ShapeEnv()))):
        yield


_BACKENDS: "dict[str, Backend | None]" = {"eager": None, "inductor": _inductor, "ts": _ts}


def list_backends() -> "list[str]":
    """The names that `torchlift.jit(f, backend=name)` knows.

    >>> import torchlift
    >>> torchlift.compile.list_backends()
    ['eager', 'inductor', 'ts']
    """
    return sorted(_BACKENDS)


def register_backend(name: str, fn: Backend) -> None:
    """Makes a backend known by a name.

    Args:
        name: not one of ours ('eager', 'inductor', 'ts'); another of yours is replaced.
        fn: of (a torch.fx.GraphModule, example inputs), gives a function of the inputs that gives a
            list of tensors.

    >>> import torch, torchlift
    >>> torchlift.compile.register_backend("plain", lambda module, inputs: module)
    >>> torchlift.jit(torch.exp, backend="plain")(torch.zeros(2))
    tensor([1., 1.])
    >>> torchlift.compile.unregister_backend("plain")
    """
    if not isinstance(name, str) or not callable(fn):
        raise TransformError(
            f"[register_backend] takes a name and a function, got {name!r} and {fn!r}."
        )
    if name in _OURS:
        raise TransformError(f"[register_backend] {name!r} is taken. Choose another name.")
    _BACKENDS[name] = fn


def unregister_backend(name: str) -> None:
    """Forgets a backend that `register_backend` made known.

    >>> import torchlift
    >>> torchlift.compile.register_backend("mine", lambda module, inputs: module)
    >>> torchlift.compile.unregister_backend("mine")
    >>> "mine" in torchlift.compile.list_backends()
    False
    """
    if name in _OURS or name not in _BACKENDS:
        raise TransformError(f"[unregister_backend] there is no backend of yours called {name!r}.")
    del _BACKENDS[name]


_OURS = frozenset(_BACKENDS)


def find_backend(backend: "str | Backend") -> "Backend | None":
    """The function; None for "eager"."""
    if callable(backend):
        return backend
    if backend not in _BACKENDS:
        raise TransformError(
            f"[jit] there is no backend {backend!r}. Use one of {list_backends()}, or a function."
        )
    return _BACKENDS[backend]
