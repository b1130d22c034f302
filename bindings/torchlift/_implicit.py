"""custom_root and fixed_point: the derivative of a solution, and not of the way to it.

NOTE [implicit derivatives]
y solves f(y, p) = 0. With J the derivative of f by y,

    J y' = -f'(p) p'          a tangent: one linear system with J
    J^T u = v, then -u f'(p)  a cotangent v: one with its transpose

and both only need products with J, which are a jvp or vjp of f at y. So solving is an autograd
Function with these two rules. For higher derivatives the rules are differentiated in their turn: y
is saved as an output, and so is a function of p there, and the linear system is a root as well, of a
function that is linear in its unknowns.
"""

from __future__ import annotations

from typing import Any, Callable, NoReturn

import torch
from torch.autograd.function import Function

from torchlift import _C, _pytree
from torchlift._autograd_function import for_each_direction, without_tangents
from torchlift._control_flow import while_loop
from torchlift._custom import stop_gradient
from torchlift._errors import TransformError
from torchlift._forward import jvp
from torchlift._grad import vjp
from torchlift._linear_solvers import _default_tol, _known, _Vectors, gmres
from torchlift._names import describe, function_name


def custom_root(
    f: Callable[..., Any],
    initial: Any,
    solve: "Callable[[Callable[[Any], Any], Any], Any]",
    tangent_solve: "Callable[[Callable[[Any], Any], Any], Any] | None" = None,
    *,
    params: "tuple[Any, ...]" = (),
) -> Any:
    """The root y of `f(y, *params) = 0` that `solve` finds, with the derivatives of a root.

    How solve works is not differentiated, and may be anything. The derivative follows from f alone
    (the implicit function theorem): each one takes a linear system with the derivative of f by y.
    In forward and reverse mode, any number of times, under vmap.

    Args:
        f: a differentiable function of a pytree of real tensors y, and of the params; it returns a
            pytree like y. It closes over nothing that is differentiated.
        initial: where solve starts, a pytree like y. The root does not depend on it.
        solve: solve(g, initial) returns a root of g, where g(y) = f(y, *params).
        tangent_solve: tangent_solve(matvec, b) returns the x with matvec(x) = b, where matvec is
            linear in a pytree like y: the derivative of f by y at the root, or its transpose. `gmres`
            if left out; `cg` if it is symmetric and positive definite.
        params: a tuple of pytrees, whose tensors the root is a function of.

    Raises:
        TransformError: f or solve return another structure or shape than initial has; f closes over
            a tensor that is differentiated.

    >>> import torch, torchlift
    >>> def bisect(g, start):
    ...     low, high = torch.zeros_like(start), start
    ...     for _ in range(40):
    ...         middle = (low + high) / 2
    ...         low, high = torch.where(g(middle) < 0, middle, low), torch.where(g(middle) < 0, high, middle)
    ...     return high
    >>> sqrt = lambda a: torchlift.custom_root(lambda y, a: y * y - a, torch.tensor(10.0), bisect, params=(a,))
    >>> torchlift.value_and_grad(sqrt)(torch.tensor(4.0))
    (tensor(2.), tensor(0.2500))
    """
    if not isinstance(params, tuple):
        raise TransformError(
            f"[custom_root] params must be a tuple, got {describe(params)}. Pass params=(p,)."
        )
    problem = _Problem("custom_root", f, initial, solve, tangent_solve or gmres, params)
    return problem.root(params)


def fixed_point(
    f: Callable[..., Any],
    initial: Any,
    *params: Any,
    solve: "Callable[[Callable[[Any], Any], Any], Any] | None" = None,
    tangent_solve: "Callable[[Callable[[Any], Any], Any], Any] | None" = None,
    tol: "float | None" = None,
    max_steps: int = 10_000,
) -> Any:
    """The y with `y = f(y, *params)`, with the derivatives of a fixed point: see `custom_root`.

    Args:
        f, initial, params, tangent_solve: as for custom_root, with y - f(y, *params) for its f.
        solve: solve(g, initial) returns a y with y = g(y); y = g(y) again and again if left out,
            which needs a contraction.
        tol: when that stops: when a step is below tol * (1 + norm of y); eps ** 0.75 of the dtype
            if left out.
        max_steps: when it gives up. What has not converged is NaN.

    >>> import torch, torchlift
    >>> cosine = lambda a: torchlift.fixed_point(lambda y, a: torch.cos(a * y), torch.tensor(0.5), a)
    >>> torchlift.value_and_grad(cosine)(torch.tensor(1.0))
    (tensor(0.7391), tensor(-0.2975))
    """

    def residual(y: Any, *params: Any) -> Any:
        return _minus(y, f(y, *params), "fixed_point", f)

    def iterate(g: Callable[[Any], Any], start: Any) -> Any:
        image = lambda y: _minus(y, g(y), "fixed_point", f)
        return (solve or (lambda h, y: _iterate(h, y, tol, max_steps)))(image, start)

    problem = _Problem(
        "fixed_point", residual, initial, iterate, tangent_solve or gmres, params, named=f
    )
    return problem.root(params)


def _iterate(g: Callable[[Any], Any], start: Any, tol: "float | None", max_steps: int) -> Any:
    vectors = _Vectors("fixed_point", start)
    first = vectors.join(start)
    if first.numel() == 0:
        return start
    small = _default_tol(first.dtype) if tol is None else tol

    def moving(carry: Any) -> torch.Tensor:
        y, step, count = carry
        return ~(step <= small * (1 + y.norm())) & (count < max_steps) & step.isfinite()

    def go_on(carry: Any) -> Any:
        y, _, count = carry
        image = vectors.join(g(vectors.split(y)))
        return image, (image - y).norm(), count + 1

    count = torch.zeros((), dtype=torch.int64, device=first.device)
    # One step first: the loop's condition looks at the step.
    y, step, _ = while_loop(moving, go_on, go_on((first, None, count)))
    return vectors.split(_known((step <= small * (1 + y.norm())) & step.isfinite(), y))


def _minus(a: Any, b: Any, transform: str, f: Any) -> Any:
    left, spec = _pytree.flatten(a)
    right, other = _pytree.flatten(b)
    if spec != other:
        raise TransformError(
            f"[{transform}] {function_name(f)} returned the structure {other}, but must return one "
            f"like its first argument: {spec}."
        )
    return spec.unflatten([x - y for x, y in zip(left, right)])


class _Problem:
    """f(y, *params) = 0, on flat lists of tensors."""

    def __init__(
        self,
        transform: str,
        f: Callable[..., Any],
        initial: Any,
        solve: Callable[..., Any],
        tangent_solve: Callable[..., Any],
        params: "tuple[Any, ...]",
        named: Any = None,
    ) -> None:
        self.transform, self.user_f, self.named = transform, f, named or f
        self.solve, self.tangent_solve = solve, tangent_solve
        vectors = _Vectors(transform, initial)
        self.initial = [leaf.detach() for leaf in vectors.leaves]
        self.y_spec = vectors.spec
        leaves, self.p_spec = _pytree.flatten(params)
        self.where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        if any(leaves[i].is_complex() for i in self.where):
            self.fail(
                "the params must be real tensors, got a complex one. Write it as its real view "
                "(torch.view_as_real)."
            )
        self.constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.checked = False

    def fail(self, message: str) -> NoReturn:
        raise TransformError(f"[{self.transform}] {message}")

    def root(self, params: Any) -> Any:
        leaves, _ = _pytree.flatten(params)
        tensors = tuple(leaves[i] for i in self.where)
        return self.y_spec.unflatten(self.roots(tensors))

    def roots(self, tensors: Any, initial: Any = None) -> "tuple[torch.Tensor, ...]":
        start = list(self.initial if initial is None else initial)
        if not tensors:
            found = tuple(t.detach() for t in self.find(start, ()))
        else:
            found = _Root.apply(self, *start, *tensors)
        if not self.checked:
            self.check_closure(found, tensors)
            self.checked = True
        return found

    def params(self, tensors: Any) -> "tuple[Any, ...]":
        leaves = list(self.constants)
        for i, tensor in zip(self.where, tensors):
            leaves[i] = tensor
        return self.p_spec.unflatten(leaves)

    def f(self, y: Any, tensors: Any) -> "tuple[torch.Tensor, ...]":
        out = self.user_f(self.y_spec.unflatten(list(y)), *self.params(tensors))
        return self.like_y(out, function_name(self.named))

    def like_y(self, tree: Any, who: str) -> "tuple[torch.Tensor, ...]":
        leaves, spec = _pytree.flatten(tree)
        if spec != self.y_spec:
            self.fail(
                f"{who} returned the structure {spec}, but must return one like initial: {self.y_spec}."
            )
        for leaf, like in zip(leaves, self.initial):
            if not isinstance(leaf, torch.Tensor) or leaf.shape != like.shape:
                self.fail(
                    f"{who} returned {describe(leaf)} where initial has {describe(like)}: the shapes "
                    f"must be the same."
                )
        return tuple(leaves)

    def find(self, start: "list[torch.Tensor]", tensors: Any) -> "tuple[torch.Tensor, ...]":
        def g(y: Any) -> Any:
            return self.y_spec.unflatten(list(self.f(_pytree.flatten(y)[0], tensors)))

        return self.like_y(self.solve(g, self.y_spec.unflatten(start)), "solve")

    def solve_linear(self, matvec: Callable[..., Any], b: Any) -> "tuple[torch.Tensor, ...]":
        """matvec takes and returns a tuple of tensors."""

        def on_trees(x: Any) -> Any:
            return self.y_spec.unflatten(list(matvec(*_pytree.flatten(x)[0])))

        x = self.tangent_solve(on_trees, self.y_spec.unflatten(list(b)))
        return self.like_y(x, "tangent_solve")

    def check_closure(self, y: Any, tensors: Any) -> None:
        residual = self.f(stop_gradient(list(y)), stop_gradient(list(tensors)))
        if any(_is_differentiated(t) for t in residual):
            self.fail(
                f"{function_name(self.named)} closes over a tensor that is differentiated, and the "
                f"root would lose its gradient. Pass it as one of the params, or use "
                f"stop_gradient on it."
            )


def _is_differentiated(t: "torch.Tensor | None") -> bool:
    while t is not None:
        if t.requires_grad:
            return True
        if _C.forward_mode_open() and torch._VF._unpack_dual(t, level=0)[1] is not None:
            return True
        lowered = _C.lower_lifted(t)
        t = None if lowered is None else lowered[0]
    return False


class _Linear(_Problem):
    """matvec(x, *params) = b for a matvec that is linear in x: params is (b, *others)."""

    def __init__(self, problem: _Problem, matvec: Callable[..., Any], count: int) -> None:
        self.transform, self.named = problem.transform, problem.named
        self.tangent_solve, self.initial = problem.tangent_solve, problem.initial
        self.y_spec, self.matvec, self.count = problem.y_spec, matvec, count
        self.checked = True

    def f(self, y: Any, tensors: Any) -> "tuple[torch.Tensor, ...]":
        b, others = tensors[: self.count], tensors[self.count :]
        return tuple(p - q for p, q in zip(self.matvec(y, others), b))

    def find(self, start: "list[torch.Tensor]", tensors: Any) -> "tuple[torch.Tensor, ...]":
        b, others = tensors[: self.count], tensors[self.count :]
        return self.solve_linear(lambda *x: self.matvec(x, others), b)


class _Root(Function):
    @staticmethod
    def forward(ctx: Any, problem: _Problem, *args: torch.Tensor) -> Any:
        start, tensors = args[: len(problem.initial)], args[len(problem.initial) :]
        y = tuple(t.detach().clone() for t in problem.find(list(start), tensors))
        ctx.problem, ctx.count = problem, len(tensors)
        ctx.save_for_backward(*tensors, *y)
        ctx.save_for_forward(*tensors, *y)
        return y

    @staticmethod
    def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
        # libtorch turns forward mode off here, for its own tangents; those of other jvps go on.
        with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
            problem, tensors, y = _saved(ctx, in_jvp=True)
            return _push(problem, tensors, y, tangents[len(y) :])  # without those of start

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        problem, tensors, y = _saved(ctx)
        full = [torch.zeros_like(t) if c is None else c for c, t in zip(cotangents, y)]

        def pull(x: Any, others: Any) -> Any:
            at, rest = others[: len(y)], others[len(y) :]
            return vjp(lambda *z: problem.f(z, rest), *at)[1](tuple(x))

        system = _Linear(problem, pull, len(y))
        u = system.roots((*full, *y, *tensors), [torch.zeros_like(t) for t in y])
        chosen = [
            i
            for i, t in enumerate(tensors)
            if ctx.needs_input_grad[1 + len(y) + i] and t.is_floating_point()
        ]
        grads: "list[Any]" = [None] * len(tensors)
        if chosen:

            def of_chosen(*some: torch.Tensor) -> "tuple[torch.Tensor, ...]":
                return problem.f(y, _replaced(tensors, chosen, some))

            found = vjp(of_chosen, *(tensors[i] for i in chosen))[1](tuple(-t for t in u))
            for i, grad in zip(chosen, found):
                grads[i] = grad
        return (None, *[None] * len(y), *grads)


def _push(
    problem: _Problem, tensors: Any, y: Any, tangents: Any
) -> "tuple[torch.Tensor, ...]":
    """The tangent of the root y, for tangents of the params."""
    chosen = [i for i, t in enumerate(tangents) if t is not None and t.is_floating_point()]

    def of_chosen(*some: torch.Tensor) -> "tuple[torch.Tensor, ...]":
        return problem.f(y, _replaced(tensors, chosen, some))

    of_params = tuple(tensors[i] for i in chosen), tuple(tangents[i] for i in chosen)
    _, moved = jvp(of_chosen, *of_params)

    def push(x: Any, others: Any) -> Any:
        at, rest = others[: len(y)], others[len(y) :]
        return jvp(lambda *z: problem.f(z, rest), tuple(at), tuple(x))[1]

    def solve(*b: torch.Tensor) -> "tuple[torch.Tensor, ...]":
        system = _Linear(problem, push, len(y))
        return system.roots((*b, *y, *tensors), [torch.zeros_like(t) for t in y])

    return for_each_direction(solve, tuple(-m for m in moved))


def _saved(
    ctx: Any, in_jvp: bool = False
) -> "tuple[_Problem, tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]":
    saved = ctx.saved_tensors
    if in_jvp:
        saved = without_tangents(saved)
    return ctx.problem, tuple(saved[: ctx.count]), tuple(saved[ctx.count :])


def _replaced(tensors: Any, chosen: "list[int]", some: Any) -> "list[torch.Tensor]":
    full = list(tensors)
    for i, tensor in zip(chosen, some):
        full[i] = tensor
    return full
