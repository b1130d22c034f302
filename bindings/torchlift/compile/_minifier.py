"""minifier: a smaller graph that fails in the same way."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch

from torchlift._errors import TransformError

GraphModule = torch.fx.GraphModule
Inputs = "list[torch.Tensor]"
Fails = Callable[[GraphModule, "Sequence[torch.Tensor]"], bool]


def dump_state(fx_g: GraphModule, inps: "Sequence[torch.Tensor]") -> None:
    """Prints a program that holds the graph."""
    kinds = [(tuple(t.shape), t.dtype, str(t.device)) for t in inps]
    print(
        f"# {len(list(fx_g.graph.nodes))} nodes still fail\nkinds = {kinds}\n"
        f"inputs = [torch.ones(shape, dtype=dtype, device=device) for shape, dtype, device in kinds]\n"
        f"{fx_g.code}"
    )


class _Values(torch.fx.Interpreter):
    """Remembers the tensors that the nodes give."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: "dict[str, Any]" = {}

    def run_node(self, n: "torch.fx.Node") -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        return value


class _Minifier:
    def __init__(self, module: GraphModule, inputs: Inputs, fails: Fails, dump: Any) -> None:
        self.root = module
        self.graph = module.graph
        self.inputs = inputs
        self.fails = fails
        self.dump = dump
        self.queries = 0
        values = _Values(module)
        with torch.random.fork_rng():
            values.run(*[t.clone() for t in inputs], enable_io_processing=False)
        self.values = values.values

    def module(self, graph: "torch.fx.Graph") -> GraphModule:
        return GraphModule(self.root, graph)

    def still_fails(self, graph: "torch.fx.Graph", inputs: Inputs) -> bool:
        self.queries += 1
        return bool(self.fails(self.module(_copy(graph)), [t.clone() for t in inputs]))

    def accept(self, graph: "torch.fx.Graph", inputs: Inputs) -> bool:
        """Takes a smaller graph, if it fails."""
        _drop_dead_code(graph)
        inputs = _drop_unused_inputs(graph, inputs)
        if _size(graph) >= _size(self.graph) and len(inputs) >= len(self.inputs):
            return False
        if not self.still_fails(graph, inputs):
            return False
        self.graph, self.inputs = graph, inputs
        self.dump(self.module(_copy(graph)), inputs)
        return True

    # --- ways to make it smaller -------------------------------------------------------------------

    def cut_end(self, granularity: int) -> bool:
        """Returns an earlier node in place of the outputs."""
        names = [node.name for node in self.graph.nodes]
        for end in range(granularity, len(names), granularity):
            graph = _copy(self.graph)
            node = _named(graph, names[-1 - end])
            if node.op in ("placeholder", "output"):
                continue
            graph.output_node().args = ((node,),)
            if self.accept(graph, list(self.inputs)):
                return True
        return False

    def drop_outputs(self, granularity: int) -> bool:
        """Returns fewer tensors."""
        outputs = torch.utils._pytree.tree_leaves(self.graph.output_node().args)
        if len(outputs) <= 1:
            return False
        for start in range(0, len(outputs), granularity):
            graph = _copy(self.graph)
            kept = torch.utils._pytree.tree_leaves(graph.output_node().args)
            del kept[start : start + granularity]
            if not kept:
                continue
            graph.output_node().args = (tuple(kept),)
            if self.accept(graph, list(self.inputs)):
                return True
        return False

    def make_inputs(self, granularity: int) -> bool:
        """Makes inputs of some nodes, so that what computes them can go."""
        names = [node.name for node in self.graph.nodes]
        for start in range(0, len(names), granularity):
            graph, inputs = _copy(self.graph), list(self.inputs)
            for name in names[start : start + granularity]:
                self._make_input(graph, _named(graph, name), inputs)
            if self.accept(graph, inputs):
                return True
        return False

    def _make_input(self, graph: "torch.fx.Graph", node: "torch.fx.Node", inputs: Inputs) -> None:
        value = self.values.get(node.name)
        if node.op in ("placeholder", "output") or not isinstance(value, torch.Tensor):
            return
        first = next(iter(graph.nodes))
        holders = [each for each in graph.nodes if each.op == "placeholder"]
        with graph.inserting_after(holders[-1]) if holders else graph.inserting_before(first):
            holder = graph.placeholder(f"given_{len(inputs)}")
        self.values[holder.name] = value
        node.replace_all_uses_with(holder)
        graph.erase_node(node)
        inputs.append(value.detach())

    def run(self, max_granularity: "int | None") -> None:
        largest = max_granularity or 1 << max(_size(self.graph).bit_length() - 1, 0)
        granularity = largest
        while granularity >= 1:
            ways = (self.cut_end, self.drop_outputs, self.make_inputs)
            if any(way(granularity) for way in ways):
                granularity = min(largest, granularity * 2)
            else:
                granularity //= 2


def _copy(graph: "torch.fx.Graph") -> "torch.fx.Graph":
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    return copy


def _named(graph: "torch.fx.Graph", name: str) -> "torch.fx.Node":
    return next(node for node in graph.nodes if node.name == name)


def _size(graph: "torch.fx.Graph") -> int:
    return sum(node.op not in ("placeholder", "output") for node in graph.nodes)


def _drop_dead_code(graph: "torch.fx.Graph") -> None:
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _drop_unused_inputs(graph: "torch.fx.Graph", inputs: Inputs) -> Inputs:
    kept = []
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    for holder, value in zip(holders, inputs):
        if holder.users:
            kept.append(value)
        else:
            graph.erase_node(holder)
    return kept


def minifier(
    fail_f: GraphModule,
    inps: "Sequence[torch.Tensor]",
    module_fails: Fails,
    dump_state: "Callable[[GraphModule, Sequence[torch.Tensor]], None]" = dump_state,
    *,
    save_dir: "str | None" = None,
    offload_to_disk: bool = False,
    skip_offload: bool = False,
    skip_sanity: bool = False,
    max_granularity: "int | None" = None,
) -> "tuple[GraphModule, list[torch.Tensor]]":
    """A smaller graph, and inputs for it, that still fail.

    It cuts off the end, leaves outputs out, and makes inputs of what nodes give, in ever smaller
    steps, until no step keeps the failure.

    Args:
        fail_f: the graph.
        inps: its inputs.
        module_fails: of (module, inputs): whether it fails.
        dump_state: called with each smaller one.
        skip_sanity: does not ask first whether the graph fails at all.
        max_granularity: the largest step, a power of two.
        save_dir, offload_to_disk, skip_offload: for functorch's signature; values stay in memory.

    Returns:
        (the smaller module, its inputs).

    >>> import torch, torchlift
    >>> module = torchlift.make_fx(lambda x: (x.sin().exp() * 2).cos())(torch.zeros(3))
    >>> def fails(module, inputs):
    ...     return any("exp" in str(node.target) for node in module.graph.nodes)
    >>> small, inputs = torchlift.compile.minifier(
    ...     module, [torch.zeros(3)], fails, dump_state=lambda *_: None)
    >>> [str(node.target) for node in small.graph.nodes if node.op == "call_function"]
    ['aten.exp.default']
    """
    if max_granularity is not None and max_granularity & (max_granularity - 1):
        raise TransformError(
            f"[minifier] max_granularity must be a power of two, got {max_granularity}."
        )
    if offload_to_disk:
        raise TransformError("[minifier] offload_to_disk=True is not supported; leave it out.")
    search = _Minifier(fail_f, list(inps), module_fails, dump_state)
    if not skip_sanity and not search.still_fails(search.graph, search.inputs):
        raise TransformError(
            "[minifier] the graph does not fail with these inputs: module_fails gave False."
        )
    search.run(max_granularity)
    return search.module(_copy(search.graph)), search.inputs
