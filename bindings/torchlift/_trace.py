"""Tracing: what a function does, transforms and all, as a graph of plain operators.

NOTE [what a trace holds]
The function runs once, on its real arguments. Every operator whose result depends on a tensor among
them is written down; whatever else happens in it happens once, at that time: numbers and Python
control flow are those of this run, and tensors that it captures are constants of the graph. Captured
tensors that it writes into are written by each run of the graph: NOTE [state] in
compile/captured_state.h.
"""

from __future__ import annotations

import linecache
from types import TracebackType
from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError, UnsupportedError
from torchlift._names import NOT_USERS, describe, function_name, parameters_of, wraps
from torchlift._shapes import device_hints, tensors_for
from torchlift._signature import same_leaf


class Traced:
    """A function that was traced: a program without Python, for arguments of the same structure.

    Calling it runs the graph. `str()` shows it as code, and `code(sources=True)` where in the function
    it comes from.

    Attributes:
        graph: the graph.
        program: what runs it on the tensors among the arguments.

    >>> import torch, torchlift
    >>> traced = torchlift.trace(torch.sin)(torch.zeros(3))
    >>> print(traced)
    def graph(arg0: f32[3]):
        sin = aten.sin(arg0)  # f32[3]
        return sin
    <BLANKLINE>
    >>> traced(torch.zeros(3))
    tensor([0., 0., 0.])
    """

    def __init__(self, graph: "_C.Graph", in_spec: Any, leaves: "list[Any]", out: Any) -> None:
        self.graph = graph
        self.program = _C.Program(graph)
        self._in_spec = in_spec
        # Of each leaf of the arguments: None for a tensor, else the constant it must be.
        self._constants = [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves]
        self._out_leaves, self._out_spec = out
        self._gives_one = self._out_leaves == [None] and self._out_spec.is_leaf()

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
            elif constant is None or not same_leaf(leaf, constant[0]):
                raise TransformError(
                    f"[trace] got {describe(leaf)} where the function was traced with "
                    f"{'a tensor' if constant is None else repr(constant[0])}. Trace it anew."
                )
        return self.rebuild(self.program.run(tensors, seed))

    def rebuild(self, outputs: "list[torch.Tensor]") -> Any:
        """The function's result, with these tensors in it."""
        if self._gives_one:
            return outputs[0]
        rest = iter(outputs)
        leaves = [next(rest) if leaf is None else leaf[0] for leaf in self._out_leaves]
        return self._out_spec.unflatten(leaves)

    def optimized(self) -> "_C.Executable":
        """The program after the passes that make it shorter, which give the same numbers."""
        return _C.Executable(self.graph)

    def graph_module(self) -> "torch.fx.GraphModule":
        """The graph as a torch.fx.GraphModule of the tensors among the arguments; it returns a list
        of tensors. (`make_fx` gives one that is called as the function is.)"""
        from torchlift._fx import graph_module

        return graph_module(self.graph, [value.name for value in self.graph.inputs()])

    def example_inputs(self) -> "list[torch.Tensor]":
        """Tensors like those it was traced with, of zeros."""
        return [
            torch.empty_strided(sizes, strides, dtype=dtype, device=device).zero_()
            for sizes, strides, dtype, device in self.graph.input_types()
        ]

    def code(self, sources: bool = False) -> str:
        """The graph as code; with comments that name the lines of the function it comes from.

        >>> import torch, torchlift
        >>> def f(x):
        ...     return torch.sin(x)
        >>> text = torchlift.trace(f)(torch.zeros(3)).code(sources=True)
        >>> text.splitlines()[1].endswith(":2, in f")
        True
        """
        return self.graph.code(sources)

    def __str__(self) -> str:
        return self.code()

    def __repr__(self) -> str:
        return f"<torchlift.Traced of {len(self.graph.nodes())} operators>"


def trace(
    func: Callable[..., Any], *, dynamic: "dict[Any, Any] | None" = None
) -> Callable[..., Traced]:
    """Writes down what `func` does to its arguments, as a graph of plain operators.

    Args:
        func: a function of pytrees, with any transforms inside, or outside: `trace(vmap(grad(f)))`.
        dynamic: dims that may have any size when the graph runs: for an argument (its name or
            position, or a path to a part of it such as ("params", "w")) the dims, each with a name
            that equal sizes share: `{"x": {0: "batch"}, "y": {0: "batch"}}`. The function is then
            traced at several sizes.

    Returns:
        A function of the same arguments, which gives a `Traced`: a program that does the same
        without calling `func`. Among the arguments may be a `ShapeDtype` or tensors on the meta device:
        then all are taken as no more than shapes, nothing is computed, and no memory is used.

    Captured tensors that `func` writes into (running statistics, a counter) are written by each call of
    the program, and read as they are then; tracing leaves them as they are. `func` runs twice if there
    are any.

    Raises:
        UnsupportedError (a RuntimeError): for what a graph cannot say: numbers computed from the
            arguments (`.item()`, `if x > 0`). It names the line. Where the function does something
            else at other sizes of a dynamic dim. And by shapes, for an operator that libtorch has
            no meta kernel for, or whose shape depends on numbers.

    A graph is for as many elements of x[mask], nonzero, unique... as there were: where a run has
    others, it raises `AssumptionError`.

    >>> import torch, torchlift
    >>> f = torchlift.trace(torchlift.grad(lambda x: torch.sin(x).sum()))(torch.zeros(3))
    >>> [name for name, *_ in f.graph.nodes()]
    ['aten::sin', 'aten::sum', 'aten::cos', 'aten::mul']
    >>> f(torch.zeros(3))
    tensor([1., 1., 1.])
    >>> calls = torch.zeros(())
    >>> f = torchlift.trace(lambda x: x + calls.add_(1))(torch.zeros(2))
    >>> f(torch.zeros(2)), f(torch.zeros(2))
    (tensor([1., 1.]), tensor([2., 2.]))
    """

    @wraps(func)
    def traced(*args: Any, **kwargs: Any) -> Traced:
        return trace_call("trace", func, args, kwargs, dynamic)

    return traced


def trace_call(
    transform: str,
    func: Callable[..., Any],
    args: "tuple[Any, ...]",
    kwargs: "dict[str, Any]",
    dynamic: "dict[Any, Any] | None" = None,
) -> Traced:
    """One trace of func(*args, **kwargs)."""
    paths, leaves, in_spec = _pytree.flatten_with_path((args, kwargs))
    # jit runs the graph on these arguments, so meta tensors are what they are.
    leaves, devices = (leaves, None) if transform == "jit" else tensors_for(leaves)
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    names = [_leaf_name(func, path) for path, tensor in zip(paths, is_tensor) if tensor]
    tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
    out: "list[Any]" = []

    def run(values: "list[torch.Tensor]") -> "tuple[list[Any], int]":
        rest = iter(values)
        given = [next(rest) if tensor else leaf for tensor, leaf in zip(is_tensor, leaves)]
        inner_args, inner_kwargs = in_spec.unflatten(given)
        found, spec = _pytree.flatten(func(*inner_args, **inner_kwargs))
        shape = [[None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in found], spec]
        if out and not _same_result(out, shape):
            raise UnsupportedError(
                f"[{transform}] the function returns another structure, or other numbers, at other "
                f"sizes of its dynamic dims. Return tensors."
            )
        out[:] = shape
        return found, len(found)

    def graph_of(inputs: "list[torch.Tensor]") -> "_C.Graph":
        if devices is not None:
            return trace_leaves(run, inputs, names, transform, devices)
        return trace_leaves(run, inputs, names, transform)

    dims = dynamic_dims(transform, func, paths, leaves, dynamic)
    graph = with_line(
        lambda: _C.trace_dynamic(graph_of, tensors, dims) if dims else graph_of(tensors)
    )
    return Traced(graph, in_spec, leaves, out)


def _same_result(a: "list[Any]", b: "list[Any]") -> bool:
    if a[1] != b[1]:
        return False
    return all(
        x is y if x is None or y is None else same_leaf(x[0], y[0]) for x, y in zip(a[0], b[0])
    )


def dynamic_dims(
    transform: str,
    func: Callable[..., Any],
    paths: "list[tuple[Any, ...]]",
    leaves: "list[Any]",
    dynamic: "dict[Any, Any] | None",
) -> "list[tuple[str, list[tuple[int, int]]]]":
    """[(name, [(number of the tensor, dim)])] of the dims that `dynamic` names."""
    places: "dict[str, list[tuple[int, int]]]" = {}
    for key, dims in (dynamic or {}).items():
        if isinstance(dims, int):
            dims = {dims: f"{key if isinstance(key, str) else 'n'}_{dims}"}
        if not isinstance(dims, dict):
            raise TransformError(
                f"[{transform}] dynamic[{key!r}] must be a dim or a dict of dims and names, got "
                f"{describe(dims)}."
            )
        found = False
        tensor = -1
        for path, leaf in zip(paths, leaves):
            if not isinstance(leaf, torch.Tensor):
                continue
            tensor += 1
            if not _names_part(func, key, path):
                continue
            found = True
            for dim, name in dims.items():
                if not -leaf.dim() <= dim < leaf.dim():
                    raise TransformError(
                        f"[{transform}] dynamic[{key!r}] names dim {dim} of {describe(leaf)}."
                    )
                places.setdefault(str(name), []).append((tensor, dim % leaf.dim()))
        if not found:
            raise TransformError(
                f"[{transform}] dynamic names {key!r}, and no argument with a tensor is called so."
            )
    return list(places.items())


def _names_part(func: Callable[..., Any], key: Any, path: "tuple[Any, ...]") -> bool:
    """Whether key (a name, a position or a path) names the leaf at `path` of (args, kwargs)."""
    wanted = key if isinstance(key, tuple) else (key,)
    kind, *rest = path
    if len(rest) < len(wanted) or tuple(rest[1 : len(wanted)]) != wanted[1:]:
        return False
    positional = parameters_of(func)[0]
    own = [rest[0]]
    if kind == 0 and rest[0] < len(positional):
        own.append(positional[rest[0]])
    return wanted[0] in own


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


def trace_leaves(
    run: "Callable[[list[torch.Tensor]], tuple[list[Any], int]]",
    tensors: "list[torch.Tensor]",
    names: "list[str]",
    transform: str,
    devices: "list[str] | None" = None,
) -> "_C.Graph":
    """The graph of run, which takes the list of tensors and returns (leaves, how many).

    What it writes into its arguments is written into copies. With devices, it is traced by shapes, of
    tensors on these. Where it writes into tensors that it captures, it runs twice.
    """
    with device_hints(devices):
        return with_line(
            lambda: _C.trace_leaves(run, tensors, names, transform, NOT_USERS, devices)[0]
        )


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
        if not code.co_filename.startswith(tuple(NOT_USERS)):
            found = (code.co_filename, traceback.tb_lineno, code.co_name)
        traceback = traceback.tb_next
    if found is None:
        return None
    source = linecache.getline(found[0], found[1]).strip()
    return f"{found[0]}:{found[1]}, in {found[2]}" + (f": {source}" if source else "")


__all__ = ["Traced", "trace", "function_name"]
