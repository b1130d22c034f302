"""Reference derivatives, by torch.autograd, dual numbers and finite differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.autograd.forward_ad as fwAD

from opcov.samples import SEED, Case, Function, Tensors, seed_everything

MAX_ROWS = 512  # largest output whose Jacobian is built row by row
PROJECTIONS = 3  # random directions in which a nested jvp is compared
FD_TOLERANCE = 1e-4  # for agreement with finite differences, see confirms
FD_NOISE = 1e-9  # what they make of a derivative that is zero


class Mismatch(Exception):
    """A result differs from the reference."""


class Undecided(Exception):
    """At this dtype nobody can say what the right result is."""


def inner(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The real inner product, for which PyTorch's vjp is the adjoint of its jvp."""
    return (a.conj() * b).real.sum() if a.is_complex() or b.is_complex() else (a * b).sum()


def inner_sum(left: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> torch.Tensor:
    return sum((inner(a, b) for a, b in zip(left, right, strict=True)), torch.zeros(()))


def random_like(tensors: Sequence[torch.Tensor], seed: int) -> Tensors:
    gen = torch.Generator().manual_seed(SEED + 100 + seed)
    return tuple(torch.randn(t.shape, dtype=t.dtype, generator=gen) for t in tensors)


def as_leaves(tensors: Iterable[torch.Tensor]) -> Tensors:
    return tuple(t.detach().requires_grad_() for t in tensors)


def autograd(outs: Tensors, wrt: Tensors, cots: Tensors, create_graph: bool = False) -> Tensors:
    """torch.autograd.grad with zeros for whatever does not depend on ``wrt``."""
    pairs = [(o, c) for o, c in zip(outs, cots, strict=True) if o.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(t) for t in wrt)
    return torch.autograd.grad(
        [o for o, _ in pairs],
        wrt,
        [c for _, c in pairs],
        retain_graph=True,
        create_graph=create_graph,
        allow_unused=True,
        materialize_grads=True,
    )


@dataclasses.dataclass
class Differentiable:
    """An op on one sample as a function of ``primals`` (to differentiate) and ``others``."""

    case: Case
    fn: Function  # primals and others -> the differentiable outputs
    primals: list[Tensors]  # per variant
    others: list[Tensors]  # per variant
    outs: Tensors  # of the first variant
    random: bool  # draws random numbers

    @property
    def n(self) -> int:
        return len(self.primals[0])

    @property
    def m(self) -> int:
        return len(self.others[0])

    def cotangents(self, seed: int = 0) -> Tensors:
        return random_like(self.outs, seed)

    def tangents(self, seed: int = 0) -> Tensors:
        return random_like(self.primals[0], 1000 + seed)

    def split(self, args: Sequence[torch.Tensor]) -> tuple[Tensors, Tensors, Tensors]:
        """primals, others, and whatever was appended to them."""
        return tuple(args[: self.n]), tuple(args[self.n : self.n + self.m]), tuple(args[self.n + self.m :])

    # References.  Each evaluates ``fn`` once, so that a random op draws the same numbers.

    def ref_vjp(self, *args: torch.Tensor) -> Tensors:
        primals, others, cots = self.split(args)
        xs = as_leaves(primals)
        return autograd(self.fn(*xs, *others), xs, cots)

    def ref_jvp(self, *args: torch.Tensor) -> Tensors:
        primals, others, tangents = self.split(args)
        seed_everything()
        try:
            forward = self._jvp_by_dual_numbers(primals, others, tangents)
        except Exception:
            seed_everything()
            return self._jvp_by_reverse(primals, others, tangents)
        if self.random or self._adjoint_to_reverse(forward, args):
            return forward
        if not all(is_double(out) for out in forward):
            raise Undecided("forward and reverse mode disagree, and only float64 tells which one is right")
        reverse = self._jvp_by_reverse(primals, others, tangents)
        exact = self.fd_jvp(*args)
        right = confirms(exact, reverse) and not confirms(exact, forward)
        return reverse if right else forward

    def _jvp_by_dual_numbers(self, primals: Tensors, others: Tensors, tangents: Tensors) -> Tensors:
        with fwAD.dual_level():
            duals = [fwAD.make_dual(p.detach(), t) for p, t in zip(primals, tangents)]
            pairs = [fwAD.unpack_dual(out) for out in self.fn(*duals, *others)]
        # A tangent has its primal's dtype. PyTorch's own formulas sometimes give a wider one.
        return tuple(
            p.tangent.to(p.primal.dtype) if p.tangent is not None else torch.zeros_like(p.primal) for p in pairs
        )

    def _adjoint_to_reverse(self, forward: Tensors, args: Sequence[torch.Tensor]) -> bool:
        """Whether <c, jvp(t)> = <vjp(c), t> for a random c; True where that cannot be told."""
        if any(t.dtype in (torch.float16, torch.bfloat16, torch.complex32) for t in (*args, *forward)):
            return True
        primals, others, tangents = self.split(args)
        cots = random_like(forward, 77)
        try:
            backward = self.ref_vjp(*primals, *others, *cots)
        except Exception:
            return True
        return agrees((inner_sum(cots, forward),), (inner_sum(backward, tangents),), 1e-2, 1e-2)

    def _jvp_by_reverse(self, primals: Tensors, others: Tensors, tangents: Tensors) -> Tensors:
        """Rows of the Jacobian, or, of a large one, the transpose of the vjp by double backward."""
        xs = as_leaves(primals)
        outs = self.fn(*xs, *others)
        if sum(out.numel() for out in outs) > MAX_ROWS:
            cots = as_leaves(random_like(outs, 0))
            grads = autograd(outs, xs, cots, create_graph=True)
            total = inner_sum(grads, tangents)
            return autograd((total,), cots, (torch.ones_like(total),))
        results = []
        for out in outs:
            flat = (torch.view_as_real(out) if out.is_complex() else out).reshape(-1)
            row = [inner_sum(autograd((y,), xs, (torch.ones_like(y),)), tangents) for y in flat]
            value = torch.stack(row) if row else flat.detach()
            if out.is_complex():
                value = torch.view_as_complex(value.reshape(*out.shape, 2))
            results.append(value.reshape(out.shape).to(out.dtype))
        return tuple(results)

    def ref_vjpvjp(self, *args: torch.Tensor) -> Tensors:
        primals, others, rest = self.split(args)
        cots, second = rest[: len(self.outs)], rest[len(self.outs) :]
        xs, cs = as_leaves(primals), as_leaves(cots)
        grads = autograd(self.fn(*xs, *others), xs, cs, create_graph=True)
        return autograd(grads, xs + cs, second)

    def ref_jvpvjp(self, *args: torch.Tensor) -> Tensors:
        """d/dt of the vjp along (tx, tc): Hessian of <c, f> times tx, plus the vjp of tc."""
        primals, others, rest = self.split(args)
        k = len(self.outs)
        cots, tx, tc = rest[:k], rest[k : k + self.n], rest[k + self.n :]
        xs = as_leaves(primals)
        outs = self.fn(*xs, *others)
        hessian = autograd(autograd(outs, xs, cots, create_graph=True), xs, tx)
        return tuple(h + g for h, g in zip(hessian, autograd(outs, xs, tc)))

    def ref_jvpjvp(self, *args: torch.Tensor) -> Tensors:
        """Random projections <c, D2f[t1, t2]>, each as <t2, Hessian of <c, f> times t1>."""
        primals, others, tangents = self.split(args)
        t1, t2 = tangents[: self.n], tangents[self.n :]
        xs = as_leaves(primals)
        outs = self.fn(*xs, *others)
        values = []
        for k in range(PROJECTIONS):
            grads = autograd(outs, xs, self.cotangents(k), create_graph=True)
            values.append(inner_sum(autograd(grads, xs, t1), t2))
        return (self._as_primals(torch.stack(values)),)

    # Second opinions, by central differences.

    def fd_jvp(self, *args: torch.Tensor) -> Tensors:
        primals, others, tangents = self.split(args)
        return central_difference(lambda h: self.fn(*step(primals, tangents, h), *others))

    def fd_vjp(self, *args: torch.Tensor) -> Tensors:
        """<cots, the derivative by each number of the primals>."""
        primals, others, cots = self.split(args)
        if sum(p.numel() for p in primals) > MAX_ROWS:
            raise Undecided("too many numbers for finite differences")

        def slope(k: int, unit: torch.Tensor) -> torch.Tensor:
            def along(h: float) -> Tensors:
                return self.fn(*primals[:k], primals[k] + h * unit, *primals[k + 1 :], *others)

            return inner_sum(cots, central_difference(along))

        grads = []
        for k, primal in enumerate(primals):
            units = torch.eye(primal.numel(), dtype=primal.dtype).reshape(-1, *primal.shape)
            slopes = [slope(k, unit) for unit in units]
            if primal.is_complex():
                slopes = [re + 1j * im for re, im in zip(slopes, [slope(k, 1j * unit) for unit in units])]
            grads.append(torch.stack(slopes).reshape(primal.shape) if slopes else torch.zeros_like(primal))
        return tuple(grads)

    def fd_jvpvjp(self, *args: torch.Tensor) -> Tensors:
        primals, others, rest = self.split(args)
        k = len(self.outs)
        cots, tx, tc = rest[:k], rest[k : k + self.n], rest[k + self.n :]
        return central_difference(lambda h: self.ref_vjp(*step(primals, tx, h), *others, *step(cots, tc, h)))

    def fd_jvpjvp(self, *args: torch.Tensor) -> Tensors:
        primals, others, tangents = self.split(args)
        t1, t2 = tangents[: self.n], tangents[self.n :]

        def along_t1(h: float) -> Tensors:
            moved = step(primals, t2, h)
            return central_difference(lambda g: self.fn(*step(moved, t1, g), *others))

        return self.project(central_difference(along_t1))

    def project(self, results: Tensors) -> Tensors:
        """What ref_jvpjvp returns, from the library's D2f[t1, t2]."""
        if [r.shape for r in results] != [o.shape for o in self.outs]:
            raise Mismatch(
                f"shapes {[tuple(r.shape) for r in results]}, expected {[tuple(o.shape) for o in self.outs]}"
            )
        values = [inner_sum(self.cotangents(k), results) for k in range(PROJECTIONS)]
        return (self._as_primals(torch.stack(values)),)

    def _as_primals(self, real: torch.Tensor) -> torch.Tensor:
        """In the primals' precision, whatever the op's output has."""
        return real.to(self.primals[0][0].abs().dtype)


def step(tensors: Tensors, direction: Tensors, h: float) -> Tensors:
    return tuple(t + h * d for t, d in zip(tensors, direction, strict=True))


def has_nan(tensors: Tensors) -> bool:
    return any(t.isnan().any() for t in tensors)


def is_double(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.complex128)


def central_difference(fn: Callable[[float], Tensors], h: float = 1e-3) -> Tensors:
    """The derivative at 0, of fourth order."""
    points = zip(fn(-2 * h), fn(-h), fn(h), fn(2 * h), strict=True)
    return tuple((a - 8 * b + 8 * c - d) / (12 * h) for a, b, c, d in points)


def confirms(exact: Tensors, actual: Tensors) -> bool:
    """Whether finite differences agree with ``actual``, up to FD_TOLERANCE of the largest number (or of 1)."""
    if [e.shape for e in exact] != [a.shape for a in actual]:
        return False
    scales = [min(1.0, float(e.abs().max())) if e.numel() else 1.0 for e in exact]
    return all(
        agrees((a,), (e,), FD_TOLERANCE, max(FD_TOLERANCE * scale, FD_NOISE))
        for a, e, scale in zip(actual, exact, scales, strict=True)
    )


def agrees(actual: Tensors, expected: Tensors, rtol: float, atol: float) -> bool:
    return all(
        torch.allclose(a, e.to(a.dtype), rtol=rtol, atol=atol, equal_nan=True)
        for a, e in zip(actual, expected, strict=True)
    )
