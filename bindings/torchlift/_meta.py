"""Learning to learn: MAML's inner loop as a pure function, first-order and implicit gradients."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from torchlift import _pytree, optim
from torchlift._errors import TransformError
from torchlift._grad import grad, vjp

Loss = Callable[..., Tensor]


def adapt(
    loss: Loss,
    params: Any,
    *batch: Any,
    steps: int,
    lr: "float | Tensor" = 0.01,
    optimizer: "optim.Optimizer | None" = None,
    first_order: bool = False,
) -> Any:
    """params after `steps` steps of gradient descent on loss(params, *batch).

    Args:
        optimizer: of torchlift.optim; sgd(lr) by default.
        first_order: the steps' gradients count as constants when the result is differentiated (FOMAML,
            section 5.2 of Finn et al. 2017, arXiv:1703.03400).

    A pure function: differentiate it by params (or by lr), map it over tasks.

    >>> import torch, torchlift
    >>> loss = lambda w, target: (w - target).square()
    >>> torchlift.adapt(loss, torch.tensor(0.0), torch.tensor(1.0), steps=1, lr=0.5)
    tensor(1.)
    """
    if steps < 0:
        raise TransformError(f"adapt: steps must be at least 0, got {steps}.")
    method = optim.sgd(lr) if optimizer is None else optimizer
    state = method.init(params)
    for _ in range(steps):
        grads = grad(loss)(params, *batch)
        if first_order:
            grads = _pytree.tree_map(torch.Tensor.detach, grads)
        params, state = method.update(grads, state, params)
    return params


def maml(
    loss: Loss,
    *,
    steps: int,
    lr: "float | Tensor" = 0.01,
    optimizer: "optim.Optimizer | None" = None,
    first_order: bool = False,
) -> "Callable[[Any, Any, Any], Tensor]":
    """The meta-loss of one task: f(params, support, query) is loss(adapted, *query), where adapted are the
    params after some steps on loss(params, *support).

    For a batch of tasks, map it: `vmap(maml(...), in_dims=(None, 0, 0))(params, supports, queries).mean()`.
    Algorithm 1 of Finn et al. 2017, arXiv:1703.03400. Arguments as in adapt.

    >>> import torch, torchlift
    >>> loss = lambda w, target: (w - target).square()
    >>> meta = torchlift.maml(loss, steps=1, lr=0.25)
    >>> one = (torch.tensor(1.0),)
    >>> torchlift.grad(meta)(torch.tensor(0.0), one, one)
    tensor(-0.5000)
    """

    def meta_loss(params: Any, support: "tuple[Any, ...]", query: "tuple[Any, ...]") -> Tensor:
        adapted = adapt(
            loss, params, *support, steps=steps, lr=lr, optimizer=optimizer, first_order=first_order
        )
        return loss(adapted, *query)

    return meta_loss


def implicit_maml_grad(
    loss: Loss,
    *,
    steps: int,
    lr: "float | Tensor" = 0.01,
    regularization: float = 1.0,
    cg_steps: int = 10,
) -> "Callable[[Any, Any, Any], tuple[Any, Tensor]]":
    """The meta-gradient without differentiating through the inner loop: f(params, support, query) returns
    (gradient by params, meta-loss) of one task.

    The inner loop descends on loss(p, *support) + regularization / 2 |p - params|^2; at its minimum the
    meta-gradient is (I + H / regularization)^-1 g, with the Hessian H of the loss on the support set and the
    gradient g of the loss on the query set, both at the adapted parameters (Rajeswaran et al. 2019,
    arXiv:1909.04630). The system is solved by cg_steps of conjugate gradients. Exact only in so far as the
    inner loop has converged.

    Not a function to differentiate: it is the gradient. It can be mapped over tasks.

    >>> import torch, torchlift
    >>> loss = lambda w, target: (w - target).square()
    >>> run = torchlift.implicit_maml_grad(loss, steps=100, lr=0.1, regularization=2.0)
    >>> one = (torch.tensor(1.0),)
    >>> run(torch.tensor(0.0), one, one)[0]  # (1 + 2 / 2)^-1 * 2 (1/2 - 1)
    tensor(-0.5000)
    """
    if regularization <= 0:
        raise TransformError(
            f"implicit_maml_grad: regularization must be above 0, got {regularization}."
        )

    def task_grad(
        params: Any, support: "tuple[Any, ...]", query: "tuple[Any, ...]"
    ) -> "tuple[Any, Tensor]":
        anchor, spec = _pytree.flatten(params)

        def regularized(p: Any, *batch: Any) -> Tensor:
            far = sum((a - b).square().sum() for a, b in zip(_pytree.flatten(p)[0], anchor))
            return loss(p, *batch) + 0.5 * regularization * far

        adapted = adapt(regularized, params, *support, steps=steps, lr=lr, first_order=True)
        adapted = _pytree.tree_map(torch.Tensor.detach, adapted)
        value, pull = vjp(lambda p: loss(p, *query), adapted)
        (g,) = pull(torch.ones_like(value))
        # The Hessian is symmetric: its product with v is the vjp of the gradient.
        _, pull_grad = vjp(lambda p: grad(loss)(p, *support), adapted)

        def apply(v: "list[Tensor]") -> "list[Tensor]":
            (hv,) = pull_grad(spec.unflatten(v))
            return [a + b / regularization for a, b in zip(v, _pytree.flatten(hv)[0])]

        solution = conjugate_gradients(apply, _pytree.flatten(g)[0], cg_steps)
        return spec.unflatten(solution), value

    return task_grad


def _dot(a: "list[Tensor]", b: "list[Tensor]") -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b)]).sum()


def conjugate_gradients(
    apply: "Callable[[list[Tensor]], list[Tensor]]", rhs: "list[Tensor]", steps: int
) -> "list[Tensor]":
    """Approximately solves apply(x) = rhs for a symmetric positive definite apply, from x = 0.

    Without a branch on values, so that it can be mapped over; once converged it stays where it is.
    """
    x = [torch.zeros_like(b) for b in rhs]
    residual, direction = rhs, rhs
    square = _dot(residual, residual)
    tiny = torch.finfo(square.dtype).tiny
    for _ in range(steps):
        product = apply(direction)
        alpha = square / _dot(direction, product).clamp_min(tiny)
        x = [a + alpha * d for a, d in zip(x, direction)]
        residual = [r - alpha * p for r, p in zip(residual, product)]
        previous, square = square, _dot(residual, residual)
        beta = square / previous.clamp_min(tiny)
        direction = [r + beta * d for r, d in zip(residual, direction)]
    return x
