"""MAML, NTK, Fisher and GGN: against closed forms, plain autograd and loops."""

import pytest
import torch
from torch import nn

import torchlift
from torchlift import TransformError, grad, optim, vmap

close = torch.testing.assert_close
f64 = torch.float64


def regression(params, x, y):
    w, b = params
    return (x @ w + b - y).square().mean()


def task():
    params = (torch.randn(3, dtype=f64), torch.randn((), dtype=f64))
    batch = lambda: (torch.randn(6, 3, dtype=f64), torch.randn(6, dtype=f64))  # noqa: E731
    return params, batch(), batch()


def by_hand(params, support, query, steps, lr, create_graph):
    leaves = [p.clone().requires_grad_() for p in params]
    current = leaves
    for _ in range(steps):
        grads = torch.autograd.grad(regression(current, *support), current, create_graph=create_graph)
        current = [p - lr * g for p, g in zip(current, grads)]
    return torch.autograd.grad(regression(current, *query), leaves)


@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_maml(steps, first_order):
    params, support, query = task()
    meta = torchlift.maml(regression, steps=steps, lr=0.1, first_order=first_order)
    got = grad(meta)(params, support, query)
    for g, w in zip(got, by_hand(params, support, query, steps, 0.1, not first_order)):
        close(g, w)


def test_maml_over_tasks():
    params, _, _ = task()
    tasks = [task()[1:] for _ in range(4)]
    stacked = [tuple(torch.stack(t) for t in zip(*part)) for part in zip(*tasks)]
    meta = torchlift.maml(regression, steps=2, lr=0.1)
    mean = lambda p: vmap(meta, in_dims=(None, 0, 0))(p, *stacked).mean()  # noqa: E731
    got = grad(mean)(params)
    singles = [by_hand(params, s, q, 2, 0.1, True) for s, q in tasks]
    for i in range(2):
        close(got[i], sum(s[i] for s in singles) / 4)


def test_maml_learns_its_learning_rate_and_optimizer():
    params, support, query = task()
    f = lambda lr: torchlift.maml(regression, steps=2, lr=lr)(params, support, query)  # noqa: E731
    lr, h = torch.tensor(0.1, dtype=f64), 1e-6
    close(grad(f)(lr), (f(lr + h) - f(lr - h)) / (2 * h), rtol=1e-6, atol=1e-8)
    adapted = torchlift.adapt(regression, params, *support, steps=3, optimizer=optim.adam(0.1))
    opt = optim.adam(0.1)
    state, p = opt.init(params), params
    for _ in range(3):
        p, state = opt.update(grad(regression)(p, *support), state, p)
    for a, b in zip(adapted, p):
        close(a, b)


def test_implicit_maml():
    """For a quadratic loss the minimum of the inner loop and the meta-gradient have closed forms."""
    a = torch.randn(4, 4, dtype=f64)
    hessian = a @ a.T + torch.eye(4, dtype=f64)
    support, target = torch.randn(4, dtype=f64), torch.randn(4, dtype=f64)
    loss = lambda p, c: 0.5 * (p - c) @ hessian @ (p - c)  # noqa: E731
    params, strength = torch.randn(4, dtype=f64), 2.0
    run = torchlift.implicit_maml_grad(
        loss, steps=2000, lr=0.02, regularization=strength, cg_steps=8
    )
    got, value = run(params, (support,), (target,))
    eye = torch.eye(4, dtype=f64)
    best = torch.linalg.solve(hessian + strength * eye, hessian @ support + strength * params)
    g = hessian @ (best - target)
    close(got, torch.linalg.solve(eye + hessian / strength, g), rtol=1e-6, atol=1e-8)
    close(value, loss(best, target))
    mapped, _ = vmap(run, in_dims=(None, 0, 0))(
        params, (torch.stack([support, target]),), (torch.stack([target, support]),)
    )
    close(mapped[0], got)


def model_and_params():
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    params, _ = torchlift.extract_state(model)
    return params, lambda p, x: torchlift.functional_call(model, p, x)


def jacobians(f, params, xs):
    names = list(params)
    rows = []
    for x in xs:
        g = lambda *values: f(dict(zip(names, values)), x)  # noqa: E731, B023
        jac = torch.autograd.functional.jacobian(g, tuple(params.values()))
        rows.append(torch.cat([j.flatten(1) for j in jac], 1))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_ntk(chunk_size):
    params, f = model_and_params()
    x1, x2 = torch.randn(4, 3, dtype=f64), torch.randn(3, 3, dtype=f64)
    j1, j2 = jacobians(f, params, x1), jacobians(f, params, x2)
    run = lambda *x, **kw: torchlift.empirical_ntk(f, params, *x, chunk_size=chunk_size, **kw)  # noqa: E731
    full = torch.einsum("nkp,mlp->nmkl", j1, j2)
    close(run(x1, x2), full)
    close(run(x1, x2, compute="trace"), full.diagonal(dim1=2, dim2=3).sum(-1))
    close(run(x1, x2, compute="diagonal"), full.diagonal(dim1=2, dim2=3))
    close(run(x1), torch.einsum("nkp,mlp->nmkl", j1, j1))
    with pytest.raises(TransformError, match="compute must be one of"):
        run(x1, compute="all")


def test_fisher_and_ggn():
    params, f = model_and_params()
    xs, ys = torch.randn(6, 3, dtype=f64), torch.randint(0, 2, (6,))
    nll = lambda out, y: nn.functional.cross_entropy(out, y)  # noqa: E731
    per_example = lambda p, x, y: nll(f(p, x), y)  # noqa: E731
    fisher = torchlift.fisher_diagonal(per_example, params, xs, ys)
    ggn = torchlift.ggn_diagonal(f, nll, params, xs, ys)
    jac = jacobians(f, params, xs)
    want_f, want_g = 0, 0
    for j, x, y in zip(jac, xs, ys):
        out = f(params, x).detach()
        p = out.softmax(0)
        residual = p - nn.functional.one_hot(y, 2)
        want_f = want_f + (residual @ j).square() / 6
        want_g = want_g + torch.einsum("kp,kl,lp->p", j, p.diag() - p.outer(p), j) / 6
    close(torch.cat([t.flatten() for t in fisher.values()]), want_f)
    close(torch.cat([t.flatten() for t in ggn.values()]), want_g)


def test_errors():
    with pytest.raises(TransformError, match="steps must be at least 0, got -1"):
        torchlift.adapt(regression, *task()[:1], steps=-1)
    with pytest.raises(TransformError, match="regularization must be above 0"):
        torchlift.implicit_maml_grad(regression, steps=1, regularization=0.0)
    none = torch.ones(0)
    with pytest.raises(TransformError, match="fisher_diagonal: the batch has no examples"):
        torchlift.fisher_diagonal(lambda w, x: w * x, torch.tensor(1.0), none)
    with pytest.raises(TransformError, match="ggn_diagonal: the batch has no examples"):
        torchlift.ggn_diagonal(lambda w, x: w * x, lambda y: y * y, torch.tensor(1.0), none)
