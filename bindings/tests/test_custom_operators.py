"""Operators that libtorch does not define (torch.library), under the transforms."""

import itertools

import pytest
import torch
import torchlift
from torch.nn import functional as F

names = itertools.count()


@pytest.fixture
def with_formula():
    """3 x, an operator with a formula for reverse mode."""

    @torch.library.custom_op(f"torchlift_test::thrice_{next(names)}", mutates_args=())
    def thrice(x: torch.Tensor) -> torch.Tensor:
        return 3 * x.detach()

    thrice.register_autograd(lambda ctx, g: 3 * g)
    return thrice


@pytest.fixture
def without_formula():
    """2 x, in code that autograd cannot see."""
    name = f"torchlift_test::twice_{next(names)}"
    torch.library.define(name, "(Tensor x) -> Tensor")
    torch.library.impl(name, "CPU", lambda x: torch.tensor(2 * x.detach().numpy()))
    return getattr(torch.ops.torchlift_test, name.split("::")[1])


X = torch.arange(3.0)


def test_a_formula_for_reverse_mode_is_used(with_formula):
    gradient = torchlift.grad(lambda x: (with_formula(x) ** 2).sum())
    assert torch.equal(gradient(X), 18 * X)
    assert torch.equal(torchlift.vmap(gradient)(X), 18 * X)
    assert torch.equal(torchlift.vmap(with_formula)(X), 3 * X)


def test_forward_mode_does_not_take_the_result_for_a_constant(with_formula):
    def push(x):
        return torchlift.jvp(with_formula, (x,), (torch.ones_like(x),))

    for f in (push, torchlift.vmap(push), torchlift.jacfwd(with_formula)):
        with pytest.raises(RuntimeError, match="no derivative formula for forward mode.*custom_jvp"):
            f(X)
    constant = torchlift.jvp(lambda x: x * with_formula(torchlift.stop_gradient(x)), (X,), (torch.ones(3),))
    assert torch.equal(constant[1], 3 * X)


def test_no_formula_at_all(without_formula):
    assert torch.equal(torchlift.vmap(without_formula)(X), 2 * X)
    with pytest.raises(RuntimeError, match="no derivative formula for forward mode"):
        torchlift.jvp(without_formula, (X,), (X,))
    with pytest.raises(RuntimeError, match="has no derivative formula, but was called on a tensor that autograd"):
        torchlift.vmap(torchlift.grad(without_formula))(X)
    x = torchlift.vmap(torchlift.grad(lambda x: x * without_formula(x.detach())))(X)
    assert torch.equal(x, 2 * X)


linear_cross_entropy = getattr(F, "linear_cross_entropy", None)


@pytest.mark.skipif(linear_cross_entropy is None, reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("target", ["indices", "probabilities"])
def test_chunked_linear_cross_entropy(reduction, target):
    """It is written in Python with buffers and out=, and defined when it is first used."""
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    x = torch.randn(4, 7, 5, dtype=torch.float64)
    w = torch.randn(3, 5, dtype=torch.float64)
    y = torch.randint(3, (4, 7)) if target == "indices" else torch.randn(4, 7, 3, dtype=torch.float64).softmax(-1)

    def loss(options):
        def f(x, w, y):
            return linear_cross_entropy(x, w, y, reduction=reduction, options=options).sum()

        return f

    chunked, plain = loss(LinearCrossEntropyOptions(batch_chunk_size=2)), loss(None)
    transforms = [
        lambda f: lambda: torchlift.vmap(f, in_dims=(0, None, 0))(x, w, y),
        lambda f: lambda: torchlift.grad(f, argnums=(0, 1))(x[0], w, y[0]),
        lambda f: lambda: torchlift.vmap(torchlift.grad(f, argnums=(0, 1)), in_dims=(0, None, 0))(x, w, y),
        lambda f: lambda: torchlift.jvp(lambda x, w: f(x, w, y[0]), (x[0], w), (x[1], w)),
        lambda f: lambda: torchlift.vmap(torchlift.hessian(f), in_dims=(0, None, 0))(x, w, y),
    ]
    with torchlift.strict():
        for transform in transforms:
            got, want = transform(chunked)(), transform(plain)()
            torch.testing.assert_close(got, want)
