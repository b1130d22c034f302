"""Optimizers as pure functions: state = init(params); params, state = update(grads, state, params).

They are made of ordinary tensor operations, out of place: they can be differentiated through (MAML,
hyperparameter gradients) and mapped over (one optimizer for each member of an ensemble, with hyperparameters
of its own). params and grads are any pytrees of tensors of one structure.

>>> import torch, torchlift
>>> from torchlift import optim
>>> params = {"w": torch.tensor([1.0, 2.0])}
>>> opt = optim.sgd(lr=0.5)
>>> grads = torchlift.grad(lambda p: p["w"].square().sum())(params)
>>> params, state = opt.update(grads, opt.init(params), params)
>>> params["w"]
tensor([0., 0.])

Formulas: those of torch.optim.SGD, Adam and AdamW, to which the tests compare.
"""

from __future__ import annotations

from typing import Any, Callable, NamedTuple, Union

import torch
from torch import Tensor

from torchlift import _pytree
from torchlift._errors import TransformError

__all__ = ["Optimizer", "adam", "adamw", "sgd"]

Number = Union[float, Tensor]


class Optimizer(NamedTuple):
    """A pair of pure functions."""

    init: Callable[[Any], Any]
    """init(params) -> state, a pytree of tensors."""
    update: Callable[[Any, Any, Any], "tuple[Any, Any]"]
    """update(grads, state, params) -> (new params, new state)."""


def _zeros(params: Any) -> Any:
    return _pytree.tree_map(torch.zeros_like, params)


def _check(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    if isinstance(value, (int, float)) and not low <= value < high:
        bound = f"at least {low}" if high == float("inf") else f"in [{low}, {high})"
        raise TransformError(f"optim: {name} must be {bound}, got {value}.")


def _zip(*trees: Any) -> "tuple[list[tuple[Any, ...]], Any]":
    """(the leaves that belong together, the structure of the first tree)."""
    flat, spec = zip(*(_pytree.flatten(tree) for tree in trees))
    if any(len(leaves) != len(flat[0]) for leaves in flat):
        raise TransformError(
            f"optim: update(grads, state, params) got {len(flat[0])} gradients for "
            f"{len(flat[-1])} parameters. Give trees of one structure, and the state of init(params)."
        )
    return list(zip(*flat)), spec[-1]


def _unzip(rows: "list[tuple[Any, ...]]", spec: Any, count: int) -> "list[Any]":
    return [spec.unflatten([row[i] for row in rows]) for i in range(count)]


def sgd(
    lr: Number,
    momentum: Number = 0.0,
    *,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
) -> Optimizer:
    """Stochastic gradient descent with momentum. Hyperparameters may be tensors of shape [].

    torch.optim.SGD's first step takes the gradient itself as momentum, whatever the dampening; so here.
    """
    _check("lr", lr, 0.0)
    _check("momentum", momentum, 0.0)
    with_momentum = isinstance(momentum, Tensor) or momentum != 0.0
    if nesterov and not with_momentum:
        raise TransformError("optim.sgd: nesterov=True needs a momentum above 0.")

    def init(params: Any) -> Any:
        if not with_momentum:
            return {}
        leaves, _ = _pytree.flatten(params)
        step = torch.zeros((), device=leaves[0].device if leaves else None)
        return {"step": step, "momentum": _zeros(params)}

    def update(grads: Any, state: Any, params: Any) -> "tuple[Any, Any]":
        if not with_momentum:
            rows, spec = _zip(grads, params)
            return spec.unflatten([p - lr * _decayed(g, p, weight_decay) for g, p in rows]), state
        first = state["step"] == 0
        rows, spec = _zip(grads, state["momentum"], params)
        new = []
        for g, m, p in rows:
            g = _decayed(g, p, weight_decay)
            m = torch.where(first, g, momentum * m + (1 - dampening) * g)
            new.append((p - lr * (g + momentum * m if nesterov else m), m))
        params, moments = _unzip(new, spec, 2)
        return params, {"step": state["step"] + 1, "momentum": moments}

    return Optimizer(init, update)


def _decayed(grad: Tensor, param: Tensor, weight_decay: Number) -> Tensor:
    if isinstance(weight_decay, float) and weight_decay == 0.0:
        return grad
    return grad + weight_decay * param


def adam(
    lr: Number = 1e-3,
    betas: "tuple[Number, Number]" = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    weight_decay: Number = 0.0,
) -> Optimizer:
    """Adam (Kingma and Ba, 2015); weight_decay is added to the gradient, as in torch.optim.Adam.

    Where a gradient has been exactly zero from the start, the square root has no derivative: differentiating
    through update gives NaN there. sgd has no such place.
    """
    return _adam(lr, betas, eps, weight_decay, decoupled=False)


def adamw(
    lr: Number = 1e-3,
    betas: "tuple[Number, Number]" = (0.9, 0.999),
    eps: float = 1e-8,
    *,
    weight_decay: Number = 1e-2,
) -> Optimizer:
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), as torch.optim.AdamW."""
    return _adam(lr, betas, eps, weight_decay, decoupled=True)


def _adam(
    lr: Number,
    betas: "tuple[Number, Number]",
    eps: float,
    weight_decay: Number,
    decoupled: bool,
) -> Optimizer:
    _check("lr", lr, 0.0)
    _check("betas[0]", betas[0], 0.0, 1.0)
    _check("betas[1]", betas[1], 0.0, 1.0)
    beta1, beta2 = betas

    def init(params: Any) -> Any:
        leaves, _ = _pytree.flatten(params)
        if any(leaf.is_complex() for leaf in leaves):
            raise TransformError("optim.adam: complex parameters are not supported. Use sgd.")
        step = torch.zeros((), device=leaves[0].device if leaves else None)
        return {"step": step, "mean": _zeros(params), "square": _zeros(params)}

    def update(grads: Any, state: Any, params: Any) -> "tuple[Any, Any]":
        step = state["step"] + 1
        rows, spec = _zip(grads, state["mean"], state["square"], params)
        new = []
        for g, mean, square, p in rows:
            if decoupled:
                p = p - lr * weight_decay * p
            else:
                g = _decayed(g, p, weight_decay)
            mean = beta1 * mean + (1 - beta1) * g
            square = beta2 * square + (1 - beta2) * g * g
            steps = step.to(square.dtype)
            corrected = (square / (1 - beta2**steps)).sqrt() + eps
            new.append((p - lr * (mean / (1 - beta1**steps)) / corrected, mean, square))
        params, means, squares = _unzip(new, spec, 3)
        return params, {"step": step, "mean": means, "square": squares}

    return Optimizer(init, update)
