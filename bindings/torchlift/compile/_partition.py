"""Cuts a joint graph, of a function and its gradients, into a forward and a backward one.

NOTE [joint graphs]
    joint:     (primals..., tangents...) -> (outputs..., gradients...)
    forward:   (primals...)              -> (outputs..., saved...)
    backward:  (saved..., tangents...)   -> (gradients...)
A placeholder is a tangent if its name says so ("tangents_1"), as in the graphs of torch's own AOT
Autograd; the others are primals. Writes are not allowed, but for copies into primals, which end the
forward pass.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Sequence

import torch

from torchlift._errors import TransformError
from torchlift.compile import config
from torchlift.compile._shapes import bytes_of, propagate, value_of

Node = torch.fx.Node
GraphModule = torch.fx.GraphModule


@dataclass(frozen=True)
class PartitionReport:
    """What a partition keeps for the backward pass, and what it computes twice.

    Attributes:
        saved: (name, bytes, whether it is a primal) of each saved value.
        saved_bytes: their memory; what several of them share is counted once.
        saved_activation_bytes: the part of it that is no primal.
        recomputed: the nodes that run in both passes, views left out.
        recomputed_elements: of their results.
        recomputed_bytes: that they read and write.

    >>> from torchlift.compile import PartitionReport
    >>> print(PartitionReport((("primals_1", 12, True),), 12, 0, (), 0, 0))
    saves 1 tensors, 12 bytes (0 without primals); computes 0 nodes again (0 elements, 0 bytes)
                12 primals_1 (primal)
    """

    saved: "tuple[tuple[str, int, bool], ...]"
    saved_bytes: int
    saved_activation_bytes: int
    recomputed: "tuple[str, ...]"
    recomputed_elements: int
    recomputed_bytes: int

    def __str__(self) -> str:
        lines = [
            f"saves {len(self.saved)} tensors, {self.saved_bytes} bytes "
            f"({self.saved_activation_bytes} without primals); computes {len(self.recomputed)} "
            f"nodes again ({self.recomputed_elements} elements, {self.recomputed_bytes} bytes)"
        ]
        lines += [f"  {size:>12} {name}{' (primal)' if p else ''}" for name, size, p in self.saved]
        return "\n".join(lines)


def partition_report(forward: GraphModule) -> PartitionReport:
    """What the partition that made this forward (or backward) module saves and computes again.

    >>> import torch
    >>> from torchlift.compile import aot_function, partition_report
    >>> def compiler(fx_module, inputs):
    ...     print(partition_report(fx_module).saved_bytes)
    ...     return fx_module
    >>> f = aot_function(torch.tanh, compiler, bw_compiler=lambda m, inputs: m)
    >>> f(torch.zeros(3, requires_grad=True)).detach()
    12
    tensor([0., 0., 0.])
    """
    report = forward.meta.get("partition")
    if report is None:
        raise TransformError(
            "[partition_report] this module was not made by a partition of torchlift.compile."
        )
    return report


# --- the joint graph -------------------------------------------------------------------------------


class _Joint:
    """A joint graph, and which of its nodes the forward pass needs."""

    def __init__(self, name: str, module: GraphModule, num_fwd_outputs: int) -> None:
        self.name = name
        self.module = module
        self.nodes = list(module.graph.nodes)
        holders = [node for node in self.nodes if node.op == "placeholder"]
        self.tangents = [node for node in holders if "tangents" in str(node.target)]
        self.primals = [node for node in holders if node not in set(self.tangents)]
        (output,) = [node for node in self.nodes if node.op == "output"]
        self.outputs = torch.utils._pytree.tree_leaves(output.args)
        if not 0 <= num_fwd_outputs <= len(self.outputs):
            raise TransformError(
                f"[{name}] num_fwd_outputs is {num_fwd_outputs}, but the joint graph has "
                f"{len(self.outputs)} outputs."
            )
        self.forward_outputs = self.outputs[:num_fwd_outputs]
        self.backward_outputs = self.outputs[num_fwd_outputs:]
        self.after_tangents = self._descendants(self.tangents)
        self._check()
        self.stores = [node for node in self.nodes if _writes(node)]
        checks = [node for node in self.nodes if _checks(node)]
        self.early_checks = [node for node in checks if node not in self.after_tangents]
        self.late_checks = [node for node in checks if node in self.after_tangents]
        self.forward = self._forward_nodes()
        self.backward = _ancestors([*self.backward_outputs, *self.late_checks])

    def _check(self) -> None:
        for i, node in enumerate(self.forward_outputs):
            if isinstance(node, Node) and node in self.after_tangents:
                raise TransformError(
                    f"[{self.name}] output {i} ({node.name}) depends on a tangent, so that it is "
                    f"none of the forward pass. num_fwd_outputs={len(self.forward_outputs)} counts "
                    f"the outputs of the function; gradients come after them."
                )
        primals = set(self.primals)
        for node in self.nodes:
            if _writes(node) and not (
                node.target is torch.ops.aten.copy_.default and node.args[0] in primals
            ):
                raise TransformError(
                    f"[{self.name}] {node.name} ({node.target}) writes into a tensor. Only graphs "
                    f"without writes can be cut in two: trace torchlift.functionalize(f)."
                )

    def _descendants(self, sources: "list[Node]") -> "set[Node]":
        found = set(sources)
        for node in self.nodes:
            if any(source in found for source in node.all_input_nodes):
                found.add(node)
        return {node for node in found if node.op != "output"}

    def _forward_nodes(self) -> "set[Node]":
        stores = [node for node in self.stores if node not in self.after_tangents]
        found = _ancestors([*self.forward_outputs, *stores, *self.early_checks])
        # What takes apart the result of a node of the forward pass is of the forward pass.
        for node in self.nodes:
            if node.target is operator.getitem and node.args[0] in found:
                found.add(node)
        return found

    def saved_by_default(self) -> "list[Node]":
        """What the backward pass reads of the forward one."""
        forward = self.forward | set(self.primals)
        read = [node for node in self.backward if node not in forward]
        wanted = {source for node in read for source in node.all_input_nodes if source in forward}
        wanted |= {n for n in self.backward_outputs if isinstance(n, Node) and n in forward}
        return [n for n in self.nodes if n in wanted and n.op != "get_attr"]


def _ancestors(outputs: "Iterable[Any]") -> "set[Node]":
    found: "set[Node]" = set()
    todo = [node for node in outputs if isinstance(node, Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo.extend(node.all_input_nodes)
    return found


def _schema(node: Node) -> Any:
    return getattr(node.target, "_schema", None) if node.op == "call_function" else None


def _writes(node: Node) -> bool:
    schema = _schema(node)
    return schema is not None and schema.is_mutable


def _checks(node: Node) -> bool:
    """Whether it raises or does nothing: it has no result that anybody could read."""
    schema = _schema(node)
    return schema is not None and not schema.returns


# --- cutting ---------------------------------------------------------------------------------------


def _extract(
    joint: _Joint, class_name: str, inputs: "Sequence[Node]", outputs: "Sequence[Any]", extra: Any
) -> GraphModule:
    """The part of the joint graph that computes outputs (and does `extra`) from inputs."""
    graph = torch.fx.Graph()
    copies: "dict[Node, Node]" = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed: "set[Node]" = set()
    todo = [node for node in [*outputs, *extra] if isinstance(node, Node)]
    while todo:
        node = todo.pop()
        if node in copies or node in needed:
            continue
        if node.op == "placeholder":
            raise TransformError(
                f"[{joint.name}] internal error: the {class_name} module needs {node.name}, which "
                f"it is not given."
            )
        needed.add(node)
        todo.extend(node.all_input_nodes)
    for node in joint.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
            copies[node].meta = dict(node.meta)
    graph.output([copies[node] if isinstance(node, Node) else node for node in outputs])
    graph.lint()
    return GraphModule(joint.module, graph, class_name)


def _split(joint: _Joint, saved: "list[Node]") -> "tuple[GraphModule, GraphModule]":
    stores = [node for node in joint.stores if node in joint.forward]
    forward = _extract(
        joint,
        "GraphModule",
        joint.primals,
        [*joint.forward_outputs, *saved],
        [*stores, *joint.early_checks],
    )
    backward = _extract(
        joint,
        "GraphModule",
        [*saved, *joint.tangents],
        joint.backward_outputs,
        joint.late_checks,
    )
    report = _report(joint, saved, backward)
    forward.meta["partition"] = backward.meta["partition"] = report
    if config.debug_partitioner:
        print(report)
    return forward, backward


def _report(joint: _Joint, saved: "list[Node]", backward: GraphModule) -> PartitionReport:
    primals = set(joint.primals)
    kept = {"all": {}, "activations": {}}  # type: dict[str, dict[Any, int]]
    rows = []
    of_primals = {_memory_of(node) for node in primals}
    for node in saved:
        size, memory = bytes_of(value_of(node)), _memory_of(node)
        kept["all"][memory] = size
        if memory not in of_primals:
            kept["activations"][memory] = size
        rows.append((node.name, size, node in primals))
    again = {n.name for n in backward.graph.nodes if n.op == "call_function"}
    twice = [
        n
        for n in joint.nodes
        if n in joint.forward and n.name in again and not _is_view(n) and n.op == "call_function"
    ]
    values = [(node, value_of(node)) for node in twice if node.target is not operator.getitem]
    moved = 0
    for node, value in values:
        moved += sum(_size_of(source) for source in node.all_input_nodes) + _size_of(node)
    return PartitionReport(
        saved=tuple(rows),
        saved_bytes=sum(kept["all"].values()),
        saved_activation_bytes=sum(kept["activations"].values()),
        recomputed=tuple(node.name for node, _ in values),
        recomputed_elements=sum(_elements(value) for _, value in values),
        recomputed_bytes=moved,
    )


def _memory_of(node: Node) -> Any:
    """The node whose memory a view shows."""
    while _is_view(node):
        node = _base_of(node)
    return node


def _size_of(node: Node) -> int:
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return int(value.numel()) * value.element_size()
    if isinstance(value, (list, tuple)):
        return sum(
            int(v.numel()) * v.element_size() for v in value if isinstance(v, torch.Tensor)
        )
    return bytes_of(value)


def _elements(value: Any) -> int:
    leaves = value if isinstance(value, (list, tuple)) else [value]
    return sum(int(torch.Size(v.shape).numel()) for v in leaves if hasattr(v, "shape"))


def _joint_leaves(inputs: Any) -> "list[Any]":
    return list(torch.utils._pytree.tree_leaves(inputs))


# --- the default -----------------------------------------------------------------------------------


def default_partition(
    joint_module: GraphModule,
    _joint_inputs: Any,
    *,
    num_fwd_outputs: int,
    static_lifetime_input_indices: "list[int] | None" = None,
    static_lifetime_input_nodes: Any = None,
) -> "tuple[GraphModule, GraphModule]":
    """Cuts a joint graph in two. All values that the backward pass reads are saved.

    Args:
        joint_module: of (primals..., tangents...), the tangents by their names; it returns the
            outputs of the function, then the gradients.
        _joint_inputs: its inputs, or tensors like them: (primals, tangents).
        num_fwd_outputs: how many of its outputs are the function's.
        static_lifetime_input_indices, static_lifetime_input_nodes: for the other partitioner.

    Returns:
        (forward module, backward module).

    >>> import torch, torchlift
    >>> from torchlift.compile import default_partition
    >>> def joint(primals, tangents):
    ...     y, pull = torchlift.vjp(torch.exp, *primals)
    ...     return [y, *pull(*tangents)]
    >>> inputs = ([torch.zeros(2)], [torch.ones(2)])
    >>> module = torchlift.make_fx(joint)(*inputs)
    >>> forward, backward = default_partition(module, inputs, num_fwd_outputs=1)
    >>> y, *saved = forward(torch.zeros(2))
    >>> backward(*saved, torch.ones(2))
    [tensor([1., 1.])]
    """
    joint = _Joint("default_partition", joint_module, num_fwd_outputs)
    propagate(joint_module, _joint_leaves(_joint_inputs))
    return _split(joint, _without_tuples(joint.saved_by_default()))


def _without_tuples(saved: "list[Node]") -> "list[Node]":
    """Of an operator with several results, the results that are used."""
    found: "list[Node]" = []
    for node in saved:
        parts = [user for user in node.users if user.target is operator.getitem]
        found.extend(parts if isinstance(value_of(node), (list, tuple)) else [node])
    return list(dict.fromkeys(found))


# --- min-cut ---------------------------------------------------------------------------------------

# Operators that are cheap to compute again, besides pointwise ones (torch.Tag.pointwise) and views.
_CHEAP = frozenset(
    "aten::" + name
    for name in (
        "_to_copy arange cat clone constant_pad_nd empty empty_like eye flip full full_like gather "
        "index index_select linspace masked_fill new_empty new_full new_ones new_zeros one_hot ones "
        "ones_like rand_like repeat roll scalar_tensor select_scatter slice_scatter stack "
        "slice_backward select_backward triu tril where zeros zeros_like _unsafe_view "
        "_reshape_alias lift_fresh lift_fresh_copy fill expand_copy"
    ).split()
)
_REDUCTIONS = frozenset(
    "aten::" + name
    for name in (
        "_log_softmax _softmax all amax amin any argmax argmin count_nonzero logsumexp max mean min "
        "native_batch_norm native_group_norm native_layer_norm _native_batch_norm_legit norm "
        "linalg_vector_norm prod std std_mean sum var var_mean"
    ).split()
)
# They show the memory of their argument, though their schemas do not say so.
_HIDDEN_VIEWS = frozenset({"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh"})
# The result of something this much smaller than what it reads is saved rather than computed again.
_SHRINKS = 4


def _is_view(node: Node) -> bool:
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and _is_view(node.args[0])
    schema = _schema(node)
    if schema is None or not isinstance(node.args[0] if node.args else None, Node):
        return False
    alias = [r.alias_info for r in schema.returns]
    return schema.name in _HIDDEN_VIEWS or any(a is not None and not a.is_write for a in alias)


def _base_of(node: Node) -> Node:
    base = node.args[0]
    assert isinstance(base, Node)
    return base


def _tags(node: Node) -> "Sequence[Any]":
    return getattr(node.target, "tags", ()) if node.op == "call_function" else ()


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in _tags(node)


def _may_recompute(node: Node) -> bool:
    """Whether a node of the forward pass may run in the backward pass, too."""
    if node.op == "get_attr" or node.target is operator.getitem:
        return True
    schema = _schema(node)
    if schema is None or _writes(node) or _is_random(node):
        return False
    if _is_view(node):
        return config.recompute_views
    if config.aggressive_recomputation:
        return True
    if _shrinks(node):
        return False
    if schema.name in _REDUCTIONS:
        return not config.ban_recompute_reductions
    return torch.Tag.pointwise in _tags(node) or schema.name in _CHEAP


def _shrinks(node: Node) -> bool:
    read = sum(_size_of(source) for source in node.all_input_nodes)
    return _size_of(node) * _SHRINKS < read


class _Cut:
    """The flow network: each node of the forward pass is an edge, as wide as its bytes."""

    def __init__(self, joint: _Joint, free: "set[Node]") -> None:
        import networkx

        self.joint = joint
        self.network = networkx.DiGraph()
        self.network.add_nodes_from(["source", "sink"])
        in_forward = joint.forward | (joint.backward - joint.after_tangents)
        self.nodes = [
            n for n in joint.nodes if n in in_forward and n.op != "output" and not _checks(n)
        ]
        self.members = set(self.nodes)
        for node in self.nodes:
            self._add(node, free)

    def _add(self, node: Node, free: "set[Node]") -> None:
        width = self._width(node, free)
        start, end = f"{node.name}/in", f"{node.name}/out"
        if width is None:
            self.network.add_edge(start, end)  # without a capacity: any
        else:
            self.network.add_edge(start, end, capacity=width)
        if node.op == "placeholder" or (
            node in self.joint.forward and not _may_recompute(node)
        ):
            self.network.add_edge("source", start)
        outside = self.joint.after_tangents
        if any(user in outside and user in self.joint.backward for user in node.users):
            self.network.add_edge(end, "sink")
        if any(node is output for output in self.joint.backward_outputs):
            self.network.add_edge(end, "sink")
        for user in node.users:
            if user in self.members:
                self.network.add_edge(end, f"{user.name}/in")

    def _width(self, node: Node, free: "set[Node]") -> "int | None":
        """None if it cannot be saved."""
        if node in free:
            return 0
        value = value_of(node)
        if node.op == "get_attr" or isinstance(value, (list, tuple)):
            return None
        if node not in self.joint.forward and node.op != "placeholder":
            return None  # computed in the backward pass only
        if _is_view(node) and config.recompute_views:
            return None
        return max(bytes_of(value), 1)

    def saved(self) -> "list[Node]":
        import networkx

        try:
            # Of several cuts of the same width it gives the one next to the sink.
            _, (reachable, _) = networkx.minimum_cut(self.network, "source", "sink")
        except networkx.NetworkXUnbounded:
            raise TransformError(
                f"[{self.joint.name}] no cut exists: an operator that must not be computed again "
                f"has a result that cannot be saved."
            ) from None
        return [
            node
            for node in self.nodes
            if f"{node.name}/in" in reachable and f"{node.name}/out" not in reachable
        ]


def min_cut_rematerialization_partition(
    joint_module: GraphModule,
    _joint_inputs: Any,
    compiler: str = "inductor",
    *,
    num_fwd_outputs: int,
    static_lifetime_input_indices: "list[int] | None" = None,
) -> "tuple[GraphModule, GraphModule]":
    """Cuts a joint graph in two, so that as few bytes as possible are saved in between.

    The backward pass computes again, from what is saved, whatever is cheap: views, pointwise
    operators, reductions. Random operators never run twice; products of matrices, convolutions,
    attention and all other operators only with config.aggressive_recomputation. Which values to
    save is a minimum cut between the primals and the backward pass, found by networkx; of several
    that save as little, the one with the least to compute again.

    Args:
        joint_module, _joint_inputs, num_fwd_outputs: see `default_partition`.
        compiler: for functorch's signature; without meaning.
        static_lifetime_input_indices: primals that are kept in any case (parameters), so that
            saving them costs nothing.

    Returns:
        (forward module, backward module); `partition_report` of either tells what was saved.

    >>> import torch
    >>> from torchlift.compile import aot_function, min_cut_rematerialization_partition, nop
    >>> from torchlift.compile import partition_report
    >>> def compiler(fx_module, inputs):
    ...     report = partition_report(fx_module)
    ...     print(report.saved_bytes, report.recomputed)
    ...     return fx_module
    >>> f = aot_function(
    ...     lambda x: x.sin().cos().exp(), compiler, nop,
    ...     partition_fn=min_cut_rematerialization_partition)
    >>> f(torch.zeros(3, requires_grad=True)).shape
    12 ('sin_default', 'cos_default', 'exp_default')
    torch.Size([3])
    """
    joint = _Joint("min_cut_rematerialization_partition", joint_module, num_fwd_outputs)
    propagate(joint_module, _joint_leaves(_joint_inputs))
    free: "set[Node]" = set()
    if config.treat_parameters_as_free_to_save:
        free = {joint.primals[i] for i in static_lifetime_input_indices or []}
    return _split(joint, _Cut(joint, free).saved())


PartitionFn = Callable[..., "tuple[GraphModule, GraphModule]"]
