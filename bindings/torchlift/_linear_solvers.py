"""Linear solvers that see a matrix by its products with vectors only.

Vectors are pytrees of real tensors, and the solvers are made of operators and while_loop: under vmap
each example has its own system, and stops when it is solved.
"""

from __future__ import annotations

from typing import Any, Callable

import torch

from torchlift import _pytree
from torchlift._control_flow import while_loop
from torchlift._errors import TransformError

Matvec = Callable[[Any], Any]


class _Vectors:
    """Trees like `tree`, as vectors of one dimension."""

    def __init__(self, transform: str, tree: Any) -> None:
        self.leaves, self.spec = _pytree.flatten(tree)
        for leaf in self.leaves:
            if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
                got = leaf.dtype if isinstance(leaf, torch.Tensor) else type(leaf).__name__
                raise TransformError(
                    f"[{transform}] the unknowns must be real tensors, got {got}. Write complex ones "
                    f"as their real view (torch.view_as_real)."
                )
        self.sizes = [leaf.numel() for leaf in self.leaves]
        self.dtype = self.leaves[0].dtype if self.leaves else torch.float32

    def join(self, tree: Any) -> torch.Tensor:
        leaves, _ = _pytree.flatten(tree)
        return torch.cat([leaf.reshape(-1).to(self.dtype) for leaf in leaves])

    def split(self, vector: torch.Tensor) -> Any:
        parts = vector.split(self.sizes)
        return self.spec.unflatten(
            [p.reshape(leaf.shape).to(leaf.dtype) for p, leaf in zip(parts, self.leaves)]
        )


def _default_tol(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps ** 0.75


def _known(converged: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """x where it is a solution: NaN is better than a number that is none."""
    return torch.where(converged, x, torch.full_like(x, float("nan")))


def gmres(
    matvec: Matvec,
    b: Any,
    *,
    tol: "float | None" = None,
    restart: int = 20,
    max_restarts: int = 50,
) -> Any:
    """The x with matvec(x) = b, by GMRES: for any regular matrix.

    Args:
        matvec: the product of the matrix with a vector, a pytree like b.
        b: a pytree of real tensors.
        tol: how small the residual must get, relative to b; eps ** 0.75 of the dtype if left out.
        restart: products before it starts again from where it is; it keeps as many vectors.
        max_restarts: after how many it gives up. What is not solved is NaN.

    Saad, Schultz: "GMRES: a generalized minimal residual algorithm" (1986).

    >>> import torch, torchlift
    >>> a = torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    >>> torchlift.gmres(lambda x: a @ x, torch.tensor([4.0, 4.0]))
    tensor([1.5000, 1.0000])
    """
    vectors = _Vectors("gmres", b)
    goal = vectors.join(b)
    size = goal.numel()
    if size == 0:
        return b
    steps = min(restart, size)
    # Far below the tolerance: a direction that is in the span of the others.
    tiny = torch.finfo(goal.dtype).tiny
    limit = (_default_tol(goal.dtype) if tol is None else tol) * goal.norm()

    def product(x: torch.Tensor) -> torch.Tensor:
        return vectors.join(matvec(vectors.split(x)))

    def cycle(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        norm = residual.norm()
        basis = (residual / norm.clamp(min=tiny)).unsqueeze(0)
        columns = []
        for step in range(steps):
            w = product(basis[step])
            scale = w.norm()
            h = torch.mv(basis, w)
            w = w - torch.mv(basis.t(), h)
            again = torch.mv(basis, w)  # once more, for the rounding errors of the first time
            w, h = w - torch.mv(basis.t(), again), h + again
            rest = w.norm()
            # What rounding left of nothing is no direction.
            rest = torch.where(
                rest > 10 * torch.finfo(rest.dtype).eps * scale, rest, torch.zeros_like(rest)
            )
            new = torch.where(rest > 0, w / rest.clamp(min=tiny), torch.zeros_like(w))
            columns.append(
                torch.cat([h, rest.unsqueeze(0), h.new_zeros(steps - 1 - step)])
            )
            basis = torch.cat([basis, new.unsqueeze(0)])
        hessenberg = torch.stack(columns, dim=1)  # [steps + 1, steps]
        first = torch.cat([norm.unsqueeze(0), goal.new_zeros(steps)])
        y = torch.mv(torch.linalg.pinv(hessenberg), first)
        return x + torch.mv(basis[:steps].t(), y)

    def unsolved(carry: Any) -> torch.Tensor:
        _, residual, count = carry
        return (residual.norm() > limit) & (count < max_restarts)

    def improve(carry: Any) -> Any:
        x, residual, count = carry
        x = cycle(x, residual)
        return x, goal - product(x), count + 1

    start = (torch.zeros_like(goal), goal, torch.zeros((), dtype=torch.int64, device=goal.device))
    x, residual, _ = while_loop(unsolved, improve, start)
    return vectors.split(_known(residual.norm() <= limit, x))


def cg(
    matvec: Matvec, b: Any, *, tol: "float | None" = None, max_steps: "int | None" = None
) -> Any:
    """The x with matvec(x) = b, by conjugate gradients: for symmetric positive definite matrices.

    Args:
        matvec, b, tol: as for `gmres`.
        max_steps: after how many products it gives up (10 for each unknown, if left out). What is
            not solved is NaN.

    Hestenes, Stiefel: "Methods of conjugate gradients for solving linear systems" (1952).

    >>> import torch, torchlift
    >>> a = torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    >>> torchlift.cg(lambda x: a @ x, torch.tensor([3.0, 5.0]))
    tensor([1.0000, 1.0000])
    """
    vectors = _Vectors("cg", b)
    goal = vectors.join(b)
    if goal.numel() == 0:
        return b
    limit = (_default_tol(goal.dtype) if tol is None else tol) * goal.norm()
    most = 10 * goal.numel() if max_steps is None else max_steps

    def product(x: torch.Tensor) -> torch.Tensor:
        return vectors.join(matvec(vectors.split(x)))

    def unsolved(carry: Any) -> torch.Tensor:
        _, residual, _, count = carry
        return (residual.norm() > limit) & (count < most)

    def improve(carry: Any) -> Any:
        x, residual, direction, count = carry
        pushed = product(direction)
        square = residual.dot(residual)
        step = square / direction.dot(pushed)
        x, residual = x + step * direction, residual - step * pushed
        return x, residual, residual + residual.dot(residual) / square * direction, count + 1

    start = (
        torch.zeros_like(goal),
        goal,
        goal,
        torch.zeros((), dtype=torch.int64, device=goal.device),
    )
    x, _, _, _ = while_loop(unsolved, improve, start)
    residual = goal - product(x)  # and not what rounding made of the recurrence
    return vectors.split(_known(residual.norm() <= 10 * limit, x))
