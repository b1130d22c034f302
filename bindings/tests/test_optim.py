"""Functional optimizers, against torch.optim."""

import pytest
import torch

import torchlift
from torchlift import TransformError, optim, vmap

close = torch.testing.assert_close


def problem():
    params = {"w": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64)
    return params, lambda p: (x @ p["w"] + p["b"] - y).square().mean()


CASES = [
    (optim.sgd, torch.optim.SGD, dict(lr=0.1)),
    (optim.sgd, torch.optim.SGD, dict(lr=0.1, weight_decay=0.2)),
    (optim.sgd, torch.optim.SGD, dict(lr=0.1, momentum=0.9)),
    (optim.sgd, torch.optim.SGD, dict(lr=0.1, momentum=0.9, dampening=0.5, weight_decay=0.1)),
    (optim.sgd, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    (optim.adam, torch.optim.Adam, dict(lr=0.1)),
    (optim.adam, torch.optim.Adam, dict(lr=0.1, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.2)),
    (optim.adamw, torch.optim.AdamW, dict(lr=0.1)),
    (optim.adamw, torch.optim.AdamW, dict(lr=0.1, betas=(0.8, 0.99), weight_decay=0.5)),
]


@pytest.mark.parametrize("ours, theirs, options", CASES)
def test_against_torch(ours, theirs, options):
    params, loss = problem()
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    reference = theirs(leaves.values(), **options)
    opt = ours(**options)
    state = opt.init(params)
    for _ in range(5):
        reference.zero_grad()
        loss(leaves).backward()
        reference.step()
        params, state = opt.update(torchlift.grad(loss)(params), state, params)
        for name in params:
            close(params[name], leaves[name].detach())


@pytest.mark.parametrize("make", [lambda lr: optim.sgd(lr, 0.9), optim.adam, optim.adamw])
def test_differentiable_and_mapped(make):
    params, loss = problem()

    def after(lr):
        opt, p = make(lr), params
        state = opt.init(p)
        for _ in range(3):
            p, state = opt.update(torchlift.grad(loss)(p), state, p)
        return loss(p)

    lrs = torch.tensor([0.01, 0.05, 0.1], dtype=torch.float64)
    slopes = vmap(torchlift.grad(after))(lrs)
    h = 1e-6
    for lr, slope in zip(lrs, slopes):
        close(slope, (after(lr + h) - after(lr - h)) / (2 * h), rtol=1e-5, atol=1e-7)


def test_a_mapped_optimizer_for_each_member():
    params, loss = problem()
    opt = optim.adam(0.1)
    stacked = {k: torch.stack([v, 2 * v]) for k, v in params.items()}

    def step(p, state):
        return opt.update(torchlift.grad(loss)(p), state, p)

    state = vmap(opt.init)(stacked)
    both, _ = vmap(step)(*vmap(step)(stacked, state))
    one = params
    state = opt.init(one)
    for _ in range(2):
        one, state = step(one, state)
    for name in one:
        close(both[name][0], one[name])


def test_errors():
    with pytest.raises(TransformError, match="lr must be at least 0.0, got -1"):
        optim.sgd(-1)
    with pytest.raises(TransformError, match=r"betas\[1\] must be in \[0.0, 1.0\), got 1.5"):
        optim.adam(betas=(0.9, 1.5))
    with pytest.raises(TransformError, match="nesterov=True needs a momentum"):
        optim.sgd(0.1, nesterov=True)
    opt = optim.adam()
    params = [torch.zeros(2), torch.zeros(2)]
    with pytest.raises(TransformError, match="got 1 gradients for 2 parameters"):
        opt.update(params[:1], opt.init(params), params)
    with pytest.raises(TransformError, match="complex"):
        opt.init([torch.zeros(2, dtype=torch.complex64)])
