"""Second derivatives of the operators that have formulas of ours in forward mode.

NOTE [tangents] in autodiff/forward_kernels.cc. The oracle is reverse mode twice, by libtorch alone.
"""

from __future__ import annotations

from typing import Callable

import pytest
import torch
from torch.autograd.functional import hessian as double_backward

import torchlift

_C = torch.tensor([0.7, 1.9, 1.1, 0.4], dtype=torch.float64)


def _square(x: torch.Tensor) -> torch.Tensor:
    return x.view(2, 2)


def _cut(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        constant = torch.sin(x) * x
    return constant * x * x


FUNCTIONS: "dict[str, Callable[[torch.Tensor], torch.Tensor]]" = {
    "mul": lambda x: x * x.flip(0),
    "mul_number": lambda x: 3 * x * x * 2.5,
    "mul_constant": lambda x: (_C * x) * (x * _C),
    "mul_0d": lambda x: x * x[0],
    "mul_broadcast": lambda x: x[:, None] * x,
    "mul_transposed": lambda x: _square(x).t() * _square(x),
    "mul_expanded": lambda x: x.expand(3, 4) * (x * x),
    "mul_strided": lambda x: x[::2] * x[1::2] * x[:2],
    "mul_dtypes": lambda x: x.float().double() * x * x.to(torch.float64),
    "div": lambda x: x / x.flip(0),
    "div_constant": lambda x: x / _C + _C / x,
    "div_number": lambda x: (x / 3) * (2 / x),
    "add_broadcast": lambda x: (x[:, None] + x) ** 2,
    "add_alpha": lambda x: torch.add(x, x.flip(0), alpha=3) ** 3,
    "sub_alpha": lambda x: torch.sub(x, x[1], alpha=0.5) ** 3,
    "add_number": lambda x: (x + 2) * (1 - x) * (x - 0.5),
    "mm": lambda x: _square(x) @ _square(x).t(),
    "mm_constant": lambda x: _square(_C) @ _square(x) @ _square(_C) @ _square(x),
    "mv": lambda x: _square(x) @ x[2:],
    "dot": lambda x: x @ x.flip(0) * x,
    "bmm": lambda x: torch.bmm(x.view(2, 2, 1), x.view(2, 1, 2)),
    "addmm": lambda x: torch.addmm(x[:2], _square(x), _square(x), beta=2, alpha=3),
    "addmm_bias": lambda x: torch.addmm(x[1:3], _square(_C), _square(_C)) ** 2,
    "addmm_left": lambda x: torch.addmm(_C[:2], _square(x), _square(_C), alpha=2) ** 2,
    "addmm_right": lambda x: torch.addmm(x[2:], _square(_C), _square(x)) ** 2,
    "addmv": lambda x: torch.addmv(x[:2], _square(x), x[2:], beta=0.5, alpha=2),
    "addmv_constant": lambda x: torch.addmv(_C[:2], _square(_C), x[2:]) ** 3,
    "baddbmm": lambda x: torch.baddbmm(x.view(2, 1, 2), x.view(2, 2, 1), x.view(2, 1, 2), beta=3),
    "linear": lambda x: torch.nn.functional.linear(x[:2] * x[2:], _square(x), x[:2]),
    "sin": lambda x: torch.sin(x * x),
    "cos": lambda x: torch.cos(x * x[0]),
    "log": lambda x: torch.log(x * x + x),
    "exp": lambda x: torch.exp(x * x) * x,
    "tanh": lambda x: torch.tanh(torch.tanh(x * x) * x),
    "sigmoid": lambda x: torch.sigmoid(torch.sigmoid(x) * x.flip(0)),
    "relu": lambda x: torch.relu(x * x - 1) * x,
    "softmax": lambda x: torch.log_softmax(x * x, 0) * torch.softmax(x, 0),
    "pow_2": lambda x: (x * x[1]) ** 2,
    "pow_3": lambda x: x**3,
    "pow_1": lambda x: (x**1) * x,
    "pow_0": lambda x: (x**0) * x * x,
    "pow_half": lambda x: x**0.5,
    "pow_negative": lambda x: (x * x) ** -1.5,
    "mean": lambda x: (x * x).mean() * x.mean(0),
    "select": lambda x: x[0] * x[1] ** 2,
    "in_place": lambda x: (x * x).mul_(x).add_(x.flip(0) * x),
    "detach": lambda x: x.detach() * x * x,
    "no_grad": _cut,
}


def _point() -> torch.Tensor:
    return torch.tensor([0.9, 1.3, 0.6, 1.7], dtype=torch.float64)


def _weighted(f: "Callable[[torch.Tensor], torch.Tensor]") -> "Callable[[torch.Tensor], torch.Tensor]":
    """A number: the sum with weights that tell the outputs apart."""

    def number(x: torch.Tensor) -> torch.Tensor:
        y = f(x)
        weights = torch.linspace(1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        return (y * weights).sum()

    return number


@pytest.mark.parametrize("name", FUNCTIONS)
def test_hessian(name: str) -> None:
    f, x = _weighted(FUNCTIONS[name]), _point()
    expected = double_backward(f, x)
    torch.testing.assert_close(torchlift.hessian(f)(x), expected)
    twice_forward = torchlift.jacfwd(torchlift.jacfwd(f))(x)
    torch.testing.assert_close(twice_forward, expected)
    torch.testing.assert_close(torchlift.jacrev(torchlift.jacfwd(f))(x), expected)
    torch.testing.assert_close(torchlift.hessian_diag(f)(x), expected.diagonal())
    torch.testing.assert_close(torchlift.laplacian(f)(x), expected.trace())
    product = torchlift.hvp(f, (x,), (_C,))[1][0]
    torch.testing.assert_close(product, expected @ _C)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_under_vmap(name: str) -> None:
    f, x = _weighted(FUNCTIONS[name]), _point()
    xs = torch.stack([x, x.flip(0), x * 1.1], 1)  # The batch dim is the last: no value is contiguous.
    expected = torch.stack([double_backward(f, each) for each in xs.unbind(1)])
    for transform in (
        torchlift.hessian(f),
        torchlift.jacfwd(torchlift.jacfwd(f)),
        torchlift.jacrev(torchlift.jacfwd(f)),
        torchlift.hessian(f, chunk_size=1),
        torchlift.hessian(f, chunk_size=3),
    ):
        torch.testing.assert_close(torchlift.vmap(transform, in_dims=1)(xs), expected)
    traces = torchlift.vmap(torchlift.laplacian(f), in_dims=1)(xs)
    torch.testing.assert_close(traces, expected.diagonal(dim1=1, dim2=2).sum(1))
    # A vmap inside of the derivatives.
    total = lambda xs: torchlift.vmap(f, in_dims=1)(xs).sum()
    blocks = torchlift.hessian(total)(xs)
    for i in range(xs.shape[1]):
        torch.testing.assert_close(blocks[:, i, :, i], expected[i])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_third_derivative(name: str) -> None:
    g, x = _weighted(FUNCTIONS[name]), _point()
    f = lambda x: g(x) + (x**3).sum()  # Some third derivative, where the function has none.

    def curvature(x: torch.Tensor) -> torch.Tensor:
        h = torch.func.jacrev(torch.func.grad(f))(x)
        return (h * torch.outer(_C, _C)).sum()

    expected = torch.func.grad(curvature)(x)
    ours = lambda x: (torchlift.hessian(f)(x) * torch.outer(_C, _C)).sum()
    torch.testing.assert_close(torchlift.grad(ours)(x), expected)
    torch.testing.assert_close(torchlift.jacfwd(ours)(x), expected)
    tracked = x.clone().requires_grad_()
    (outside,) = torch.autograd.grad(ours(tracked), tracked)
    torch.testing.assert_close(outside, expected)


def test_weights_from_outside() -> None:
    """The gradient of a Hessian by a weight that the function closes over."""
    w = _C.clone().requires_grad_()
    f = lambda x: torch.tanh(x * w).pow(2).sum()
    x = _point()
    (ours,) = torch.autograd.grad(torchlift.hessian(f)(x).diagonal().sum(), w)
    step = 1e-5

    def trace(w: torch.Tensor) -> torch.Tensor:
        return double_backward(lambda x: torch.tanh(x * w).pow(2).sum(), x).trace()

    for i in range(4):
        e = torch.zeros(4, dtype=torch.float64)
        e[i] = step
        slope = (trace(w.detach() + e) - trace(w.detach() - e)) / (2 * step)
        torch.testing.assert_close(ours[i], slope, rtol=1e-6, atol=1e-6)


def test_no_dims() -> None:
    x = torch.tensor(0.7, dtype=torch.float64)
    for f in (lambda x: x * x * x, torch.sin, lambda x: torch.tanh(x) / x, lambda x: 2 - x**4):
        expected = double_backward(f, x)
        torch.testing.assert_close(torchlift.hessian(f)(x), expected)
        torch.testing.assert_close(torchlift.jacfwd(torchlift.grad(f))(x), expected)


def test_complex_tangents() -> None:
    x = torch.tensor([0.3 + 0.5j, 1.2 - 0.4j], dtype=torch.complex128)
    t = torch.tensor([1.0 - 1j, 0.5 + 2j], dtype=torch.complex128)
    for f in (
        lambda x: x * x.flip(0),
        lambda x: x / x.flip(0),
        lambda x: torch.sin(x) + torch.cos(x) * torch.log(x),
        lambda x: torch.tanh(x) * torch.sigmoid(x),
        lambda x: x**3 + x**-1,
    ):
        step = 1e-6
        slope = (f(x + step * t) - f(x - step * t)) / (2 * step)
        torch.testing.assert_close(torchlift.jvp(f, (x,), (t,))[1], slope, rtol=1e-6, atol=1e-6)


def test_hessian_of_trees() -> None:
    """One call gives the blocks that jacfwd of jacrev gives, whatever argnums names."""
    params = {"w": _point(), "b": torch.tensor(0.3, dtype=torch.float64)}

    def f(params: "dict[str, torch.Tensor]", x: torch.Tensor, scale: float = 1.0) -> "dict":
        y = params["w"] * x + params["b"] * scale
        return {"sum": (y**3).sum(), "pair": (y[:2] * y[2:], params["b"] ** 2)}

    for argnums in (0, (0, 1), -1, "params", (0, "w"), [(0, "w"), (1,)]):
        inner = torchlift.jacrev(f, argnums)
        expected = torchlift.jacfwd(inner, argnums)(params, _C, scale=2.0)
        ours = torchlift.hessian(f, argnums)(params, _C, scale=2.0)
        torch.testing.assert_close(ours, expected)
    with_aux = lambda params, x: (f(params, x), {"kept": x.sum(), "name": "aux"})
    hessian, aux = torchlift.hessian(with_aux, has_aux=True)(params, _C)
    torch.testing.assert_close(hessian, torchlift.hessian(f)(params, _C))
    assert aux["name"] == "aux"
    torch.testing.assert_close(aux["kept"], _C.sum())
    square = lambda z: (z * z * z).sum()
    z = torch.tensor([1 + 2j, 0.5j], dtype=torch.complex128)
    torch.testing.assert_close(torchlift.hessian(square, holomorphic=True)(z), torch.diag(6 * z))
    real = torchlift.hessian(lambda z: (z.abs() ** 2).sum(), real_view=True)(z)
    torch.testing.assert_close(real.reshape(4, 4), 2 * torch.eye(4, dtype=torch.float64))


def test_tangents_outlive_an_inner_vmap():
    """The tangent of a sum with a constant is a copy, of the level of the tangent it is copied from."""
    x, w, b = torch.rand(4, 3, dtype=torch.float64), torch.rand(3, dtype=torch.float64), torch.rand((), dtype=torch.float64)

    def f(w, b):
        return torchlift.vmap(lambda row: (row * w).sum() + (b * 3 + (b - 1).detach()))(x)

    value, tangent = torchlift.jvp(f, (w, b), (w.cos(), b.cos()))
    torch.testing.assert_close(tangent, x @ w.cos() + 3 * b.cos())
    torch.testing.assert_close(value, x @ w + 4 * b - 1)


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16, torch.float64])
def test_a_hessian_has_the_dtype_of_the_input(out: torch.dtype) -> None:
    """As a gradient has: the second derivatives of this loss are too large for float16."""
    x = torch.tensor([0.05, 0.15])
    f = lambda x: (300 * x).square().sum().to(out)
    expected = torch.func.hessian(f)(x)
    for found in (
        torchlift.hessian(f)(x),
        torchlift.vmap(torchlift.hessian(f))(x[None])[0],
        torchlift.hessian(f, chunk_size=1)(x),
        torchlift.jit(torchlift.hessian(f))(x),
    ):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected)
