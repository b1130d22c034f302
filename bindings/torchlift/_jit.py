"""jit: traces a function on its first call, and replays the graph from then on.

NOTE [when jit replays]
A graph holds what a function computes, not how it is to be differentiated or batched (a custom_vjp
inside is gone). So a call replays a graph where nobody asks for more than values: outside of other
transforms, on tensors that autograd does not track. Where a transform is at work, or an argument
requires a gradient, the function itself is called, as if jit were not there, and everything nests:
`grad(jit(f))` is `grad(f)`. What is to be fast goes inside: `jit(grad(f))`.

NOTE [modules in jit]
The parameters and buffers of a module are inputs of its graphs, so that an optimizer's step is seen.
Tensors that a function captures are constants; those that it writes into are written by each run
(NOTE [state] in compile/captured_state.h). If autograd is on and one of them requires a gradient,
the function itself is called, so that its gradient is not lost.

NOTE [graphs for other numbers]
The graph of an operator whose result has a shape that depends on numbers (x[mask], nonzero, unique) is
right for as many elements as there were when it was traced, and checks that. Where a call has another
number, the run stops, with nothing written and no random numbers drawn, and the graph for that number
is taken, or traced. The answers that a graph assumes lie beside its key in the cache, and those that a
failed run has found tell which of the graphs may be the right one (NOTE [answers] in
compile/assumptions.h). _MAX_GRAPHS_OF_NUMBERS are kept for one key; then the calls that none of them
fits run the function itself, as do, from then on, those of a key whose graph does not even fit
the arguments that it was traced with (a number that changes from step to step of a loop).
"""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._backends import find_backend
from torchlift._errors import AssumptionError, TransformError, UnsupportedError
from torchlift._functional import functional_call
from torchlift._graph_outputs import Frame, outputs_of
from torchlift._names import function_name, wraps
from torchlift._signature import leaf_key, mode_key, module_key, module_state
from torchlift._trace import Traced, dynamic_dims, trace_call


@dataclass(frozen=True)
class CacheInfo:
    """What the cache of a jit function has done.

    Attributes:
        hits: calls that found a graph.
        misses: calls that traced one.
        direct: calls that ran the function itself: under a transform, tracked by autograd, or with
            numbers of elements (x[mask], nonzero, unique) for which no graph is kept.
        evicted: graphs that were dropped since the cache was full.
        size: graphs in the cache.
        max_size: how many it holds.

    >>> import torch, torchlift
    >>> f = torchlift.jit(torch.sin)
    >>> for _ in range(3):
    ...     y = f(torch.zeros(2))
    >>> f.cache_info().hits, f.cache_info().misses
    (2, 1)
    """

    hits: int
    misses: int
    direct: int
    evicted: int
    size: int
    max_size: int


@dataclass
class _Counters:
    hits: int = 0
    misses: int = 0
    direct: int = 0
    evicted: int = 0
    reasons: "list[str]" = field(default_factory=list)


# How many graphs have a guard at once, those used last: each is tried in turn.
_MAX_GUARDS = 4


# How many graphs of one signature are kept that differ in the numbers they assume.
_MAX_GRAPHS_OF_NUMBERS = 16


@dataclass(eq=False)
class _Program:
    """A graph in the cache. run: None where the function itself is to be called."""

    key: Any
    traced: Traced
    run: "Run | None"
    answers: "tuple[tuple[int, ...], ...]"

    @property
    def place(self) -> "tuple[Any, Any]":
        """Its key in the cache: graphs of one signature differ in what they assume."""
        return self.key, self.answers

    def agrees(self, known: "tuple[tuple[int, ...], ...]") -> bool:
        return self.answers[: len(known)] == known


@dataclass
class _Guard:
    """The short way to the graph with this key."""

    key: Any
    guard: "_C.JitGuard"
    run: Any
    rebuild: Any
    noted: int = 0  # hits that the cache knows of


# The keyword by which a module's parameters and buffers go to its graphs.
_STATE = "torchlift_state"


class JitFunction:
    """What `jit` returns: call it as the function."""

    def __init__(
        self,
        func: Callable[..., Any],
        backend: "str | Callable[..., Any]",
        max_size: int,
        dynamic: "dict[Any, Any] | None",
    ) -> None:
        self._func = func
        self._dynamic = dynamic
        self._backend = backend
        self._max_size = max_size
        self._cache: "OrderedDict[Any, _Program]" = OrderedDict()
        # Of the keys whose graphs assume numbers, these graphs; the one used last at the end.
        self._of_numbers: "dict[Any, list[_Program]]" = {}
        self._unfit: "set[Any]" = set()  # keys whose graphs do not fit their own arguments
        self._lock = threading.Lock()
        self._counters = _Counters()
        self._module = func if isinstance(func, torch.nn.Module) else None
        self._guards: "tuple[_Guard, ...]" = ()
        self._guard_hits = _C.JitHits()
        wraps(func)(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            for guard in self._guards:
                outputs = guard.run(args)
                if outputs is not None:
                    return guard.rebuild(outputs)
        return self._look_up(args, kwargs)

    def _look_up(self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> Any:
        given, state = kwargs, module_state(self._func)
        if state is not None:
            kwargs = {**kwargs, _STATE: state}
        leaves, spec = _pytree.flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if _C.open_levels() or _C.forward_mode_open() or _needs_autograd(tensors):
            return self._call_directly(args, given)
        if self._dynamic:
            tensors, leaf_keys = self._dynamic_keys(args, kwargs)
        else:
            leaf_keys = tuple(leaf_key("jit", leaf) for leaf in leaves)
        key = (spec, leaf_keys, mode_key(), module_key(self._func))
        known: "tuple[tuple[int, ...], ...]" = ()
        reason = ""
        for program in self._candidates(key):
            if not program.agrees(known):
                continue
            if program.run is None:
                self._count_hit(program)
                return self._call_directly(args, given)
            try:
                result = self._run(program, args, given, tensors)
            except AssumptionError as error:
                known = program.answers[: error.number] + (tuple(error.found),)
                reason = _reason_of(error)
                continue
            self._count_hit(program)
            return result
        if not self._may_trace(key):
            return self._call_directly(args, given)
        program = None
        try:
            program = self._compile(key, args, kwargs, reason)
            if program.run is not None:
                return self._run(program, args, given, tensors)
        except AssumptionError:
            with self._lock:
                if len(self._unfit) >= self._max_size:
                    self._unfit.clear()
                self._unfit.add(key)
                if program is not None:
                    self._drop(program)
        return self._call_directly(args, given)

    def _candidates(self, key: Any) -> "list[_Program]":
        """The graphs for a key, the one used last first."""
        with self._lock:
            program = self._cache.get((key, ()))
            return [program] if program is not None else self._of_numbers.get(key, [])[::-1]

    def _may_trace(self, key: Any) -> bool:
        with self._lock:
            return key not in self._unfit and (
                len(self._of_numbers.get(key, ())) < _MAX_GRAPHS_OF_NUMBERS
            )

    def _count_hit(self, program: _Program) -> None:
        with self._lock:
            self._counters.hits += 1
            if program.place in self._cache:
                self._cache.move_to_end(program.place)
            same_key = self._of_numbers.get(program.key, [])
            if program in same_key:
                same_key.remove(program)
                same_key.append(program)

    def _run(
        self,
        program: _Program,
        args: "tuple[Any, ...]",
        given: "dict[str, Any]",
        tensors: "list[torch.Tensor]",
    ) -> Any:
        traced, run = program.traced, program.run
        assert run is not None
        if not self._dynamic and not given and self._is_alone(program):
            self._add_guard(program.place, traced, run, args, tensors)
        with torch._C._DisableAutocast():
            outputs = run(tensors)
        return traced.rebuild(outputs)

    def _is_alone(self, program: _Program) -> bool:
        """Whether it is the one graph of its signature. A guard would try one of several in vain."""
        if not program.answers:
            return True
        with self._lock:
            alone = len(self._of_numbers.get(program.key, ())) <= 1
            if not alone:
                self._note_guards()
                self._guards = tuple(old for old in self._guards if old.key[0] != program.key)
        return alone

    def _call_directly(self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> Any:
        with self._lock:
            self._counters.direct += 1
        return self._func(*args, **kwargs)

    def _add_guard(
        self, key: Any, traced: Traced, run: Any, args: "tuple[Any, ...]", tensors: "list[Any]"
    ) -> None:
        """See NOTE [guards of jit] in bindings/_C/jit_guard.h."""
        program = getattr(run, "__self__", None)
        if not isinstance(program, (_C.Program, _C.Executable)):
            return
        guard = _C.JitGuard.of(args, tensors, self._module, program, self._guard_hits)
        if guard is None:
            return
        with self._lock:
            kept = [old for old in self._guards if old.key != key][: _MAX_GUARDS - 1]
            self._guards = (_Guard(key, guard, guard.run, traced.rebuild), *kept)

    def _note_guards(self) -> None:
        """Lets the cache know which graphs were used by way of guards. To be called with the lock."""
        for guard in reversed(self._guards):
            hits = guard.guard.hits
            if hits > guard.noted and guard.key in self._cache:
                self._cache.move_to_end(guard.key)
            guard.noted = hits

    def _traceable(self) -> Callable[..., Any]:
        """The function, of the state too if it is a module."""
        func = self._func
        if not isinstance(func, torch.nn.Module):
            return func

        def call_module(*args: Any, **kwargs: Any) -> Any:
            state = kwargs.pop(_STATE)
            return functional_call(func, state, args, kwargs)

        return call_module

    def _dynamic_keys(
        self, args: "tuple[Any, ...]", kwargs: "dict[str, Any]"
    ) -> "tuple[list[torch.Tensor], tuple[Any, ...]]":
        """The tensors, those with dynamic dims contiguous; and the keys without these dims."""
        paths, leaves, _ = _pytree.flatten_with_path((args, kwargs))
        dims = dynamic_dims("jit", self._func, paths, leaves, self._dynamic)
        of_tensor: "dict[int, set[int]]" = {}
        for _, places in dims:
            for tensor, dim in places:
                of_tensor.setdefault(tensor, set()).add(dim)
        tensors: "list[torch.Tensor]" = []
        keys = []
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor):
                keys.append(leaf_key("jit", leaf))
                continue
            any_size = of_tensor.get(len(tensors))
            tensors.append(leaf.contiguous() if any_size else leaf)
            if any_size:
                shape = tuple("any" if d in any_size else n for d, n in enumerate(leaf.shape))
                keys.append((leaf.dtype, shape, (), leaf.device))
            else:
                keys.append(leaf_key("jit", leaf))
        return tensors, tuple(keys)

    def _compile(
        self, key: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]", reason: str
    ) -> _Program:
        """reason: how the numbers of the call differ from those of other graphs for the key."""
        with torch.random.fork_rng():  # The run that is recorded draws no numbers for the caller.
            traced = trace_call("jit", self._traceable(), args, kwargs, self._dynamic)
        run = None if _loses_gradients(traced) else _compiled(traced, self._backend)
        program = _Program(key, traced, run, _answers_of(traced))
        with self._lock:
            self._counters.reasons.append(reason or self._reason(key))
            self._counters.misses += 1
            self._note_guards()
            self._guards = ()
            self._drop(program)  # that another thread has put there
            self._cache[program.place] = program
            if program.answers:
                self._of_numbers.setdefault(key, []).append(program)
            while len(self._cache) > self._max_size:
                self._drop(next(iter(self._cache.values())))
                self._counters.evicted += 1
        return program

    def _drop(self, program: _Program) -> None:
        """Takes what is at the program's place out of the cache. To be called with the lock."""
        found = self._cache.pop(program.place, None)
        same_key = self._of_numbers.get(program.key, [])
        if found in same_key:
            same_key.remove(found)
        if not same_key:
            self._of_numbers.pop(program.key, None)

    def _reason(self, key: Any) -> str:
        """How a call differs from the latest one that was traced."""
        if not self._cache:
            return "the first call"
        spec, leaves, mode, training = key
        known_spec, known_leaves, known_mode, known_training = next(reversed(self._cache))[0]
        if spec != known_spec:
            return "the arguments have another structure"
        if training != known_training:
            return "the module was switched between train() and eval()"
        if mode[0] != known_mode[0]:
            return "autograd (no_grad) was switched on or off"
        if mode != known_mode:
            return "autocast was switched on or off"
        for i, (new, old) in enumerate(zip(leaves, known_leaves)):
            if new != old:
                return f"leaf {i} of the arguments is {_key_text(new)}; it was {_key_text(old)}"
        return "the graph had been evicted from the cache"

    def cache_info(self) -> CacheInfo:
        """Counts hits and misses."""
        counters = self._counters
        return CacheInfo(
            hits=counters.hits + self._guard_hits.count,
            misses=counters.misses,
            direct=counters.direct,
            evicted=counters.evicted,
            size=len(self._cache),
            max_size=self._max_size,
        )

    def cache_clear(self) -> None:
        """Forgets all graphs."""
        with self._lock:
            self._guards = ()
            self._cache.clear()
            self._of_numbers.clear()
            self._unfit.clear()

    def explain(self) -> "list[str]":
        """Why each graph was traced, in order: how the call differed from the one before."""
        return list(self._counters.reasons)

    def graphs(self) -> "list[Traced]":
        """The graphs in the cache, the one used last at the end."""
        with self._lock:
            self._note_guards()
            return [program.traced for program in self._cache.values()]

    def __repr__(self) -> str:
        return f"<torchlift.jit of {function_name(self._func)}: {len(self._cache)} graphs>"


def jit(
    func: "Callable[..., Any] | None" = None,
    *,
    backend: "str | Callable[..., Any]" = "eager",
    cache_size: int = 64,
    dynamic: "dict[Any, Any] | None" = None,
) -> Any:
    """Traces `func` when it is called first, and from then on runs the graph, without Python.

    The graph is cached by what the function could have looked at: the structure of the arguments,
    shapes, strides, dtypes and devices of tensors, and the values of everything else. Another
    signature is traced anew. So are other numbers of elements where a shape depends on numbers
    (x[mask], nonzero, unique, bincount, one_hot): a graph checks that it is for the numbers of the call.

    Args:
        func: a function of pytrees, with any transforms inside; or a module, whose parameters and
            buffers are inputs of the graph. It must compute the same each time:
            Python side effects happen while it is traced, only; tensors that it captures are
            constants (changed in place, they are seen changed, but in what the function computes
            of constants alone, such as the places of a captured mask). Those that it writes into, as a
            BatchNorm in training mode its running statistics, are written by each call, once.
        backend: what runs the graph. "eager": libtorch's kernels, called from C++. "inductor":
            torch's Inductor, which needs a C++ compiler; "ts": TorchScript. Or a function of (a
            torch.fx.GraphModule, example inputs) that returns a function of the inputs, which gives
            a list of tensors. See torchlift.compile.list_backends, register_backend.
        cache_size: how many graphs are kept, those used last.
        dynamic: dims that may have any size without a new trace, as in `trace`.

    Returns:
        A function like `func`, with cache_info(), cache_clear(), explain() and graphs().

    Under another transform, or on tensors that require a gradient, `func` itself is called: jit is
    for the outside, `jit(vmap(grad(f)))`.

    >>> import torch, torchlift
    >>> f = torchlift.jit(torchlift.vmap(torchlift.grad(lambda x: (x ** 3).sum())))
    >>> f(torch.ones(2, 3))
    tensor([[3., 3., 3.],
            [3., 3., 3.]])
    >>> f.cache_info().misses
    1
    """
    if func is None:
        return lambda decorated: jit(
            decorated, backend=backend, cache_size=cache_size, dynamic=dynamic
        )
    if not callable(func):
        raise TransformError(f"[jit] the function must be callable, got {type(func).__name__}.")
    if cache_size < 1:
        raise TransformError(f"[jit] cache_size must be at least 1, got {cache_size}.")
    find_backend(backend)
    return JitFunction(func, backend, cache_size, dynamic)


def _needs_autograd(tensors: "list[torch.Tensor]") -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _key_text(key: Any) -> str:
    if len(key) == 4:
        return f"a tensor of shape {list(key[1])}, strides {list(key[2])}, {key[0]}, on {key[3]}"
    return str(key[1]) if key[0] in (float, complex) else repr(key[1])


Run = Callable[["list[torch.Tensor]"], "list[Any]"]


def _loses_gradients(traced: Traced) -> bool:
    """Whether autograd would reach a tensor that the function captures."""
    return torch.is_grad_enabled() and any(t.requires_grad for _, t in traced.graph.constants())


def _compiled(traced: Traced, backend: "str | Callable[..., Any]") -> Run:
    found = find_backend(backend)
    return _run_eager(traced) if found is None else _run_backend(traced, found)


def _answers_of(traced: Traced) -> "tuple[tuple[int, ...], ...]":
    """What the graph assumes of numbers, in the order of the trace."""
    return tuple(tuple(answer) for answer in traced.graph.answers())


def _reason_of(error: AssumptionError) -> str:
    """"masked_select: the number of elements was 5 when the function was traced, and is 7 in this run"."""
    return str(error).removeprefix("[trace] ").partition(". ")[0]


def _run_eager(traced: Traced) -> Run:
    """The C++ replay. What the function writes into its arguments it writes there itself."""
    arguments = len(traced.graph.inputs())
    try:
        optimized = traced.optimized()
        if any(i < arguments for i, _ in optimized.updates()) or _returns_state(traced, optimized):
            return traced.program.run
    except UnsupportedError:  # Also of sizes that depend on dynamic dims, where views are looked at.
        return traced.program.run
    return optimized.run


def _returns_state(traced: Traced, optimized: "_C.Executable") -> bool:
    """Whether an output is a captured tensor that the function writes into, or a view of one."""
    state = optimized.state()
    return bool(state) and any(
        output.kind == "constant" and any(output.value is tensor for tensor in state)
        for output in outputs_of(traced.graph)
    )


def _run_backend(traced: Traced, backend: Callable[..., Any]) -> Run:
    """A backend of fx graphs, which have no writes."""
    from torchlift.compile._boxed import call

    frame = Frame("jit", traced.graph)
    if backend is find_backend("inductor"):
        frame.graph.simplify_for_compiler()
    module = frame.module([value.name for value in traced.graph.inputs()])
    compiled = backend(module, [*traced.example_inputs(), *(t.clone() for t in frame.state)])
    lock = threading.RLock() if frame.state else contextlib.nullcontext()

    def checked(tensors: "list[torch.Tensor]") -> "list[torch.Tensor]":
        tensors = frame.inputs(tensors)
        frame.check_aliases(tensors)
        return tensors

    def finished(tensors: "list[torch.Tensor]") -> "list[Any]":
        with lock:
            return frame.finish(tensors, call(compiled, list(tensors), ours_only=True))

    def run(tensors: "list[torch.Tensor]") -> "list[Any]":
        return finished(checked(tensors))

    def run_or_tell(tensors: "list[torch.Tensor]") -> "list[Any]":
        """The error of a check in what the backend has made does not say what it found."""
        given = checked(tensors)
        generators = _generator_states(tensors)
        try:
            return finished(given)
        except RuntimeError:
            for generator, state in generators:
                generator.set_state(state)
            # It writes into its arguments and the state.
            with lock, torch.random.fork_rng(), _unchanged(frame.state):
                traced.program.run([tensor.clone() for tensor in tensors])
            raise

    return run_or_tell if _answers_of(traced) else run


@contextlib.contextmanager
def _unchanged(tensors: "list[torch.Tensor]") -> "Iterator[None]":
    """Puts back what they held."""
    held = [tensor.clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, before in zip(tensors, held):
                tensor.copy_(before)


def _generator_states(tensors: "list[torch.Tensor]") -> "list[tuple[torch.Generator, Any]]":
    devices = {tensor.device.index for tensor in tensors if tensor.is_cuda}
    generators = [torch.default_generator]
    generators += [torch.cuda.default_generators[index] for index in devices]
    return [(generator, generator.get_state()) for generator in generators]
