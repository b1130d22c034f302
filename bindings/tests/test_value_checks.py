"""Functions of torch that look at values only to check them: NOTE [checks of values]."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import distributions as D
from torch import nn

import torchlift
from torchlift import grad, vmap

f64 = torch.float64
N = 3


@pytest.fixture(autouse=True)
def strict():
    with torchlift.strict():
        yield


def rows(*shape):
    return torch.randn(N, *shape, dtype=f64)


@pytest.mark.parametrize("var_shape", [(4, 2), (4, 1), (4,)])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gaussian_nll_loss(var_shape, reduction):
    x, y, var = rows(4, 2), rows(4, 2), rows(*var_shape).exp()

    def loss(*args):
        return F.gaussian_nll_loss(*args, reduction=reduction, full=True)

    want = torch.stack([loss(*args) for args in zip(x, y, var)])
    torch.testing.assert_close(vmap(loss)(x, y, var), want)
    torch.testing.assert_close(vmap(vmap(loss))(x[None], y[None], var[None]), want[None])
    got = vmap(grad(lambda *args: loss(*args).sum(), argnums=2))(x, y, var)
    leaf = var.clone().requires_grad_()
    sums = [loss(*args).sum() for args in zip(x, y, leaf)]
    torch.testing.assert_close(got, torch.autograd.grad(sum(sums), leaf)[0])


def test_gaussian_nll_loss_sees_the_variance_of_every_example():
    var = torch.ones(N, 2)
    var[2, 1] = -1  # one of one example
    x = torch.randn(N, 2)
    for mapped in (vmap(F.gaussian_nll_loss), vmap(nn.GaussianNLLLoss())):
        with pytest.raises(ValueError, match="var has negative entry"):
            mapped(x, x, var)
    with pytest.raises(ValueError, match="var has negative entry"):
        vmap(F.gaussian_nll_loss)(x, x, -torch.ones(N, 2))
    with pytest.raises(ValueError, match="var has negative entry"):
        vmap(vmap(F.gaussian_nll_loss))(x[None], x[None], var[None])
    with pytest.raises(ValueError, match="var has negative entry"):
        F.gaussian_nll_loss(x, x, var)  # as without torchlift
    assert vmap(F.gaussian_nll_loss)(x[:0], x[:0], var[:0]).shape == (0,)


def test_the_functions_stay_what_they_were():
    assert list(inspect.signature(F.gaussian_nll_loss).parameters)[:3] == ["input", "target", "var"]
    assert "var has negative entry" in inspect.getsource(F.gaussian_nll_loss)
    x = torch.randn(4)
    torch.testing.assert_close(
        F.gaussian_nll_loss(x, x + 1, torch.ones(4)), torch.tensor(0.5), check_dtype=False
    )


DISTRIBUTIONS = {
    "Normal": lambda p: D.Normal(p, p.exp()),
    "Bernoulli": lambda p: D.Bernoulli(p.sigmoid()),
    "Beta": lambda p: D.Beta(p.exp(), 2.0),
    "Categorical": lambda p: D.Categorical(logits=torch.stack([p, 2 * p, 1 - p], -1)),
    "ContinuousBernoulli": lambda p: D.ContinuousBernoulli(p.sigmoid()),
    "Dirichlet": lambda p: D.Dirichlet(torch.stack([p.exp(), 1 + p.exp()])),
    "Exponential": lambda p: D.Exponential(p.exp()),
    "Gamma": lambda p: D.Gamma(p.exp(), p.exp()),
    "Geometric": lambda p: D.Geometric(torch.stack([p.sigmoid()])),
    "Geometric of a number": lambda p: D.Geometric(p.sigmoid()),
    "Geometric of a logit": lambda p: D.Geometric(logits=p),
    "Laplace": lambda p: D.Laplace(p, 1.0),
    "MultivariateNormal": lambda p: D.MultivariateNormal(
        torch.stack([p, p]), (1 + p.exp()) * torch.eye(2, dtype=f64)
    ),
    "Poisson": lambda p: D.Poisson(p.exp()),
    "StudentT": lambda p: D.StudentT(2 + p.exp(), p),
    "Uniform": lambda p: D.Uniform(p - 1, p + 1),
}
VALUES = {
    "Beta": torch.tensor(0.3, dtype=f64),
    "ContinuousBernoulli": torch.tensor(0.3, dtype=f64),
    "Dirichlet": torch.tensor([0.3, 0.7], dtype=f64),
    "MultivariateNormal": torch.tensor([0.3, 0.7], dtype=f64),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distributions_check_their_arguments(name):
    make = DISTRIBUTIONS[name]
    p = torch.tensor([-0.4, 0.1, 0.3], dtype=f64)
    value = VALUES.get(name, torch.tensor(0.0 if name == "Uniform" else 1.0, dtype=f64))

    def log_prob(q):
        return make(q).log_prob(value).sum()

    want = torch.stack([log_prob(q) for q in p])
    torch.testing.assert_close(vmap(log_prob)(p), want)
    leaf = p.clone().requires_grad_()
    slopes = torch.autograd.grad(sum(log_prob(q) for q in leaf), leaf, allow_unused=True)[0]
    slopes = torch.zeros(N, dtype=f64) if slopes is None else slopes
    torch.testing.assert_close(vmap(grad(log_prob))(p), slopes)


def test_a_number_for_each_example_prints_as_what_it_is():
    seen = []

    def f(x):
        seen.append(f"{x}")
        seen.append(f"{torch.zeros(())}")
        return x

    vmap(f)(torch.arange(3.0))
    assert seen[0].startswith("LiftedTensor(vmap level 1") and seen[1] == "0.0"
    assert f"{torch.tensor(1.5)}" == "1.5" and f"{torch.tensor(1.5):.2f}" == "1.50"


@pytest.fixture
def checked_arguments():
    """Distributions check their arguments, unless torch._dynamo has been imported."""
    previous = D.Distribution._validate_args
    D.Distribution.set_default_validate_args(True)
    yield
    D.Distribution.set_default_validate_args(previous)


def test_distributions_refuse_one_bad_example(checked_arguments):
    scales = torch.tensor([1.0, -1.0, 1.0])
    with pytest.raises(ValueError, match="Expected parameter scale"):
        vmap(lambda s: D.Normal(0.0, s).log_prob(torch.zeros(())))(scales)
    with pytest.raises(ValueError, match="within the support"):
        vmap(lambda v: D.Exponential(torch.ones(())).log_prob(v))(scales)
    with pytest.raises(ValueError, match="invalid values"):
        vmap(lambda s: D.Geometric(s).mean)(scales)
    covariances = torch.eye(2).expand(3, 2, 2) * scales[:, None, None]
    with pytest.raises(ValueError, match="covariance_matrix"):
        vmap(lambda c: D.MultivariateNormal(torch.zeros(2), c).entropy())(covariances)


@pytest.mark.parametrize("shape", [(5,), ()])
def test_adaptive_log_softmax(shape):
    module = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6], head_bias=True).to(f64)
    x, target = rows(*shape, 4), torch.randint(0, 9, (N, *shape))
    want = [module(v, t) for v, t in zip(x, target)]
    got = vmap(module)(x, target)
    torch.testing.assert_close(got.output, torch.stack([w.output for w in want]))
    torch.testing.assert_close(got.loss, torch.stack([w.loss for w in want]))
    shared = vmap(lambda t: module(x[0], t).loss)(target)
    torch.testing.assert_close(shared, torch.stack([module(x[0], t).loss for t in target]))
    slopes = vmap(grad(lambda v, t: module(v, t).loss))(x, target)
    leaf = x.clone().requires_grad_()
    total = sum(module(v, t).loss for v, t in zip(leaf, target))
    torch.testing.assert_close(slopes, torch.autograd.grad(total, leaf)[0])


def test_adaptive_log_softmax_predicts_and_refuses():
    module = nn.AdaptiveLogSoftmaxWithLoss(4, 9, [3, 6]).to(f64)
    x = rows(5, 4)
    assert torch.equal(vmap(module.predict)(x), torch.stack([module.predict(v) for v in x]))
    target = torch.tensor([[0, 1], [2, 9]])
    with pytest.raises(RuntimeError, match=r"Target values should be in \[0, 8\]"):
        vmap(lambda t: module(x[0, :2], t).loss)(target)
    with pytest.raises(RuntimeError, match="same size in the batch dimension"):
        vmap(module)(x, torch.zeros(N, 4, dtype=torch.long))
