"""What a graph without writes cannot say: which outputs are inputs or views of them, what the function
wrote into its arguments.

NOTE [outputs that are views]
A function that returns its argument, or a view of it, must do so when it is compiled, too: what is
written into the one is seen in the other, and the gradient flows through the view. A compiled graph
cannot say that. So such outputs are not computed by it: the views are made again from the tensor
that they are views of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from torchlift import _C
from torchlift._errors import UnsupportedError
from torchlift._fx import graph_module, overload_of


@dataclass
class View:
    """One operator that makes a view."""

    target: Any
    args: "list[Any]"  # by the schema, with None in the place of the base
    base: int
    result: int
    index: "int | None"  # in a list of results

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        formals = self.target._schema.arguments
        args = [tensor if i == self.base else arg for i, arg in enumerate(self.args)]
        positional = [arg for arg, formal in zip(args, formals) if not formal.kwarg_only]
        keywords = {formal.name: arg for arg, formal in zip(args, formals) if formal.kwarg_only}
        made = self.target(*positional, **keywords)
        if len(self.target._schema.returns) > 1:
            made = made[self.result]
        return made if self.index is None else made[self.index]


@dataclass
class Output:
    """Where an output comes from, and the views that lead to it.

    kind: "graph" (the graph computes it: `place` among those outputs), "input", "constant" (`value`),
        "output" (`place` among all outputs) or "none".
    """

    kind: str
    place: int = 0
    views: "list[View]" = field(default_factory=list)
    value: Any = None
    shared: bool = False  # with an earlier output of the graph

    def made_from(self, tensor: torch.Tensor) -> torch.Tensor:
        for view in self.views:
            tensor = view.of(tensor)
        return tensor


def _views_in(graph: "_C.Graph") -> "dict[str, tuple[str, View]]":
    """For each value that is a view: its base, and how it is made of it."""
    found: "dict[str, tuple[str, View]]" = {}
    for name, overload, args, results, subgraphs in graph.nodes():
        if subgraphs:
            continue
        target = overload_of(name, overload)
        base = _aliased_argument(target, args)
        if base is None:
            continue
        for r, (result, returned) in enumerate(zip(results, target._schema.returns)):
            if returned.alias_info is None or returned.alias_info.is_write:
                continue
            listed = isinstance(result, list)
            for i, value in enumerate(result if listed else [result]):
                if value is not None and value.name != args[base].name:
                    plain = [None if j == base else arg for j, arg in enumerate(args)]
                    view = View(target, plain, base, r, i if listed else None)
                    found[value.name] = (args[base].name, view)
    return found


def _aliased_argument(target: Any, args: "list[Any]") -> "int | None":
    """The one tensor that the results are views of; None for other operators."""
    tensors = [i for i, arg in enumerate(args) if isinstance(arg, _C.GraphValue)]
    lists = any(
        isinstance(each, _C.GraphValue) for arg in args if isinstance(arg, list) for each in arg
    )
    if len(tensors) != 1 or lists:
        return None
    alias = target._schema.arguments[tensors[0]].alias_info
    return tensors[0] if alias is not None and not alias.is_write else None


def outputs_of(graph: "_C.Graph") -> "list[Output]":
    """How each output is to be given; of a graph as it was traced, writes included."""
    views = _views_in(graph)
    inputs = {value.name: i for i, value in enumerate(graph.inputs())}
    constants = dict(graph.constants())
    names = [None if value is None else value.name for value in graph.outputs()]
    first: "dict[str, int]" = {}
    for i, name in enumerate(names):
        if name is not None:
            first.setdefault(name, i)
    outputs: "list[Output]" = []
    roots: "set[str]" = set()
    computed = 0
    for i, name in enumerate(names):
        output = _origin(name, i, views, inputs, constants, first)
        if output.kind == "graph":
            root = _root(name, views)
            output.place, output.shared = computed, root in roots
            roots.add(root)
            computed += 1
        outputs.append(output)
    return outputs


def _root(name: Any, views: "dict[str, tuple[str, View]]") -> Any:
    while name in views:
        name = views[name][0]
    return name


def _origin(
    name: "str | None",
    i: int,
    views: "dict[str, tuple[str, View]]",
    inputs: "dict[str, int]",
    constants: "dict[str, torch.Tensor]",
    first: "dict[str, int]",
) -> Output:
    """Follows views back to an input, a constant, or another output."""
    if name is None:
        return Output("none")
    chain: "list[View]" = []
    while True:
        if name in inputs:
            return Output("input", inputs[name], chain)
        if name in constants:
            return Output("constant", views=chain, value=constants[name])
        if name in first and first[name] != i and _is_own(name, views, inputs, constants):
            return Output("output", first[name], chain)
        if name not in views:
            return Output("graph")
        name, view = views[name]
        chain.insert(0, view)


def _is_own(
    name: str,
    views: "dict[str, tuple[str, View]]",
    inputs: "dict[str, int]",
    constants: "dict[str, torch.Tensor]",
) -> bool:
    root = _root(name, views)
    return root not in inputs and root not in constants


class Frame:
    """A traced graph made functional, and what is to be done around it.

    `graph` has no writes. Its inputs are those that it was traced with, then `state`: the captured
    tensors that the function writes into. So `tensors` of the methods here are what `inputs` gives. Its
    outputs are, by `order`: what goes back into the inputs `updates`, then the outputs that are to be
    computed; `finish` makes the function's outputs of those. Outputs that are constants are copied in
    each run (NOTE [outputs that are constants] in compile/own_copy.h); not if `once`, as the graph is
    of one call.
    """

    def __init__(self, transform: str, traced: "_C.Graph", once: bool = False) -> None:
        self.transform = transform
        self.once = once
        self.outputs = outputs_of(traced)
        self.graph = traced.copy()
        _, updates, self.state = self.graph.functionalize()
        self.updates = [i for i, _ in updates]
        self.computed = [i for i, output in enumerate(self.outputs) if output.kind == "graph"]
        self.order = [o for _, o in updates] + self.computed

    def compute_views(self) -> None:
        """Outputs that are views are computed by the graph; those that are inputs stay what they are."""
        updates = self.order[: len(self.updates)]
        for output in self.outputs:
            if output.views:
                output.kind, output.views = "graph", []
        self.computed = [i for i, output in enumerate(self.outputs) if output.kind == "graph"]
        for place, i in enumerate(self.computed):
            self.outputs[i].place = place
        self.order = updates + self.computed

    def inputs(self, tensors: "list[torch.Tensor]") -> "list[torch.Tensor]":
        return [*tensors, *self.state] if self.state else tensors

    def module(self, names: "list[str]") -> "torch.fx.GraphModule":
        """The graph as an fx module that gives the outputs of `order`; `names` are of the arguments."""
        held = [value.name for value in self.graph.inputs()[len(names) :]]
        module = graph_module(self.graph, [*names, *held])
        reorder_outputs(module, self.order)
        return module

    def check_aliases(self, tensors: "list[torch.Tensor]") -> None:
        """Inputs that are written into must not share memory with others."""
        if not self.updates:
            return
        arguments = len(tensors) - len(self.state)

        def called(i: int) -> str:
            return f"tensor {i} of the arguments" if i < arguments else "a captured tensor"

        memory = [_memory_of(tensor) or ("none", i) for i, tensor in enumerate(tensors)]
        sharers: "dict[Any, list[int]]" = {}
        for i, key in enumerate(memory):
            sharers.setdefault(key, []).append(i)
        for i in self.updates:
            for j in sharers[memory[i]]:
                if j != i:
                    raise UnsupportedError(
                        f"[{self.transform}] {called(i)} is written into, and {called(j)} shares its "
                        f"memory, which a graph cannot say. Pass a copy."
                    )

    def finish(
        self, tensors: "list[torch.Tensor]", found: "list[torch.Tensor]", written: bool = False
    ) -> "list[Any]":
        """The function's tensors, of the outputs of `order`.

        written: the graph wrote into the inputs itself, and gives no updates.
        """
        computed = found
        if not written:
            for i, update in zip(self.updates, found):
                with torch.no_grad():
                    tensors[i].copy_(update)
            computed = found[len(self.updates) :]
        made: "dict[int, Any]" = {}

        def make(i: int) -> Any:
            if i not in made:
                output = self.outputs[i]
                source = {
                    "graph": lambda: computed[output.place],
                    "input": lambda: tensors[output.place],
                    "constant": lambda: self._constant(output.value),
                    "output": lambda: make(output.place),
                    "none": lambda: None,
                }[output.kind]()
                made[i] = output.made_from(source)
            return made[i]

        return [make(i) for i in range(len(self.outputs))]

    def _constant(self, tensor: torch.Tensor) -> torch.Tensor:
        is_state = any(tensor is each for each in self.state)
        return tensor if self.once or is_state else tensor.clone()


def _memory_of(tensor: torch.Tensor) -> Any:
    """Equal for tensors that share memory; 0 for one that has none."""
    if _C.is_lifted(tensor):
        return ("lifted", id(tensor))
    return tensor.untyped_storage().data_ptr()


def reorder_outputs(
    module: "torch.fx.GraphModule", order: "list[int]", copied: "set[int] | None" = None
) -> None:
    """These outputs, in this order; those in `copied` with memory of their own."""
    output = module.graph.output_node()
    before = list(output.args[0])
    with module.graph.inserting_before(output):
        after = [
            module.graph.call_function(torch.ops.aten.clone.default, (before[i],))
            if i in (copied or ())
            else before[i]
            for i in order
        ]
    output.args = (after,)
    _drop_dead_code(module.graph)
    module.recompile()


def _drop_dead_code(graph: "torch.fx.Graph") -> None:
    """Of a graph without writes; checks, which have no results, stay."""
    for node in reversed(list(graph.nodes)):
        schema = getattr(node.target, "_schema", None)
        checks = schema is not None and (schema.is_mutable or not schema.returns)
        if not node.users and not checks and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
