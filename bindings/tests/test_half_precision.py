"""Half precision: rules and formulas that are made of other operators are as precise as libtorch's kernels.

Those compute in float inside. Against the same numbers in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchlift as tl

HALF = [torch.bfloat16, torch.float16]


def near(actual: Tensor, exact: Tensor, tolerance: float = 0.03) -> bool:
    return bool(((actual.double() - exact).abs() <= tolerance * exact.abs().max()).all())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "bicubic"])
def test_grid_sample_finds_the_pixels_of_a_large_image(dtype: torch.dtype, mode: str) -> None:
    """The pixel 300 * 300 / 2 + 1 is no number of half precision."""
    torch.manual_seed(0)
    image, tangent = torch.randn(2, 1, 1, 300, 300).to(dtype)
    grid = (torch.rand(1, 20, 20, 2) * 2 - 1).to(dtype)

    def pushed(image: Tensor, grid: Tensor, tangent: Tensor) -> Tensor:
        sample = lambda i: F.grid_sample(i, grid, mode=mode, align_corners=False)
        return tl.jvp(sample, (image,), (tangent.to(image.dtype),))[1]

    pushed_exactly = pushed(image.double(), grid.double(), tangent.double())
    # "nearest" may go to the other side of a boundary: float is not float64.
    close = (pushed(image, grid, tangent).double() - pushed_exactly).abs() < 0.05
    assert close.double().mean() > 0.98
    by_grid = lambda i, g, t: tl.jvp(lambda g: F.grid_sample(i, g, align_corners=False), (g,), (t,))[1]
    steps = torch.randn(grid.shape).to(dtype)
    exact = by_grid(image.double(), grid.double(), steps.double())
    assert near(by_grid(image, grid, steps), exact, 0.05)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    "attention",
    [
        F.scaled_dot_product_attention,
        lambda q, k, v: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0],
    ],
)
def test_attention_with_large_scores(dtype: torch.dtype, attention: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 8) * 8).to(dtype), (torch.randn(1, 2, 6, 8) * 8).to(dtype), torch.randn(1, 2, 6, 8).to(dtype)
    tangents = tuple(torch.randn(t.shape).to(dtype) for t in (q, k, v))
    as_double = lambda ts: tuple(t.double() for t in ts)

    pushed = tl.jvp(attention, (q, k, v), tangents)[1]
    assert pushed.dtype == dtype
    assert near(pushed, tl.jvp(attention, as_double((q, k, v)), as_double(tangents))[1])

    def gradient(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return tl.vjp(attention, q, k, v)[1](torch.ones_like(q))[2]

    pushed = tl.jvp(gradient, (q, k, v), tangents)[1]
    assert near(pushed, tl.jvp(gradient, as_double((q, k, v)), as_double(tangents))[1])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("f", [torch.softmax, torch.log_softmax, torch.logsumexp])
def test_softmax_of_large_logits(dtype: torch.dtype, f: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    x, t = (500 + 3 * torch.randn(4, 6)).to(dtype), torch.randn(4, 6).to(dtype)
    c = torch.randn(f(x, 1).shape).to(dtype)

    def gradient(x: Tensor, c: Tensor) -> Tensor:
        return tl.vjp(lambda x: f(x, 1), x)[1](c)[0]

    for transformed in (lambda x, c: f(x, 1), gradient):
        found = tl.jvp(lambda x: transformed(x, c.to(x.dtype)), (x,), (t,))[1]
        exact = tl.jvp(lambda x: transformed(x, c.double()), (x.double(),), (t.double(),))[1]
        assert found.dtype == dtype and near(found, exact)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_weights_of_layer_norm(dtype: torch.dtype) -> None:
    """Of numbers that are far from zero, in place of which their differences count."""
    torch.manual_seed(0)
    x = (100 + torch.randn(3, 5, 1)).to(dtype)
    weights, cotangent = torch.ones(3, 1, dtype=dtype), torch.randn(3, 5, 1).to(dtype)

    def gradient(x: Tensor, weight: Tensor, cotangent: Tensor) -> Tensor:
        return tl.vjp(lambda w: F.layer_norm(x, (1,), w), weight)[1](cotangent)[0]

    assert torch.equal(tl.vmap(gradient)(x, weights, cotangent), torch.zeros(3, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", HALF)
def test_logits_of_linear_cross_entropy(dtype: torch.dtype) -> None:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        pytest.skip("this torch has no linear_cross_entropy")
    torch.manual_seed(0)
    x, w = (4 * torch.randn(3, 4, 8)).to(dtype), (4 * torch.randn(6, 8)).to(dtype)
    target = (x.float() @ w.float().T).argmax(-1)  # small losses of large logits
    loss = lambda x, t: F.linear_cross_entropy(x, w.to(x.dtype), t, reduction="none", options=options(batch_chunk_size=2))
    found = tl.vmap(loss)(x, target)
    assert found.dtype == dtype
    exact = F.cross_entropy((x.double() @ w.double().T).flatten(0, 1), target.flatten(), reduction="none")
    torch.testing.assert_close(found.double(), exact.view(3, 4), rtol=0.02, atol=0.02)


def test_tangents_have_the_dtype_of_their_primals() -> None:
    x = torch.randn(3).to(torch.bfloat16)
    assert tl.jvp(lambda x: torch.frexp(x)[0], (x,), (x,))[1].dtype == torch.bfloat16
    assert tl.jacfwd(lambda x: torch.frexp(x)[0])(x).dtype == torch.bfloat16


def test_tangents_of_logcumsumexp_far_below_its_maximum() -> None:
    x = torch.tensor([-float("inf"), -1000.0, 0.0, 3.0], dtype=torch.float64)
    t = torch.tensor([7.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    tangent = tl.jvp(lambda x: torch.logcumsumexp(x, 0), (x,), (t,))[1]
    last = (2 + 3 * torch.tensor(3.0).double().exp()) / (1 + torch.tensor(3.0).double().exp())
    torch.testing.assert_close(tangent, torch.stack([torch.zeros_like(last), t[1], t[2], last]))
    z, dz = torch.randn(2, 6, dtype=torch.complex128)
    z = z + torch.tensor([-900, 0, 3000, 2999, 1, 3001])
    h = 1e-5
    slope = (torch.logcumsumexp(z + h * dz, 0) - torch.logcumsumexp(z - h * dz, 0)) / (2 * h)
    found = tl.jvp(lambda z: torch.logcumsumexp(z, 0), (z,), (dz,))[1]
    torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-6)


def test_complex_logsumexp_in_both_modes() -> None:
    torch.manual_seed(0)
    x, t = torch.randn(2, 4, 3, dtype=torch.complex128)
    c = torch.randn(3, dtype=torch.complex128)
    gradient = lambda x: tl.vjp(lambda x: torch.logsumexp(x, 0), x)[1](c)[0]
    h = 1e-5
    slope = (gradient(x + h * t) - gradient(x - h * t)) / (2 * h)
    torch.testing.assert_close(tl.jvp(gradient, (x,), (t,))[1], slope, rtol=1e-6, atol=1e-8)


def test_complex_ends_of_linspace_and_logspace() -> None:
    starts, ends = torch.randn(2, 3, dtype=torch.complex128)
    for space in (torch.linspace, torch.logspace):
        for steps in (0, 1, 2, 5):
            found = tl.vmap(lambda a, b: space(a, b, steps))(starts, ends)
            expected = torch.stack([space(a, b, steps) for a, b in zip(starts, ends)])
            torch.testing.assert_close(found.to(expected.dtype), expected, rtol=1e-5, atol=1e-5)
            assert found.dtype == expected.dtype
