"""check_grads: derivatives against finite differences."""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _pytree
from torchlift._errors import TransformError
from torchlift._forward import jvp
from torchlift._grad import vjp
from torchlift._names import function_name


def check_grads(
    func: Callable[..., Any],
    args: "tuple[Any, ...]",
    order: int = 1,
    modes: "tuple[str, ...]" = ("fwd", "rev"),
    *,
    eps: "float | None" = None,
    atol: "float | None" = None,
    rtol: "float | None" = None,
    seed: int = 0,
) -> None:
    """Raises AssertionError unless the derivatives of `func` at args agree with finite differences.

    Args:
        func: a function of tensors or pytrees of tensors, which returns the like; smooth at args.
        args: a tuple of its arguments. float64 makes for a sharp test.
        order: up to which derivative; the second is checked as the first of the first.
        modes: "fwd" checks jvp along a random direction; "rev" checks that vjp is its transpose
            (by an inner product with a random cotangent).
        eps, atol, rtol: the step, and the tolerances; by dtype if left out.
        seed: of the random directions.

    >>> import torch, torchlift
    >>> x = torch.tensor([0.3, 0.7], dtype=torch.float64)
    >>> torchlift.check_grads(lambda x: x.sin().prod(), (x,), order=2)
    """
    unknown = [mode for mode in modes if mode not in ("fwd", "rev")]
    if unknown or not modes or isinstance(modes, str):
        raise TransformError(
            f"check_grads: modes must be a tuple of 'fwd' and 'rev', got {modes!r}."
        )
    if not isinstance(args, tuple):
        raise TransformError("check_grads: args must be a tuple of arguments; pass (x,).")
    generator = torch.Generator().manual_seed(seed)
    leaves, spec = _pytree.flatten(args)
    double = all(leaf.dtype in (torch.float64, torch.complex128) for leaf in leaves)
    tolerances = _Tolerances(
        eps or (1e-6 if double else 1e-2),
        atol or (1e-6 if double else 2e-2),
        rtol or (1e-5 if double else 2e-2),
    )
    name = function_name(func)
    _check(lambda *xs: func(*spec.unflatten(xs)), leaves, order, modes, tolerances, generator, name)


class _Tolerances:
    def __init__(self, eps: float, atol: float, rtol: float) -> None:
        self.eps, self.atol, self.rtol = eps, atol, rtol


def _random_like(leaves: Any, generator: torch.Generator) -> "list[torch.Tensor]":
    return [
        torch.randn(leaf.shape, dtype=leaf.dtype, generator=generator).to(leaf.device)
        for leaf in leaves
    ]


def _flat(output: Any) -> "list[torch.Tensor]":
    return [leaf for leaf in _pytree.flatten(output)[0] if isinstance(leaf, torch.Tensor)]


def _check(
    func: Callable[..., Any],
    leaves: "list[torch.Tensor]",
    order: int,
    modes: "tuple[str, ...]",
    tolerances: _Tolerances,
    generator: torch.Generator,
    name: str,
) -> None:
    primals = tuple(leaf.detach() for leaf in leaves)
    tangents = tuple(_random_like(primals, generator))
    eps = tolerances.eps
    with torch.no_grad():
        high = _flat(func(*(x + eps * t for x, t in zip(primals, tangents))))
        low = _flat(func(*(x - eps * t for x, t in zip(primals, tangents))))
    expected = [(h - l) / (2 * eps) for h, l in zip(high, low)]
    if "fwd" in modes:
        pushed = _flat(jvp(func, primals, tangents)[1])
        for index, (got, wanted) in enumerate(zip(pushed, expected)):
            _compare(f"{name}: jvp of output {index}", got, wanted, tolerances)
    if "rev" in modes:
        output, pull = vjp(func, *primals)
        output_leaves, output_spec = _pytree.flatten(output)
        cotangents = _random_like(output_leaves, generator)
        grads = pull(output_spec.unflatten(cotangents))
        got = sum(_inner(g, t) for g, t in zip(grads, tangents))
        wanted = sum(_inner(c, e) for c, e in zip(cotangents, expected))
        _compare(f"{name}: vjp, in an inner product with a tangent", got, wanted, tolerances)
    if order > 1:
        if "fwd" in modes:

            def forward(*xs: torch.Tensor) -> Any:
                return tuple(_flat(jvp(func, xs, tangents)[1]))

            _check(forward, leaves, order - 1, modes, tolerances, generator, f"jvp of {name}")
        if "rev" in modes:

            def reverse(*xs: torch.Tensor) -> Any:
                value, pullback = vjp(func, *xs)
                return pullback(_pytree.flatten(value)[1].unflatten(cotangents))

            _check(reverse, leaves, order - 1, modes, tolerances, generator, f"vjp of {name}")


def _inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b.conj()).sum().real if a.is_complex() or b.is_complex() else (a * b).sum()


def _compare(what: str, got: Any, wanted: Any, tolerances: _Tolerances) -> None:
    got, wanted = torch.as_tensor(got), torch.as_tensor(wanted)
    # A difference of functions of size |f| is known to about eps |f|: scale by the largest entry.
    scale = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1.0)
    error = float((got - wanted).abs().max()) if wanted.numel() else 0.0
    if not error <= tolerances.atol + tolerances.rtol * scale:
        raise AssertionError(
            f"check_grads: {what} differs from finite differences by {error:.3g} (largest expected "
            f"entry {scale:.3g}, tolerance {tolerances.atol + tolerances.rtol * scale:.3g}): got "
            f"{got}, expected {wanted}."
        )
