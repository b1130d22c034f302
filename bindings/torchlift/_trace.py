"""Tracing: what a function does, transforms and all, as a graph of plain operators.

NOTE [what a trace holds]
The function runs once, on its real arguments. Every operator whose result depends on a tensor among
them is written down; whatever else happens in it happens once, at that time: numbers and Python
control flow are those of this run, and tensors that it captures are constants of the graph.
"""

from __future__ import annotations

import linecache
import os
from types import TracebackType
from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError, UnsupportedError
from torchlift._names import describe, function_name, parameters_of, wraps

_PACKAGES = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)


class Traced:
    """A function that was traced: a program without Python, for arguments of the same structure.

    Calling it runs the graph. `str()` shows it as code.

    Attributes:
        graph: the graph.
    """

    def __init__(self, graph: "_C.Graph", in_spec: Any, leaves: "list[Any]", out: Any) -> None:
        self.graph = graph
        self._program = _C.Program(graph)
        self._in_spec = in_spec
        # Of each leaf of the arguments: None for a tensor, else the constant it must be.
        self._constants = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        self._out_leaves, self._out_spec = out

    def __call__(self, *args: Any, seed: "int | None" = None, **kwargs: Any) -> Any:
        """Runs the graph.

        Args:
            args, kwargs: of the structure the function was traced with; tensors of the same shapes
                and dtypes, and equal numbers.
            seed: of the random operators; without one they draw from the default generator.

        Raises:
            TransformError (a ValueError): for arguments that are not as they were.
        """
        leaves, spec = _pytree.flatten((args, kwargs))
        if spec != self._in_spec:
            raise TransformError(
                f"[trace] the arguments have another structure than those the function was traced "
                f"with: {spec} in place of {self._in_spec}."
            )
        tensors = []
        for leaf, constant in zip(leaves, self._constants):
            if constant is None and isinstance(leaf, torch.Tensor):
                tensors.append(leaf)
            elif constant is None or not _same_constant(leaf, constant[0]):
                raise TransformError(
                    f"[trace] got {describe(leaf)} where the function was traced with "
                    f"{'a tensor' if constant is None else repr(constant[0])}. Trace it anew."
                )
        return self.rebuild(self._program.run(tensors, seed))

    def rebuild(self, outputs: "list[torch.Tensor]") -> Any:
        """The function's result, with these tensors in it."""
        rest = iter(outputs)
        leaves = [next(rest) if leaf is None else leaf[0] for leaf in self._out_leaves]
        return self._out_spec.unflatten(leaves)

    def optimized(self) -> "_C.Program":
        """The program after the passes that make it shorter, which give the same numbers."""
        graph = self.graph.copy()
        graph.optimize()
        return _C.Program(graph)

    def graph_module(self) -> "torch.fx.GraphModule":
        """The graph as a torch.fx.GraphModule of the tensors among the arguments; it returns a list
        of tensors. (`make_fx` gives one that is called as the function is.)"""
        from torchlift._fx import graph_module

        graph = self.graph.copy()
        graph.optimize()
        return graph_module(graph, [value.name for value in graph.inputs()])

    def example_inputs(self) -> "list[torch.Tensor]":
        """Tensors like those it was traced with, of zeros."""
        return [
            torch.empty_strided(sizes, strides, dtype=dtype, device=device).zero_()
            for sizes, strides, dtype, device in self.graph.input_types()
        ]

    def __str__(self) -> str:
        return str(self.graph)

    def __repr__(self) -> str:
        return f"<torchlift.Traced of {len(self.graph.nodes())} operators>"


def trace(func: Callable[..., Any]) -> Callable[..., Traced]:
    """Writes down what `func` does to its arguments, as a graph of plain operators.

    Args:
        func: a function of pytrees, with any transforms inside, or outside: `trace(vmap(grad(f)))`.

    Returns:
        A function of the same arguments, which gives a `Traced`: a program that does the same
        without calling `func`.

    Raises:
        UnsupportedError (a RuntimeError): for what a graph cannot say: numbers computed from the
            arguments (`.item()`, `if x > 0`), shapes that depend on them (`nonzero`). It names the
            line.

    >>> import torch, torchlift
    >>> f = torchlift.trace(torchlift.grad(lambda x: torch.sin(x).sum()))(torch.zeros(3))
    >>> [name for name, *_ in f.graph.nodes()]
    ['aten::sin', 'aten::sum', 'aten::cos', 'aten::mul']
    >>> f(torch.zeros(3))
    tensor([1., 1., 1.])
    """

    @wraps(func)
    def traced(*args: Any, **kwargs: Any) -> Traced:
        return trace_call("trace", func, args, kwargs)

    return traced


def trace_call(
    transform: str, func: Callable[..., Any], args: "tuple[Any, ...]", kwargs: "dict[str, Any]"
) -> Traced:
    """One trace of func(*args, **kwargs)."""
    paths, leaves, in_spec = _pytree.flatten_with_path((args, kwargs))
    names = [_leaf_name(func, path) for path in paths]
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    # What the function writes into its arguments is written into copies.
    tensors = [leaf.detach().clone() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    out: "list[Any]" = []

    def run(values: "list[torch.Tensor]") -> "tuple[list[Any], int]":
        rest = iter(values)
        given = [next(rest) if tensor else leaf for tensor, leaf in zip(is_tensor, leaves)]
        inner_args, inner_kwargs = in_spec.unflatten(given)
        found, spec = _pytree.flatten(func(*inner_args, **inner_kwargs))
        out[:] = [[None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in found], spec]
        return found, len(found)

    tensor_names = [name for name, tensor in zip(names, is_tensor) if tensor]
    graph, _ = with_line(lambda: _C.trace_leaves(run, tensors, tensor_names, transform))
    return Traced(graph, in_spec, leaves, out)


def _leaf_name(func: Callable[..., Any], path: "tuple[Any, ...]") -> str:
    """`x`, `params_w`: what a leaf of (args, kwargs) is called in the graph."""
    positional = parameters_of(func)[0]
    kind, *rest = path
    if kind == 0 and rest and rest[0] < len(positional):
        rest[0] = positional[rest[0]]
    elif kind == 0 and rest:
        rest[0] = f"arg{rest[0]}"
    name = "_".join(str(entry) for entry in rest)
    name = "".join(c if c.isalnum() and c.isascii() else "_" for c in name)
    return name if name and not name[0].isdigit() else f"x{name}"


def _same_constant(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a is b or bool(a == b))


def with_line(run: Callable[[], Any]) -> Any:
    """run(); an UnsupportedError names the line of the user's code that met it."""
    try:
        return run()
    except UnsupportedError as error:
        line = _users_line(error.__traceback__)
        if line is None or "\n  at " in str(error):
            raise
        raise UnsupportedError(f"{error}\n  at {line}").with_traceback(error.__traceback__) from None


def _users_line(traceback: "TracebackType | None") -> "str | None":
    """The innermost line that is neither ours nor torch's."""
    found = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith(_PACKAGES):
            found = (code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
    if found is None:
        return None
    source = linecache.getline(found[0], found[1]).strip()
    return f"{found[0]}:{found[1]}, in {found[2]}" + (f": {source}" if source else "")


__all__ = ["Traced", "trace", "function_name"]
