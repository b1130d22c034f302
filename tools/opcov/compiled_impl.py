"""torchlift's transforms, traced: what opcov runs with --compiled.

The outermost transform is run as a user would run it, then traced and replayed after all passes, on
the same arguments. The two must agree to the last bit but for what another order of the same
operations rounds; what is returned, and compared with the references, is the replay's result. The trace
is saved and loaded, too, and what comes back must compute the same to the last bit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchlift
from torch.utils._pytree import tree_leaves, tree_map
from torchlift import _C

from opcov.derivatives import Mismatch


def copies(args: Any) -> Any:
    """What an operator writes into its arguments is written into copies."""
    return tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)


def parts(t: torch.Tensor) -> list[torch.Tensor]:
    """Strided tensors that tell what it is."""
    if t.layout == torch.strided:
        return [t]
    coo = t.coalesce()
    return [coo.indices(), coo.values()]


def alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether they are of one kind, with as many elements."""
    if (a.shape, a.dtype, a.layout) != (b.shape, b.dtype, b.layout):
        return False
    return all(x.shape == y.shape for x, y in zip(parts(a), parts(b), strict=True))


def kind(t: torch.Tensor) -> str:
    layout = "" if t.layout == torch.strided else f" {t.layout}, {t._nnz()} elements"
    return f"{t.dtype} {list(t.shape)}{layout}"


def compare(eager: Any, replayed: Any) -> None:
    for expected, got in zip(tree_leaves(eager), tree_leaves(replayed), strict=True):
        if not isinstance(expected, torch.Tensor):
            continue
        if not alike(expected, got):
            raise Mismatch(f"replayed: {kind(got)}, eager: {kind(expected)}")
        for a, b in zip(parts(got), parts(expected), strict=True):
            if not torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True):
                raise Mismatch("the replay differs from the eager result")


def agrees(a: Any, b: Any) -> bool:
    try:
        compare(a, b)
    except Mismatch:
        return False
    return True


def saved_and_loaded(graph: _C.Graph) -> _C.Graph:
    inputs = [("tensor", f"input{i}", None) for i in range(len(graph.inputs()))]
    outputs = [("none" if each is None else "tensor", "", None) for each in graph.outputs()]
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "graph.tlc")
        artifact = _C.make_artifact(graph, ("tuple", "", inputs), ("tuple", "", outputs), "row", None)
        _C.save_artifact(artifact, path)
        return _C.load_artifact(path).graph


def bits(t: torch.Tensor) -> torch.Tensor:
    # Into memory of its own: one number may have any stride, and a conjugate view no bits.
    return torch.empty(t.numel(), dtype=t.dtype).copy_(t.flatten()).view(torch.uint8)


def equal(a: list[Any], b: list[Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        if x is y:
            return True
        return alike(x, y) and all(torch.equal(bits(p), bits(q)) for p, q in zip(parts(x), parts(y), strict=True))

    return all(same(x, y) for x, y in zip(a, b, strict=True))


def check_round_trip(graph: _C.Graph, inputs: list[torch.Tensor]) -> None:
    program = _C.Program(graph)
    before = program.run(copies(inputs), 0)
    after = _C.Program(saved_and_loaded(graph)).run(copies(inputs), 0)
    # What returns memory that nobody wrote (empty_like) does not even agree with itself.
    if not equal(before, after) and equal(before, program.run(copies(inputs), 0)):
        raise Mismatch("the saved and loaded graph computes something else")


def replayed(function: Callable[..., Any], args: Sequence[Any]) -> Any:
    if _C.open_levels() or any(isinstance(a, torch.Tensor) and a.requires_grad for a in tree_leaves(args)):
        return function(*args)  # Inside of another transform.
    start = torch.get_rng_state()

    def again(run: Callable[[], Any]) -> Any:
        torch.set_rng_state(start)  # of the numbers that the harness wants
        return run()

    def eager() -> Any:
        return function(*copies(args))

    expected = again(eager)
    traced = again(lambda: torchlift.trace(function)(*args))
    inputs = [a for a in tree_leaves(args) if isinstance(a, torch.Tensor)]
    check_round_trip(traced.graph, inputs)
    result = again(lambda: traced.rebuild(traced.optimized().run(copies(inputs))))
    try:
        compare(expected, result)
    except Mismatch:
        if agrees(expected, again(eager)):
            raise
    return result


def traced(transform: Callable[..., Any]) -> Callable[..., Any]:
    """A transform that returns a function, whose calls are traced."""

    def of_function(*transform_args: Any, **options: Any) -> Callable[..., Any]:
        function = transform(*transform_args, **options)
        return lambda *args: replayed(function, args)

    return of_function


vmap = traced(torchlift.vmap)
grad = traced(torchlift.grad)
jacrev = traced(torchlift.jacrev)
jacfwd = traced(torchlift.jacfwd)


def jvp(function: Callable[..., Any], primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    return replayed(lambda p, t: torchlift.jvp(function, p, t), (primals, tangents))


def vjp(function: Callable[..., Any], *primals: Any) -> Any:
    if _C.open_levels():
        return torchlift.vjp(function, *primals)
    start = torch.get_rng_state()
    output = replayed(lambda *p: torchlift.vjp(function, *p)[0], primals)

    def pullback(cotangents: Any) -> Any:
        torch.set_rng_state(start)  # the function runs again, and is to draw the same
        return replayed(lambda p, c: torchlift.vjp(function, *p)[1](c), (primals, cotangents))

    return output, pullback


# The fallback is counted for torchlift's own name.
reset_fallback_report = torchlift.reset_fallback_report
fallback_report = torchlift.fallback_report
