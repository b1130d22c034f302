"""Transforms in torch.inference_mode(): the same numbers as outside."""

import pytest
import torch
from torch import nn

import torchlift
from torchlift import grad, hessian, jacfwd, jacrev, jit, jvp, vjp, vmap

D = torch.float64
W = torch.randn(2, 2, dtype=D, generator=torch.Generator().manual_seed(0))
MODEL = nn.Linear(2, 1, dtype=D)


def loss(x):
    return (W @ x).tanh().square().sum()


def of_parameters(x):
    params = {name: p.detach() for name, p in MODEL.named_parameters()}
    per_sample = grad(lambda p, x: torchlift.functional_call(MODEL, p, (x,)).square().sum())
    return vmap(per_sample, in_dims=(None, 0))(params, x)


def into_what_it_makes(x):
    y = x * 2
    y[0] = x[1]
    return y.add_(1).sin().sum()


PROGRAMS = {
    "vmap": lambda x: vmap(loss)(x),
    "grad": lambda x: grad(loss)(x[0]),
    "grad_and_value": lambda x: torchlift.grad_and_value(loss)(x[0]),
    "vjp": lambda x: vjp(torch.sin, x)[1](x)[0],
    "jvp": lambda x: jvp(torch.sin, (x,), (x,)),
    "jacrev": lambda x: jacrev(torch.sin)(x[0]),
    "jacfwd": lambda x: jacfwd(torch.sin)(x[0]),
    "hessian": lambda x: hessian(loss)(x[0]),
    "laplacian": lambda x: torchlift.laplacian(loss)(x[0]),
    "hvp": lambda x: torchlift.hvp(loss, (x[0],), (x[1],)),
    "jet": lambda x: torchlift.jet(loss, (x[0],), (x[1][None],)),
    "grad of grad": lambda x: grad(lambda y: grad(loss)(y).square().sum())(x[0]),
    "jvp of grad": lambda x: jvp(grad(loss), (x[0],), (x[1],)),
    "vmap of grad": lambda x: vmap(grad(loss))(x),
    "vmap of vjp": lambda x: vmap(lambda y: vjp(torch.sin, y)[1](y)[0])(x),
    "vmap of jvp": lambda x: vmap(lambda y: jvp(loss, (y,), (y,))[1])(x),
    "vmap of jacrev": lambda x: vmap(jacrev(torch.sin))(x),
    "vmap of jacfwd": lambda x: vmap(jacfwd(torch.sin))(x),
    "vmap of hessian": lambda x: vmap(hessian(loss))(x),
    "grad of vmap of grad": lambda x: grad(lambda y: vmap(grad(loss))(y).square().sum())(x),
    "per-sample gradients": of_parameters,
    "closed over outside": lambda x: grad(lambda y: (y * W).sin().sum())(x[:2]),
    "mapped over": lambda x: vmap(lambda y, w: grad(lambda y: (y * w).sin().sum())(y))(x, x + 1),
    "in place": lambda x: vmap(grad(into_what_it_makes))(x),
    "chunks": lambda x: vmap(grad(loss), chunk_size=2)(x),
    "jit of grad": lambda x: jit(grad(loss))(x[0]),
    "jit of vmap of grad": lambda x: jit(vmap(grad(loss)))(x),
    "trace": lambda x: torchlift.trace(vmap(grad(loss)))(x)(x),
    "scan": lambda x: vmap(grad(lambda y: torchlift.scan(lambda h, _: (h * h, h.sin()), y, None, length=3)[1].sum()))(x),
}


@pytest.mark.parametrize("made", ["inside", "outside"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_gives_the_same_numbers(name, made):
    x = torch.arange(1.0, 7.0, dtype=D).reshape(3, 2) / 4
    expected = PROGRAMS[name](x)
    with torch.inference_mode():
        given = x * 1 if made == "inside" else x
        assert given.is_inference() == (made == "inside")
        got = PROGRAMS[name](given)
        assert torch.is_inference_mode_enabled()
    torch.testing.assert_close(got, expected)
    assert torchlift._C.open_levels() == 0 and torch.is_grad_enabled()
    torch.testing.assert_close(PROGRAMS[name](x), expected)  # nothing is left behind


def test_gradients_stay_off_in_a_vmap():
    seen = []
    with torch.inference_mode():
        vmap(lambda x: seen.append(torch.is_grad_enabled()) or x)(torch.ones(3))
        vmap(grad(lambda x: seen.append(torch.is_grad_enabled()) or x))(torch.ones(3))
    assert seen == [False, True]


def test_an_error_leaves_the_mode_on():
    def fails(x):
        raise ZeroDivisionError

    with torch.inference_mode():
        for transform in (grad, vmap, jacfwd, hessian, lambda f: vmap(grad(f))):
            with pytest.raises(ZeroDivisionError):
                transform(fails)(torch.ones(3))
            assert torch.is_inference_mode_enabled() and not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_what_autograd_cannot_save():
    with torch.inference_mode():
        w = W * 2
        x = torch.ones(2, dtype=D)
        for f, arguments in [(lambda x: (x * w).sum(), (x,)), (lambda x, w: (x * w).sum(), (x, w))]:
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                grad(f)(*arguments)
        torch.testing.assert_close(grad(lambda x, w: (x * w).sum(), argnums=(0, 1))(x, w)[0], w.sum(0))
