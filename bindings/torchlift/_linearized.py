"""What training looks like near some parameters: empirical NTK, diagonals of Fisher and GGN."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

from torchlift import _pytree
from torchlift._errors import TransformError
from torchlift._grad import grad, vjp
from torchlift._vmap import vmap

_KINDS = ("full", "trace", "diagonal")


def _jacobian(func: "Callable[..., Tensor]", params: Any, example: Tensor) -> "list[Tensor]":
    """d func(params, example) / d params, a tensor [outputs, parameters] for each leaf."""
    output, pull = vjp(lambda p: func(p, example), params)
    basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device)
    (rows,) = vmap(lambda v: pull(v.reshape(output.shape)))(basis)
    return [leaf.reshape(output.numel(), -1) for leaf in _pytree.flatten(rows)[0]]


def empirical_ntk(
    func: "Callable[[Any, Tensor], Tensor]",
    params: Any,
    x1: Tensor,
    x2: "Tensor | None" = None,
    *,
    compute: str = "full",
    chunk_size: "int | None" = None,
) -> Tensor:
    """The empirical neural tangent kernel J(x1) J(x2)^T of func(params, example) -> outputs.

    Args:
        x1, x2: examples along dim 0, [N1, ...] and [N2, ...]; x2 is x1 by default.
        compute: "full", [N1, N2, K, K] for K outputs; "diagonal" of the last two dims, [N1, N2, K];
            or their "trace", [N1, N2].
        chunk_size: how many Jacobians to make at a time.

    The Jacobians are contracted for one parameter after the other, and for "diagonal" and "trace" only
    what is asked for. (Jacot et al. 2018, arXiv:1806.07572; Novak et al. 2022, arXiv:2206.08720.)

    >>> import torch, torchlift
    >>> f = lambda w, x: (w * x).sum().reshape(1)
    >>> torchlift.empirical_ntk(f, torch.ones(2), torch.eye(2), compute="trace")
    tensor([[1., 0.],
            [0., 1.]])
    """
    if compute not in _KINDS:
        raise TransformError(f"empirical_ntk: compute must be one of {list(_KINDS)}, got {compute!r}.")
    jacobians = vmap(
        lambda p, x: _jacobian(func, p, x), in_dims=(None, 0), chunk_size=chunk_size
    )
    first = jacobians(params, x1)
    second = first if x2 is None or x2 is x1 else jacobians(params, x2)
    formula = {
        "full": "nkp,mlp->nmkl",
        "diagonal": "nkp,mkp->nmk",
        "trace": "nkp,mkp->nm",
    }[compute]
    total = torch.einsum(formula, first[0], second[0])
    for a, b in zip(first[1:], second[1:]):
        total = total + torch.einsum(formula, a, b)
    return total


def _mean_over_examples(transform: str, rows: Tensor) -> Tensor:
    if rows.shape[0] == 0:
        raise TransformError(f"{transform}: the batch has no examples, so there is no mean over them.")
    return rows.mean(0)


def fisher_diagonal(
    loss: "Callable[..., Tensor]",
    params: Any,
    *batch: Any,
    randomness: str = "error",
    chunk_size: "int | None" = None,
) -> Any:
    """The mean over the examples of the squared gradient of loss(params, *example), by parameter.

    With the negative log-likelihood of the observed targets as loss this is the diagonal of the empirical
    Fisher matrix; of targets drawn from the model, an estimate of the Fisher matrix itself (Kunstner et al.
    2019, arXiv:1905.12558).

    >>> import torch, torchlift
    >>> torchlift.fisher_diagonal(lambda w, x: w * x, torch.tensor(1.0), torch.tensor([1.0, 3.0]))
    tensor(5.)
    """
    in_dims = (None, *[0] * len(batch))
    grads = vmap(grad(loss), in_dims=in_dims, randomness=randomness, chunk_size=chunk_size)(
        params, *batch
    )
    return _pytree.tree_map(lambda g: _mean_over_examples("fisher_diagonal", g.square()), grads)


def ggn_diagonal(
    func: "Callable[[Any, Tensor], Tensor]",
    loss: "Callable[..., Tensor]",
    params: Any,
    inputs: Tensor,
    *targets: Any,
    chunk_size: "int | None" = None,
) -> Any:
    """The diagonal of the generalised Gauss-Newton matrix, mean over the examples: diag(J^T H J), with the
    Jacobian J of func(params, example) and the Hessian H of loss(output, *target) by the output (Schraudolph
    2002).

    >>> import torch, torchlift
    >>> f, loss = (lambda w, x: w * x), (lambda y: y.square().sum() / 2)
    >>> torchlift.ggn_diagonal(f, loss, torch.tensor(1.0), torch.tensor([1.0, 3.0]))
    tensor(5.)
    """

    def one(params: Any, x: Tensor, *target: Any) -> "list[Tensor]":
        output = func(params, x)
        _, pull = vjp(grad(lambda y: loss(y, *target)), output)
        basis = torch.eye(output.numel(), dtype=output.dtype, device=output.device)
        (hessian,) = vmap(lambda v: pull(v.reshape(output.shape)))(basis)
        hessian = hessian.reshape(output.numel(), -1)
        jacobian = _jacobian(func, params, x)
        return [torch.einsum("kp,kl,lp->p", j, hessian, j) for j in jacobian]

    in_dims = (None, *[0] * (1 + len(targets)))
    rows = vmap(one, in_dims=in_dims, chunk_size=chunk_size)(params, inputs, *targets)
    leaves, spec = _pytree.flatten(params)
    means = [_mean_over_examples("ggn_diagonal", r) for r in rows]
    return spec.unflatten([m.reshape(leaf.shape) for m, leaf in zip(means, leaves)])
