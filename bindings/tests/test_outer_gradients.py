"""A gradient around vmap around a gradient, for operators whose backward is not differentiable unless told to be.

libtorch's derivative formulas look at GradMode to choose a kernel. In grad(vmap(grad(f))) nobody differentiates
the inner pass in its own domain, and yet it is differentiated: see NOTE [derivatives of a backward pass] in
autodiff/reverse.cc.
"""

import pytest
import torch
import torch.nn.functional as F

from torchlift import grad, vjp, vmap

torch.manual_seed(0)
MATRICES = torch.randn(3, 4, 4, dtype=torch.float64)
B = torch.randn(4, dtype=torch.float64)
ROWS = torch.tensor([0, 2, 2])


def silu_of_a_part(x):
    y = 2 * x
    F.silu(y[1:], inplace=True)
    return y


FUNCTIONS = {
    "silu, in place of a view": silu_of_a_part,
    "silu": F.silu,
    "mish": F.mish,
    "logit": lambda x: torch.logit(x.sigmoid() * 0.8 + 0.1),
    "group_norm": lambda x: F.group_norm(x[None], 2),
    "layer_norm": lambda x: F.layer_norm(x, (4,), B),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "det": torch.linalg.det,
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "solve": lambda x: torch.linalg.solve(x, B),
    "inv": torch.linalg.inv,
    "householder_product": lambda x: torch.linalg.householder_product(x / 4, x[0] / 4),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + torch.eye(4, dtype=x.dtype)),
    "embedding": lambda x: F.embedding(ROWS, x),
    "prod": lambda x: x.prod(1),
    "softmax": lambda x: x.softmax(-1),
}


def scalar(f):
    return lambda x: f(x).sin().sum()


def looped(f, xs):
    """The same by plain autograd, one example after the other."""
    leaves = [x.clone().requires_grad_() for x in xs]
    inner = [torch.autograd.grad(scalar(f)(x), x, create_graph=True)[0] for x in leaves]
    return torch.stack(torch.autograd.grad(torch.stack(inner).sin().sum(), leaves))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_grad_of_vmap_of_grad(name):
    f = FUNCTIONS[name]
    ours = grad(lambda xs: vmap(grad(scalar(f)))(xs).sin().sum())(MATRICES)
    torch.testing.assert_close(ours, looped(f, MATRICES))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_that_plain_autograd_tracks(name):
    f = FUNCTIONS[name]
    xs = MATRICES.clone().requires_grad_()
    per_example = vmap(grad(scalar(f)))(xs)
    ours = torch.autograd.grad(per_example.sin().sum(), xs)[0]
    torch.testing.assert_close(ours, looped(f, MATRICES))


def test_a_cotangent_that_is_tracked_outside():
    """Only the cotangent is: nothing that the function computed."""
    xs, cotangents = MATRICES, torch.randn(3, 4, 4, dtype=torch.float64)

    def pulled(cs):
        return vmap(lambda x, c: vjp(F.silu, x)[1](c)[0])(xs, cs).sin().sum()

    leaf = cotangents.clone().requires_grad_()
    x = xs.clone().requires_grad_()
    plain = torch.autograd.grad(F.silu(x), x, leaf, create_graph=True)[0].sin().sum()
    torch.testing.assert_close(grad(pulled)(cotangents), torch.autograd.grad(plain, leaf)[0])


def test_the_inner_gradient_itself_has_no_graph():
    outcome = []

    def f(x):
        g = grad(scalar(F.silu))(x)
        outcome.append(g.requires_grad)
        return g

    grad(lambda xs: vmap(f)(xs).sum())(MATRICES)
    assert outcome == [False]
