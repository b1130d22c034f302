"""jit: traces a function on its first call, and replays the graph from then on.

NOTE [when jit replays]
A graph holds what a function computes, not how it is to be differentiated or batched (a custom_vjp
inside is gone). So a call replays a graph where nobody asks for more than values: outside of other
transforms, on tensors that autograd does not track. Where a transform is at work, or an argument
requires a gradient, the function itself is called, as if jit were not there, and everything nests:
`grad(jit(f))` is `grad(f)`. What is to be fast goes inside: `jit(grad(f))`.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Callable

import torch

from torchlift import _C, _pytree
from torchlift._errors import TransformError
from torchlift._names import function_name, wraps
from torchlift._trace import Traced, dynamic_dims, trace_call


@dataclass(frozen=True)
class CacheInfo:
    """What the cache of a jit function has done.

    Attributes:
        hits: calls that found a graph.
        misses: calls that traced one.
        direct: calls that ran the function itself (under a transform, or tracked by autograd).
        evicted: graphs that were dropped since the cache was full.
        size: graphs in the cache.
        max_size: how many it holds.
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
        self._cache: "OrderedDict[Any, Any]" = OrderedDict()
        self._lock = threading.Lock()
        self._counters = _Counters()
        wraps(func)(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = _pytree.flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if _C.open_levels() or _C.forward_mode_open() or _needs_autograd(tensors):
            self._counters.direct += 1
            return self._func(*args, **kwargs)
        if self._dynamic:
            tensors, leaf_keys = self._dynamic_keys(args, kwargs)
        else:
            leaf_keys = tuple(_leaf_key(leaf) for leaf in leaves)
        key = (spec, leaf_keys, torch.is_autocast_enabled("cpu"))
        with self._lock:
            program = self._cache.get(key)
            if program is not None:
                self._cache.move_to_end(key)
                self._counters.hits += 1
        if program is None:
            program = self._compile(key, args, kwargs)
        traced, run = program
        return traced.rebuild(run(tensors))

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
                keys.append(_leaf_key(leaf))
                continue
            any_size = of_tensor.get(len(tensors))
            tensors.append(leaf.contiguous() if any_size else leaf)
            if any_size:
                shape = tuple("any" if d in any_size else n for d, n in enumerate(leaf.shape))
                keys.append((leaf.dtype, shape, (), leaf.device))
            else:
                keys.append(_leaf_key(leaf))
        return tensors, tuple(keys)

    def _compile(self, key: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> Any:
        traced = trace_call("jit", self._func, args, kwargs, self._dynamic)
        program = (traced, _compiled(traced, self._backend))
        with self._lock:
            self._counters.reasons.append(self._reason(key))
            self._counters.misses += 1
            self._cache[key] = program
            while len(self._cache) > self._max_size:
                self._cache.popitem(last=False)
                self._counters.evicted += 1
        return program

    def _reason(self, key: Any) -> str:
        """How a call differs from the latest one that was traced."""
        if not self._cache:
            return "the first call"
        spec, leaves, autocast = key
        known_spec, known_leaves, known_autocast = next(reversed(self._cache))
        if spec != known_spec:
            return "the arguments have another structure"
        if autocast != known_autocast:
            return "autocast was switched on or off"
        for i, (new, old) in enumerate(zip(leaves, known_leaves)):
            if new != old:
                return f"leaf {i} of the arguments is {_key_text(new)}; it was {_key_text(old)}"
        return "the graph had been evicted from the cache"

    def cache_info(self) -> CacheInfo:
        """Counts hits and misses."""
        counters = self._counters
        return CacheInfo(
            hits=counters.hits,
            misses=counters.misses,
            direct=counters.direct,
            evicted=counters.evicted,
            size=len(self._cache),
            max_size=self._max_size,
        )

    def cache_clear(self) -> None:
        """Forgets all graphs."""
        with self._lock:
            self._cache.clear()

    def explain(self) -> "list[str]":
        """Why each graph was traced, in order: how the call differed from the one before."""
        return list(self._counters.reasons)

    def graphs(self) -> "list[Traced]":
        """The graphs in the cache, the one used last at the end."""
        with self._lock:
            return [traced for traced, _ in self._cache.values()]

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
    signature is traced anew.

    Args:
        func: a function of pytrees, with any transforms inside. It must compute the same each time:
            Python side effects happen while it is traced, only; tensors that it captures are
            constants (changed in place, they are seen changed).
        backend: what runs the graph. "eager": libtorch's kernels, called from C++. "inductor":
            torch's Inductor. Or a function of (a torch.fx.GraphModule, example inputs) that returns
            a function of the inputs, which gives a list of tensors.
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
    if not callable(backend) and backend not in _BACKENDS:
        raise TransformError(
            f"[jit] there is no backend {backend!r}. Use one of {sorted(_BACKENDS)}, or a function."
        )
    return JitFunction(func, backend, cache_size, dynamic)


def _needs_autograd(tensors: "list[torch.Tensor]") -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _leaf_key(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return (leaf.dtype, leaf.shape, leaf.stride(), leaf.device)
    try:
        hash(leaf)
    except TypeError:
        raise TransformError(
            f"[jit] an argument holds a {type(leaf).__name__}, which cannot be hashed, so that it "
            f"cannot be known whether it is the same in the next call. Pass tensors, numbers or "
            f"strings, or let the function capture it."
        ) from None
    return (type(leaf), leaf)


def _key_text(key: Any) -> str:
    if len(key) == 4:
        return f"a tensor of shape {list(key[1])}, strides {list(key[2])}, {key[0]}, on {key[3]}"
    return repr(key[1])


def _run_eager(traced: Traced) -> "Callable[[list[torch.Tensor]], list[torch.Tensor]]":
    return traced.optimized().run


def _run_inductor(traced: Traced) -> "Callable[[list[torch.Tensor]], list[torch.Tensor]]":
    from torch._inductor.compile_fx import compile_fx

    return _run_callable(traced, compile_fx)


_BACKENDS = {"eager": _run_eager, "inductor": _run_inductor}


def _compiled(
    traced: Traced, backend: "str | Callable[..., Any]"
) -> "Callable[[list[torch.Tensor]], list[torch.Tensor]]":
    if callable(backend):
        return _run_callable(traced, backend)
    return _BACKENDS[backend](traced)


def _run_callable(
    traced: Traced, backend: "Callable[..., Any]"
) -> "Callable[[list[torch.Tensor]], list[torch.Tensor]]":
    module, examples = traced.graph_module(), traced.example_inputs()
    compiled = backend(module, examples)
    return lambda tensors: list(compiled(*tensors))
