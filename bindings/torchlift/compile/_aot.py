"""aot_function and its kin: forward and backward passes as graphs, for compilers of both.

NOTE [compiled ahead]
For each signature of the arguments the function is traced, with autograd at work inside of the
trace, into one graph of outputs and gradients; a partition cuts it in two; the compilers make
functions of both; and a torch.autograd.Function calls them. What graphs cannot say happens around
it: writes into arguments are outputs that are copied back, outputs that are views of arguments are
made anew (NOTE [outputs that are views]).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Callable, Sequence

import torch

from torchlift import _C, _decomposition, _pytree
from torchlift._errors import TransformError, UnsupportedError
from torchlift._functional import functional_call
from torchlift._fx import graph_module
from torchlift._graph_outputs import Frame, reorder_outputs
from torchlift._names import describe, function_name, wraps
from torchlift._signature import leaf_key, mode_key, module_key, module_state
from torchlift._trace import trace_leaves
from torchlift.compile import _context
from torchlift.compile._boxed import call
from torchlift.compile._partition import default_partition
from torchlift.compile._shapes import example_of, propagate, value_of

Tensors = "list[torch.Tensor]"
Compiler = Callable[..., Callable[..., Any]]
_CACHE_SIZE = 64


@dataclass(frozen=True)
class _Config:
    fw_compiler: Compiler
    bw_compiler: Compiler
    inference_compiler: Compiler
    partition_fn: Callable[..., Any]
    decompositions: Any
    num_params_buffers: int
    keep_inference_input_mutations: bool
    aot_id: int


# --- tracing ---------------------------------------------------------------------------------------


@dataclass
class _Forward:
    """What a run of the function in a trace told of it."""

    graph: "_C.Graph"
    out_leaves: "list[Any]"  # None for a tensor, else (value,)
    out_spec: Any
    kinds: "list[tuple[torch.Size, torch.dtype, torch.device, bool]]"  # of tensors; whether tracked
    tracked_writes: "list[bool]"  # of inputs: whether something tracked was written into them


def _trace(run: Callable[..., Any], tensors: Tensors, names: "list[str]") -> "_C.Graph":
    with torch.random.fork_rng(enabled=True):
        return trace_leaves(run, tensors, names, "aot_function")


def _names(count: int, tangents: int = 0) -> "list[str]":
    primals = [f"primals_{i + 1}" for i in range(count)]
    return primals + [f"tangents_{i + 1}" for i in range(tangents)]


def _detached(tensors: Tensors) -> Tensors:
    return [tensor.detach() for tensor in tensors]


def _copies(tensors: Tensors) -> Tensors:
    return [tensor.detach().clone() for tensor in tensors]


class _Tracer:
    """Traces one signature."""

    def __init__(
        self, flat: Callable[[Tensors], Any], tensors: Tensors, tracked: "list[bool]"
    ) -> None:
        self.flat = flat
        self.tensors = tensors
        self.tracked = tracked

    def forward(self) -> _Forward:
        told: "list[Any]" = []

        def run(values: Tensors) -> "tuple[list[Any], int]":
            self._track(values)
            leaves, spec = _pytree.flatten(self.flat(values))
            tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
            told[:] = [
                [None if isinstance(leaf, torch.Tensor) else (leaf,) for leaf in leaves],
                spec,
                [(t.shape, t.dtype, t.device, t.requires_grad) for t in tensors],
                [v.requires_grad and not tracked for v, tracked in zip(values, self.tracked)],
            ]
            return leaves, len(leaves)

        graph = _trace(run, _detached(self.tensors), _names(len(self.tensors)))
        return _Forward(graph, *told)

    def joint(
        self, outputs: "list[int]", tracked: "list[int]", tangents: Tensors
    ) -> "tuple[_C.Graph, list[bool]]":
        """The graph of these outputs and, after them, the gradients by which there are any."""
        has_gradient: "list[bool]" = []

        def run(values: Tensors) -> "tuple[list[Any], int]":
            primals, given = values[: len(self.tensors)], values[len(self.tensors) :]
            self._track(primals)
            found = _pytree.flatten(self.flat(primals))[0]
            tensors = [leaf for leaf in found if isinstance(leaf, torch.Tensor)]
            wanted = [p for p, is_tracked in zip(primals, self.tracked) if is_tracked]
            with torch._C._DisableAutocast():
                grads = torch.autograd.grad(
                    [tensors[i] for i in tracked], wanted, given, allow_unused=True
                )
            has_gradient[:] = [grad is not None for grad in grads]
            kept = [tensors[i] for i in outputs] + [grad for grad in grads if grad is not None]
            return kept, len(kept)

        tensors = _detached(self.tensors) + tangents
        graph = _trace(run, tensors, _names(len(self.tensors), len(tangents)))
        return graph, has_gradient

    def _track(self, values: Tensors) -> None:
        for value, tracked in zip(values, self.tracked):
            if tracked:
                value.requires_grad_()


def _decomposed(
    module: "torch.fx.GraphModule", table: Any, tensors: Tensors, names: "list[str]"
) -> "torch.fx.GraphModule":
    table = {**_decomposition.current(), **(table or {})}

    def retrace(run: Callable[..., Any]) -> "torch.fx.GraphModule":
        def leaves(values: Tensors) -> "tuple[list[Any], int]":
            found = list(run(*values))
            return found, len(found)

        graph = _trace(leaves, _detached(tensors), names)
        graph.functionalize()
        return graph_module(graph, names)

    return _decomposition.apply(module, table, retrace)


# --- one signature, compiled -----------------------------------------------------------------------


@dataclass
class _Compiled:
    """Runs one signature."""

    out_leaves: "list[Any]"
    out_spec: Any
    frame: Frame
    forward: Callable[..., Any]
    writes_inside: bool = False
    # For the backward pass:
    backward: "Callable[..., Any] | None" = None
    tracked_inputs: "list[int]" = field(default_factory=list)
    tracked_outputs: "list[int]" = field(default_factory=list)  # among those of the forward graph
    has_gradient: "list[bool]" = field(default_factory=list)

    def __call__(self, tensors: Tensors) -> Any:
        self.frame.check_aliases(tensors)
        if self.backward is None:
            with torch.no_grad(), torch._C._DisableAutocast():
                found = call(self.forward, [tensor.detach() for tensor in tensors])
        else:
            found = list(_Call.apply(self, *tensors))
        rest = iter(self.frame.finish(tensors, found, self.writes_inside))
        leaves = [next(rest) if leaf is None else leaf[0] for leaf in self.out_leaves]
        return self.out_spec.unflatten(leaves)


class _Call(torch.autograd.Function):
    """The forward module, whose gradient is the backward module."""

    @staticmethod
    def forward(ctx: Any, compiled: _Compiled, *tensors: torch.Tensor) -> Any:
        with torch._C._DisableAutocast():
            found = call(compiled.forward, [tensor.detach() for tensor in tensors])
        count = len(compiled.frame.order)
        outputs, saved = found[:count], found[count:]
        written = {tensors[i].untyped_storage().data_ptr() for i in compiled.frame.updates}
        ctx.compiled = compiled
        # What is about to be written over is saved as it is now.
        ctx.save_for_backward(
            *(t.clone() if t.untyped_storage().data_ptr() in written else t for t in saved)
        )
        tracked = set(compiled.tracked_outputs)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(outputs) if i not in tracked))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "[aot_function] with create_graph=True the gradient would have to be differentiable, "
                "but the backward pass is a compiled graph. Differentiate inside: "
                "aot_function(torchlift.grad(f), ...), or use the function itself."
            )
        compiled = ctx.compiled
        # The graph was traced for dense tangents in the order of their dims.
        tangents = [grads[i].to_dense().contiguous() for i in compiled.tracked_outputs]
        with torch.no_grad(), torch._C._DisableAutocast():
            found = iter(call(compiled.backward, [*ctx.saved_tensors, *tangents]))
        gradients: "list[Any]" = [None] * (len(ctx.needs_input_grad) - 1)
        for i, given in zip(compiled.tracked_inputs, compiled.has_gradient):
            gradients[i] = next(found) if given else None
        return (None, *gradients)


class _Compile:
    """Compiles one signature."""

    def __init__(self, config: _Config, tracer: _Tracer, what: str) -> None:
        self.config = config
        self.tracer = tracer
        self.what = what
        self.told = tracer.forward()
        self._refuse_captured()
        self.frame = Frame("aot_function", self.told.graph)
        self._refuse_state()
        self._refuse_writes()

    def run(self) -> _Compiled:
        tracked = [i for i in self.frame.computed if self.told.kinds[i][3]]
        return self._with_gradients(tracked) if tracked else self._without_gradients()

    # --- what is refused ---------------------------------------------------------------------------

    def _refuse_captured(self) -> None:
        if not torch.is_grad_enabled():
            return
        for name, tensor in self.told.graph.constants():
            if tensor.requires_grad:
                raise UnsupportedError(
                    f"[aot_function] {self.what} uses {describe(tensor)} that requires a gradient "
                    f"and is none of its arguments, so that its gradient would be lost. Pass it as "
                    f"an argument; for a module use aot_module."
                )

    def _refuse_state(self) -> None:
        if self.frame.state:
            raise UnsupportedError(
                f"[aot_function] {self.what} writes into {describe(self.frame.state[0])}, which is none "
                f"of its arguments. Pass it as an argument; for a module use aot_module."
            )

    def _refuse_writes(self) -> None:
        for i in self.frame.updates:
            if self.tracer.tracked[i]:
                raise UnsupportedError(
                    f"[aot_function] {self.what} writes into tensor {i} of its arguments, which "
                    f"requires a gradient. Write into a copy (x = x.clone()), or pass x.detach()."
                )
            if self.told.tracked_writes[i]:
                raise UnsupportedError(
                    f"[aot_function] {self.what} writes something that depends on arguments which "
                    f"require gradients into tensor {i} of its arguments. Write value.detach(), or "
                    f"return the value."
                )

    # --- the two kinds -----------------------------------------------------------------------------

    def _without_gradients(self) -> _Compiled:
        tensors = self.tracer.tensors
        names = _names(len(tensors))
        module = _decomposed(self.frame.module(names), self.config.decompositions, tensors, names)
        inside = self.config.keep_inference_input_mutations and bool(self.frame.updates)
        if inside:
            self._write_inside(module)
        with _context.compiling(self.config.aot_id, "inference"):
            forward = self.config.inference_compiler(module, _copies(tensors))
        return self._compiled(forward, writes_inside=inside)

    def _write_inside(self, module: "torch.fx.GraphModule") -> None:
        """The graph itself copies what is to be written into its inputs."""
        output = module.graph.output_node()
        holders = [node for node in module.graph.nodes if node.op == "placeholder"]
        results = list(output.args[0])
        with module.graph.inserting_before(output):
            for i, value in zip(self.frame.updates, results):
                module.graph.call_function(torch.ops.aten.copy_.default, (holders[i], value))
        output.args = (results[len(self.frame.updates) :],)
        module.recompile()

    def _with_gradients(self, tracked: "list[int]") -> _Compiled:
        tensors = self.tracer.tensors
        kinds = [self.told.kinds[i] for i in tracked]
        tangents = [torch.zeros(size, dtype=d, device=where) for size, d, where, _ in kinds]
        graph, has_gradient = self.tracer.joint(self.frame.computed, tracked, tangents)
        count, updates, _ = graph.functionalize()
        names = _names(len(tensors), len(tangents))
        module = graph_module(graph, names)
        update_of = dict(updates)
        written = [update_of[i] for i in self.frame.updates]
        outputs = self.frame.outputs
        shared = {k for k, i in enumerate(self.frame.computed) if outputs[i].shared}
        reorder_outputs(module, written + list(range(count)), shared)
        module = _decomposed(module, self.config.decompositions, tensors + tangents, names)
        inputs = (_copies(tensors), tangents)
        propagate(module, [*inputs[0], *inputs[1]])
        forward, backward = self._partition(module, inputs, len(self.frame.order))
        with _context.compiling(self.config.aot_id, "forward"):
            compiled_forward = self.config.fw_compiler(forward, inputs[0])
        with _context.compiling(self.config.aot_id, "backward"):
            compiled_backward = self.config.bw_compiler(backward, self._saved_like(backward))
        return self._compiled(
            compiled_forward,
            backward=compiled_backward,
            tracked_inputs=[i for i, is_tracked in enumerate(self.tracer.tracked) if is_tracked],
            tracked_outputs=[len(written) + outputs[i].place for i in tracked],
            has_gradient=has_gradient,
        )

    def _partition(self, module: "torch.fx.GraphModule", inputs: Any, outputs: int) -> Any:
        params = list(range(self.config.num_params_buffers))
        extra = {"static_lifetime_input_indices": params} if params else {}
        return self.config.partition_fn(module, inputs, num_fwd_outputs=outputs, **extra)

    def _saved_like(self, backward: "torch.fx.GraphModule") -> "list[Any]":
        device = self.tracer.tensors[0].device
        holders = [node for node in backward.graph.nodes if node.op == "placeholder"]
        return [example_of(value_of(node), device) for node in holders]

    def _compiled(self, forward: Callable[..., Any], **more: Any) -> _Compiled:
        return _Compiled(self.told.out_leaves, self.told.out_spec, self.frame, forward, **more)


# --- functions -------------------------------------------------------------------------------------


class _AotFunction:
    """fn, compiled for each signature that it is called with."""

    def __init__(
        self, fn: Callable[..., Any], config: _Config, state: "Callable[[], Any] | None" = None
    ) -> None:
        self._fn = fn
        self._config = config
        self._state = state or (lambda: None)
        self._cache: "OrderedDict[Any, _Compiled]" = OrderedDict()
        self._lock = threading.RLock()
        wraps(fn)(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _C.open_levels() or _C.forward_mode_open():
            return self._fn(*args, **kwargs)
        leaves, spec = _pytree.flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        return self.compiled_for(leaves, spec, tensors)(tensors)

    def compiled_for(self, leaves: "list[Any]", spec: Any, tensors: Tensors) -> _Compiled:
        keys = tuple(leaf_key("aot_function", leaf) for leaf in leaves)
        tracked = tuple(tensor.requires_grad for tensor in tensors)
        key = (spec, keys, tracked, mode_key(), self._state())
        with self._lock:
            compiled = self._cache.get(key)
            if compiled is None:
                compiled = self._compile(leaves, spec, tensors)
                self._cache[key] = compiled
                if len(self._cache) > _CACHE_SIZE:
                    self._cache.popitem(last=False)
            self._cache.move_to_end(key)
        return compiled

    def _compile(self, leaves: "list[Any]", spec: Any, tensors: Tensors) -> _Compiled:
        fn, is_tensor = self._fn, [isinstance(leaf, torch.Tensor) for leaf in leaves]

        def flat(values: Tensors) -> Any:
            rest = iter(values)
            given = [next(rest) if tensor else leaf for tensor, leaf in zip(is_tensor, leaves)]
            args, kwargs = spec.unflatten(given)
            return fn(*args, **kwargs)

        tracked = [t.requires_grad and torch.is_grad_enabled() for t in tensors]
        tracer = _Tracer(flat, tensors, tracked)
        return _Compile(self._config, tracer, function_name(fn)).run()


def _config(
    fw_compiler: Compiler,
    bw_compiler: "Compiler | None",
    partition_fn: Callable[..., Any],
    decompositions: Any,
    num_params_buffers: int,
    keep_inference_input_mutations: bool,
    inference_compiler: "Compiler | None",
) -> _Config:
    for name, compiler in (("fw_compiler", fw_compiler), ("partition_fn", partition_fn)):
        if not callable(compiler):
            raise TransformError(
                f"[aot_function] {name} must be a function, got {describe(compiler)}. "
                f"torchlift.compile.nop is the simplest compiler."
            )
    return _Config(
        fw_compiler,
        bw_compiler or fw_compiler,
        inference_compiler or fw_compiler,
        partition_fn,
        decompositions,
        num_params_buffers,
        keep_inference_input_mutations,
        _context.next_aot_id(),
    )


def aot_function(
    fn: Callable[..., Any],
    fw_compiler: Compiler,
    bw_compiler: "Compiler | None" = None,
    partition_fn: Callable[..., Any] = default_partition,
    decompositions: "dict[Any, Callable[..., Any]] | None" = None,
    num_params_buffers: int = 0,
    keep_inference_input_mutations: bool = False,
    inference_compiler: "Compiler | None" = None,
    *,
    dynamic: bool = False,
    enable_log: bool = True,
    disable_functionalization: bool = False,
) -> Callable[..., Any]:
    """A function whose forward and backward passes are compiled graphs.

    Args:
        fn: a function of pytrees, with any transforms inside.
        fw_compiler: a function of (a torch.fx.GraphModule of plain operators, example inputs) that
            gives a function of those inputs: the outputs, and what is saved for the backward pass.
        bw_compiler: the same for the backward pass; fw_compiler if None.
        partition_fn: cuts the joint graph in two: default_partition, or
            min_cut_rematerialization_partition.
        decompositions: for operators, functions that take their place in the graphs.
        num_params_buffers: that many tensors, the first ones, are kept in any case.
        keep_inference_input_mutations: graphs for inference write into their inputs themselves.
        inference_compiler: for calls that need no gradients; fw_compiler if None.
        dynamic, disable_functionalization: must be False.
        enable_log: for functorch's signature; without meaning.

    Returns:
        A function like `fn`. It compiles anew for arguments of other structure, shapes, strides,
        dtypes, devices, numbers, or that require other gradients. Under a transform, it is `fn`.

    Raises:
        UnsupportedError: for what a graph cannot say (see `torchlift.trace`); writes into an
            argument that requires a gradient; captured tensors that require one.

    >>> import torch
    >>> from torchlift.compile import aot_function, print_compile
    >>> f = aot_function(torch.sin, print_compile)
    >>> x = torch.zeros(3, requires_grad=True)
    >>> f(x).sum().backward()  # doctest: +ELLIPSIS
    <BLANKLINE>
    ...
    def forward(self, primals_1):
        sin_default = torch.ops.aten.sin.default(primals_1)
        return [sin_default, primals_1]
    ...
    def forward(self, primals_1, tangents_1):
    ...
    >>> x.grad
    tensor([1., 1., 1.])
    """
    if dynamic or disable_functionalization:
        raise UnsupportedError(
            "[aot_function] dynamic=True and disable_functionalization=True are not supported. "
            "Leave them out: the function is compiled for each shape, without writes."
        )
    if isinstance(fn, torch.nn.Module):
        raise TransformError(
            "[aot_function] got a module, whose parameters are no arguments. Use aot_module."
        )
    return _AotFunction(
        fn,
        _config(
            fw_compiler,
            bw_compiler,
            partition_fn,
            decompositions,
            num_params_buffers,
            keep_inference_input_mutations,
            inference_compiler,
        ),
    )


def _of_module(mod: torch.nn.Module, *args: Any, **kwargs: Any) -> _AotFunction:
    def call_module(state: "dict[str, torch.Tensor]", args: Any, kwargs: Any) -> Any:
        return functional_call(mod, state, args, kwargs)

    call_module.__name__ = type(mod).__name__
    kwargs.setdefault("num_params_buffers", len(module_state(mod) or {}))
    compiled = aot_function(call_module, *args, **kwargs)
    assert isinstance(compiled, _AotFunction)
    compiled._state = lambda: module_key(mod)
    return compiled


class AOTModule(torch.nn.Module):
    """What `aot_module` returns."""

    def __init__(self, mod: torch.nn.Module, compiled: _AotFunction) -> None:
        super().__init__()
        self.orig_module = mod
        self._compiled = compiled

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(module_state(self.orig_module), args, kwargs)


def aot_module(mod: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """A module whose forward and backward passes are compiled graphs.

    Parameters and buffers are inputs of the graphs; buffers that the module writes (BatchNorm's
    running statistics) are written back after each call.

    Args:
        mod: the module. The result holds it as `orig_module`, and shares its parameters.
        args, kwargs: as in `aot_function`.

    >>> import torch
    >>> from torchlift.compile import aot_module, nop
    >>> model = torch.nn.Linear(3, 2)
    >>> compiled = aot_module(model, nop)
    >>> compiled(torch.ones(5, 3)).sum().backward()
    >>> model.bias.grad
    tensor([5., 5.])
    """
    if not isinstance(mod, torch.nn.Module):
        raise TransformError(
            f"[aot_module] got {describe(mod)} in place of a torch.nn.Module. Use aot_function."
        )
    return AOTModule(mod, _of_module(mod, *args, **kwargs))


def aot_module_simplified(
    mod: torch.nn.Module,
    args: "Sequence[Any]",
    fw_compiler: Compiler,
    bw_compiler: "Compiler | None" = None,
    partition_fn: Callable[..., Any] = default_partition,
    decompositions: "dict[Any, Callable[..., Any]] | None" = None,
    keep_inference_input_mutations: bool = False,
    inference_compiler: "Compiler | None" = None,
) -> Callable[..., Any]:
    """The module compiled for arguments like `args`, at once, as a function of such arguments.

    Args:
        mod: the module, whose parameters and buffers are the first inputs of the graphs.
        args: example arguments.
        fw_compiler, bw_compiler, partition_fn, decompositions, keep_inference_input_mutations,
            inference_compiler: as in `aot_function`.

    >>> import torch
    >>> from torchlift.compile import aot_module_simplified, nop
    >>> model = torch.nn.Linear(3, 2)
    >>> f = aot_module_simplified(model, [torch.ones(5, 3)], nop)
    >>> f(torch.ones(5, 3)).shape
    torch.Size([5, 2])
    """
    compiled = _of_module(
        mod,
        fw_compiler,
        bw_compiler,
        partition_fn,
        decompositions,
        keep_inference_input_mutations=keep_inference_input_mutations,
        inference_compiler=inference_compiler,
    )
    leaves, spec = _pytree.flatten(((module_state(mod), tuple(args), {}), {}))
    compiled.compiled_for(leaves, spec, [t for t in leaves if isinstance(t, torch.Tensor)])

    def forward(*runtime_args: Any, **kwargs: Any) -> Any:
        return compiled(module_state(mod), runtime_args, kwargs)

    forward.zero_grad = mod.zero_grad  # type: ignore[attr-defined]
    forward.named_parameters = mod.named_parameters  # type: ignore[attr-defined]
    forward.named_buffers = mod.named_buffers  # type: ignore[attr-defined]
    return forward


compiled_function = aot_function
compiled_module = aot_module
