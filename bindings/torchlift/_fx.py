"""Graphs as torch.fx.GraphModules, and make_fx."""

from __future__ import annotations

import linecache
import operator
from typing import Any, Callable

import torch

from torchlift import _C, _decomposition
from torchlift._errors import UnsupportedError
from torchlift._names import parameters_of, wraps
from torchlift._shapes import tensors_for
from torchlift._trace import trace_leaves


def overload_of(name: str, overload: str) -> Any:
    """torch.ops.aten.mul.Tensor of ("aten::mul", "Tensor")."""
    namespace, _, op = name.partition("::")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload or "default")


def _stack_trace(source: str) -> "str | None":
    """"model.py:12, in loss", as fx shows it in print_readable()."""
    place, found, function = source.partition(", in ")
    if not found:
        return None
    file, _, line = place.rpartition(":")
    code = linecache.getline(file, int(line)).strip()
    return f'  File "{file}", line {line}, in {function}\n    {code}'


class _Exporter:
    """Builds the fx graph of one graph.

    to_compile: for a compiler of all of it: sizes that depend on dynamic dims are computed by nodes, and
        constants that are wrapped numbers (x + 2.0), which have no say in dtypes, are numbers, where
        torch's make_fx has tensors.
    """

    def __init__(self, graph: "_C.Graph", names: "list[str]", to_compile: bool = False) -> None:
        self.root = torch.nn.Module()
        self.fx_graph = torch.fx.Graph()
        self.env: "dict[str, Any]" = {}
        self.to_compile = to_compile
        self.numbers = set(graph.number_constants()) if to_compile else set()
        self.symbols = graph.symbols()
        self.sizes: "dict[Any, Any]" = {}  # nodes of sizes, by what they are
        self.stack_trace: "str | None" = None  # of what is exported now
        for value, name in zip(graph.inputs(), names):
            self.env[value.name] = self.fx_graph.placeholder(name)
        constants = dict(graph.constants())
        self.placeholders = list(self.fx_graph.nodes)
        for node, source in zip(graph.nodes(to_compile), graph.sources()):
            self._constants_of(node, constants)
            self.stack_trace = _stack_trace(source)
            self._node(*node)
        self._read(graph.outputs(), constants)
        self.outputs = [self._argument(value) for value in graph.outputs()]
        self._copy_constants(graph)

    def _copy_constants(self, graph: "_C.Graph") -> None:
        """What a caller writes into an output must not be in the constants of the next call."""
        copies: "dict[Any, torch.fx.Node]" = {}
        for i in graph.constant_outputs():
            given = self.outputs[i]
            if not isinstance(given, torch.fx.Node):
                continue
            if given not in copies:
                copies[given] = self.fx_graph.call_function(torch.ops.aten.clone.default, (given,))
            self.outputs[i] = copies[given]

    def _constants_of(self, node: "tuple[Any, ...]", constants: "dict[str, torch.Tensor]") -> None:
        for argument in node[2]:
            self._read(argument if isinstance(argument, list) else [argument], constants)

    def _read(self, values: "list[Any]", constants: "dict[str, torch.Tensor]") -> None:
        """Constants are read where they are needed first, as make_fx of torch does."""
        for value in values:
            if not isinstance(value, _C.GraphValue) or value.name in self.env:
                continue
            tensor = constants[value.name]
            if value.name in self.numbers:
                self.env[value.name] = tensor.item()
                continue
            self.env[value.name] = self._held(tensor)

    def _held(self, tensor: torch.Tensor) -> "torch.fx.Node":
        """An attribute of the module."""
        kind = "_param_constant" if isinstance(tensor, torch.nn.Parameter) else "_tensor_constant"
        count = sum(name.startswith(kind) for name in vars(self.root) | self.root._parameters)
        setattr(self.root, f"{kind}{count}", tensor)
        return self.fx_graph.get_attr(f"{kind}{count}")

    def _argument(self, argument: Any) -> Any:
        if isinstance(argument, _C.GraphValue):
            return self.env[argument.name]
        if isinstance(argument, list):
            return [self._argument(each) for each in argument]
        if isinstance(argument, _C.GraphSize):
            return self._size(argument)
        if isinstance(argument, _C.GraphRatio):
            return self._ratio(argument)
        return argument

    def _made(self, key: "tuple[Any, ...]", target: Callable[..., Any], *args: Any) -> Any:
        """A node for a size, which all that need it share."""
        if key not in self.sizes:
            self.sizes[key] = self.fx_graph.call_function(target, args)
        return self.sizes[key]

    def _symbol(self, index: int) -> Any:
        place, dim, _ = self.symbols[index]
        target = torch.ops.aten.sym_size.int
        return self._made(("dim", index), target, self.placeholders[place], dim)

    def _size(self, size: "_C.GraphSize") -> Any:
        """A sum of products of dims, over a number."""
        total: Any = None
        key: "tuple[Any, ...]" = ()
        for powers, coefficient in size.terms:
            factors = [self._symbol(i) for i, power in enumerate(powers) for _ in range(power)]
            product: Any = coefficient if coefficient != 1 or not factors else factors.pop(0)
            for i, factor in enumerate(factors):
                place = ("product", tuple(powers), coefficient, i)
                product = self._made(place, operator.mul, product, factor)
            key += ((tuple(powers), coefficient),)
            first = total is None
            total = product if first else self._made(("sum", key), operator.add, total, product)
        if size.denominator == 1:
            return total
        place = ("quotient", key, size.denominator)
        return self._made(place, operator.floordiv, total, size.denominator)

    def _ratio(self, ratio: "_C.GraphRatio") -> Any:
        def number(size: Any) -> Any:
            made = self._argument(size)
            if not isinstance(made, torch.fx.Node):
                return float(made)
            return self._made(("float", made), torch.sym_float, made)

        make = self.fx_graph.call_function
        above, below = number(ratio.numerator), number(ratio.denominator)
        if ratio.factor != 1:
            above = make(operator.mul, (ratio.factor, above))
        return above if below == 1.0 else make(operator.truediv, (above, below))

    def _node(
        self, name: str, overload: str, args: "list[Any]", results: "list[Any]", subgraphs: "list[Any]"
    ) -> None:
        if subgraphs:
            self._control_flow(name, args, results[0], subgraphs)
            return
        if name == "torchlift::assume":
            self._assumption(*args)
            return
        target = overload_of(name, overload)
        given, keywords = self._call_arguments(target, [self._argument(each) for each in args])
        node = self.fx_graph.call_function(target, tuple(given), keywords)
        node.stack_trace = self.stack_trace
        if len(results) == 1 and not isinstance(results[0], list):
            self._define(results[0], node)
            return
        if len(results) == 1:
            self._define_items(results[0], node)
            return
        for i, result in enumerate(results):
            if result is None or result == []:
                continue
            item = self.fx_graph.call_function(operator.getitem, (node, i))
            if isinstance(result, list):
                self._define_items(result, item)
            else:
                self._define(result, item)

    def _assumption(
        self, numbers: Any, expected: "list[int]", message: str, _number: int
    ) -> None:
        """By torch's own operators, whose error cannot say what the numbers are."""
        aten, call = torch.ops.aten, self.fx_graph.call_function
        given = self._argument(numbers)
        if len(expected) == 1:
            same = call(aten.eq.Scalar, (given, expected[0]))
        else:
            wanted = self._held(torch.tensor(expected))
            same = call(aten.all.default, (call(aten.eq.Tensor, (given, wanted)),))
        was = str(expected[0] if len(expected) == 1 else expected)
        text = message.replace("{was}", was).replace("{is}", "another one")
        node = call(aten._assert_async.msg, (same, text))
        node.stack_trace = self.stack_trace

    def _control_flow(
        self, name: str, args: "list[Any]", results: "list[Any]", subgraphs: "list[_C.Graph]"
    ) -> None:
        """As torch's operator of the same name, which takes tuples and modules that give tuples."""
        import torch._higher_order_ops  # noqa: F401  defines them

        kind = name.removeprefix("torchlift::")
        given = [self._argument(each) for each in args]
        condition = subgraphs[0] if kind == "while_loop" else None
        modules = [self._submodule(each, single=each is condition) for each in subgraphs]
        if kind == "cond":
            arguments = (given[0], *modules, tuple(given[1]))
        elif kind == "while_loop":
            arguments = (*modules, tuple(given[0]), tuple(given[1]))
        else:
            arguments = (*modules, given[0], given[1], tuple(given[2]))
        node = self.fx_graph.call_function(getattr(torch.ops.higher_order, kind), arguments)
        node.stack_trace = self.stack_trace
        self._define_items(results, node)

    def _submodule(self, subgraph: "_C.Graph", single: bool) -> "torch.fx.Node":
        """A graph as a module of this one's root, which gives a tuple, or one tensor."""
        names = [value.name for value in subgraph.inputs()]
        exporter = _Exporter(subgraph, names, self.to_compile)
        exporter.fx_graph.output(exporter.outputs[0] if single else tuple(exporter.outputs))
        name = f"subgraph_{len(self.root._modules)}"
        self.root.add_module(name, torch.fx.GraphModule(exporter.root, exporter.fx_graph))
        return self.fx_graph.get_attr(name)

    def _define_items(self, results: "list[Any]", node: "torch.fx.Node") -> None:
        for i, result in enumerate(results):
            if result is not None:
                self._define(result, self.fx_graph.call_function(operator.getitem, (node, i)))

    def _define(self, value: "_C.GraphValue | None", node: "torch.fx.Node") -> None:
        if value is not None:
            self.env[value.name] = node

    @staticmethod
    def _call_arguments(target: Any, args: "list[Any]") -> "tuple[list[Any], dict[str, Any]]":
        """Without the last ones that have their defaults."""
        formals = target._schema.arguments
        positional = [arg for arg, formal in zip(args, formals) if not formal.kwarg_only]
        for formal in reversed(formals[: len(positional)]):
            if not formal.has_default_value() or not _is_default(positional[-1], formal):
                break
            positional.pop()
        keywords = {
            formal.name: arg
            for arg, formal in zip(args, formals)
            if formal.kwarg_only
            and not (formal.has_default_value() and _is_default(arg, formal))
        }
        return positional, keywords


def _is_default(arg: Any, formal: Any) -> bool:
    default = formal.default_value
    return type(arg) is type(default) and not isinstance(arg, torch.fx.Node) and arg == default


def graph_module(
    graph: "_C.Graph",
    names: "list[str]",
    class_name: str = "GraphModule",
    to_compile: bool = False,
) -> "torch.fx.GraphModule":
    """The graph as a module of tensors; it returns a list of tensors. to_compile: see _Exporter."""
    exporter = _Exporter(graph, names, to_compile)
    exporter.fx_graph.output(exporter.outputs)
    return torch.fx.GraphModule(exporter.root, exporter.fx_graph, class_name)


def make_fx(
    f: Callable[..., Any],
    decomposition_table: "dict[Any, Callable[..., Any]] | None" = None,
    tracing_mode: str = "real",
) -> "Callable[..., torch.fx.GraphModule]":
    """Traces a function, transforms and all, into a torch.fx.GraphModule of plain operators.

    As `torch.fx.experimental.proxy_tensor.make_fx`. See `torchlift.trace` for the same as a program
    that runs without Python.

    Args:
        f: a function of pytrees of tensors.
        decomposition_table: for operators (`torch.ops.aten.mul.Tensor`), functions that are to take
            their place, as in `torch._decomp.get_decompositions`.
        tracing_mode: "real": the function runs on its arguments. "fake": on their shapes alone, as
            it does anyway where one of them is a `ShapeDtype` or on the meta device.

    Returns:
        A function of the same arguments that gives the GraphModule, which is called as `f` is.
        Captured tensors that `f` writes into are buffers of it, which its calls write into.
        Traced by shapes, it relies on the strides that meta kernels tell; `torchlift.trace` does not.

    Raises:
        UnsupportedError: see `torchlift.trace`.

    >>> import torch
    >>> from torchlift import grad, make_fx
    >>> def f(x):
    ...     return torch.sin(x).sum()
    >>> module = make_fx(grad(f))(torch.randn(100))
    >>> [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
    ['aten.sin.default', 'aten.sum.default', 'aten.cos.default', 'aten.mul.Tensor']
    """
    if tracing_mode not in ("real", "fake"):
        raise UnsupportedError(
            f"[make_fx] tracing_mode={tracing_mode!r} is not supported; 'real' is: the function "
            f"runs once on its arguments; and 'fake': on their shapes."
        )

    @wraps(f)
    def wrapped(*args: Any) -> "torch.fx.GraphModule":
        table = {**_decomposition.current(), **(decomposition_table or {})}
        by_shapes = tracing_mode == "fake"
        return _decomposition.apply(
            _make_fx(f, args, by_shapes), table, lambda run: _make_fx(run, args, by_shapes)
        )

    return wrapped


def _make_fx(
    f: Callable[..., Any], args: "tuple[Any, ...]", by_shapes: bool
) -> "torch.fx.GraphModule":
    # torch's own pytrees: the code that fx generates takes arguments apart by them.
    from torch.utils import _pytree as torch_pytree

    leaves, in_spec = torch_pytree.tree_flatten(args)
    leaves, devices = tensors_for(leaves, by_shapes)
    is_tensor = [isinstance(leaf, torch.Tensor) for leaf in leaves]
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    out: "list[Any]" = []

    def run(values: "list[torch.Tensor]") -> "tuple[list[Any], int]":
        rest = iter(values)
        given = [next(rest) if tensor else leaf for tensor, leaf in zip(is_tensor, leaves)]
        found, spec = torch_pytree.tree_flatten(f(*torch_pytree.tree_unflatten(given, in_spec)))
        out[:] = [[None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in found], spec]
        return found, len(found)

    names = _placeholder_names(f, args)
    tensors = [tensor.detach() for tensor in tensors]
    of_tensors = [name for name, tensor in zip(names, is_tensor) if tensor]
    graph = trace_leaves(run, tensors, of_tensors, "make_fx", devices)
    given = torch_pytree.tree_unflatten(leaves, in_spec)
    return _with_pytrees(graph, given, names, is_tensor, in_spec, out)


def _placeholder_names(f: Callable[..., Any], args: "tuple[Any, ...]") -> "list[str]":
    from torch.utils import _pytree as torch_pytree

    positional = parameters_of(f)[0]
    names = []
    for i, arg in enumerate(args):
        name = positional[i] if i < len(positional) else f"arg{i}"
        for _ in torch_pytree.tree_leaves(arg):
            names.append(f"{name}_{len(names) + 1}")
    return names


def _with_pytrees(
    graph: "_C.Graph",
    args: "tuple[Any, ...]",
    names: "list[str]",
    is_tensor: "list[bool]",
    in_spec: Any,
    out: "list[Any]",
) -> "torch.fx.GraphModule":
    """The graph as a module that takes and returns what the function does."""
    from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

    out_leaves, out_spec = out
    exporter = _Exporter(graph, [n for n, tensor in zip(names, is_tensor) if tensor])
    rest = iter(exporter.outputs)
    outputs = [next(rest) if leaf is None else leaf[0] for leaf in out_leaves]
    single = out_spec.is_leaf()
    exporter.fx_graph.output(outputs[0] if single else outputs)
    plain = all(isinstance(arg, torch.Tensor) for arg in args)
    if not plain or not single:
        if not all(is_tensor):
            _add_ignored_placeholders(exporter.fx_graph, names, is_tensor)
        argument_names = [f"arg_{i}" for i in range(len(args))]
        if single:
            exporter.fx_graph.output_node().args = (outputs,)
        info_in = torch.utils._pytree.tree_flatten((tuple(args), {}))[1]
        exporter.fx_graph._codegen = _PyTreeCodeGen(
            _PyTreeInfo(argument_names, info_in, out_spec)
        )
    return torch.fx.GraphModule(exporter.root, exporter.fx_graph, "GraphModule")


def _add_ignored_placeholders(
    fx_graph: "torch.fx.Graph", names: "list[str]", is_tensor: "list[bool]"
) -> None:
    """Numbers among the arguments are arguments of the module, too, though nothing reads them."""
    existing = [node for node in fx_graph.nodes if node.op == "placeholder"]
    rest = iter(existing)
    anchor = existing[0] if existing else next(iter(fx_graph.nodes))
    last = None
    for name, tensor in zip(names, is_tensor):
        if tensor:
            last = next(rest)
            continue
        with (
            fx_graph.inserting_before(anchor) if last is None else fx_graph.inserting_after(last)
        ):
            last = fx_graph.placeholder(name)
