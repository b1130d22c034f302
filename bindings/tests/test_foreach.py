"""torch._foreach_*: as the single operators, under every transform. C++: batching/rules/foreach_test.cc."""

import pytest
import torch

import torchlift
from torchlift import grad, jvp, vmap

f64 = torch.float64
N = 3


@pytest.fixture(autouse=True)
def strict():
    with torchlift.strict():
        yield


def lists():
    return [torch.rand(N, 2, dtype=f64) + 0.5, torch.rand(N, 3, dtype=f64) + 0.5]


def stacked(f, *batches):
    results = [f(*row) for row in zip(*batches)]
    return tuple(torch.stack(r) for r in zip(*results))


def test_lists_of_batched_and_other_tensors():
    xs, w = torch.randn(N, 2), torch.randn(2)

    def f(x):
        a, b = torch._foreach_mul([x, w], [2.0, 3.0])
        return a, b, torch._foreach_norm([x, w])[0], torch._foreach_max([w, x])[1]

    for got, want in zip(vmap(f)(xs), stacked(f, xs)):
        torch.testing.assert_close(got, want)


def test_in_place_promotes_what_f_makes():
    def f(x):
        buffers = [torch.zeros(2), torch.zeros(2)]
        torch._foreach_add_(buffers, [x, torch.ones(2)], alpha=2)
        torch._foreach_mul_(buffers, 3.0)
        return tuple(buffers)

    xs = torch.randn(N, 2)
    for got, want in zip(vmap(f)(xs), stacked(f, xs)):
        torch.testing.assert_close(got, want)
    for got, want in zip(vmap(vmap(f))(xs[None]), stacked(f, xs)):
        torch.testing.assert_close(got[0], want)


def test_writes_into_a_tensor_from_outside_are_refused():
    outside = [torch.zeros(2)]
    with pytest.raises(RuntimeError, match="no batch dim"):
        vmap(lambda x: (torch._foreach_add_(outside, [x]), x)[1])(torch.randn(N, 2))
    assert torch.equal(outside[0], torch.zeros(2))


def step(a, b):
    """A step of Adam, as torch's foreach implementation takes it."""
    moments = torch._foreach_mul([a, b], 0.9)
    moments = torch._foreach_add(moments, torch._foreach_pow([a, b], 2), alpha=0.1)
    roots = torch._foreach_add(torch._foreach_sqrt(moments), 1e-3)
    new = torch._foreach_addcdiv([a, b], [a, b], roots, value=-0.1)
    return sum(t.sin().sum() for t in torch._foreach_lerp(new, [a, b], 0.3))


def test_derivatives():
    a, b = lists()
    slopes = vmap(grad(step))(a, b)
    leaf = a.clone().requires_grad_()
    total = sum(step(*row) for row in zip(leaf, b))
    (want,) = torch.autograd.grad(total, leaf)
    torch.testing.assert_close(slopes, want)
    through = grad(lambda x: vmap(step)(x, b).sum())(a)
    torch.testing.assert_close(through, want)
    direction = torch.randn_like(a)
    tangents = vmap(lambda x, y, t: jvp(lambda v: step(v, y), (x,), (t,))[1])(a, b, direction)
    torch.testing.assert_close(tangents, (want * direction).sum(1))
    twice = vmap(grad(lambda x, y: grad(step)(x, y).sum()))(a, b)
    step_size = 1e-6
    steps = [step_size * torch.eye(2, dtype=f64)[k] for k in range(2)]
    sums = [(vmap(grad(step))(a + s, b) - vmap(grad(step))(a - s, b)).sum(1) for s in steps]
    torch.testing.assert_close(twice, torch.stack(sums, 1) / (2 * step_size), rtol=1e-4, atol=1e-6)


def test_autocast_chooses_what_it_chooses_without_vmap():
    xs = torch.randn(N, 2, 2)

    def f(x):
        return torch._foreach_mm([x], [x])[0], torch._foreach_exp([x])[0]

    if not hasattr(torch, "_foreach_mm"):
        pytest.skip("younger than this torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for got, want in zip(vmap(f)(xs), stacked(f, xs)):
            assert got.dtype == want.dtype


def test_clipping_by_a_norm_that_differs():
    def clipped(x):
        total = torch._foreach_norm([x])[0]
        return torch._foreach_mul([x], torch.clamp(1.0 / (total + 1e-6), max=1.0))[0]

    xs = 3 * torch.randn(N, 2)
    want = torch.stack([clipped(x) for x in xs])
    torch.testing.assert_close(vmap(clipped)(xs), want)


def test_out_forms():
    xs = lists()

    def f(a, b):
        made = [torch.zeros(2, dtype=f64), torch.empty(0, dtype=f64)]
        torch.ops.aten._foreach_sin.out([a, b], out=made)
        sums = [torch.zeros_like(a), torch.zeros_like(b)]
        torch.ops.aten._foreach_add.List_out([a, b], made, alpha=2, out=sums)
        return *made, *sums

    a, b = xs
    for got, want in zip(vmap(f)(a, b), (a.sin(), b.sin(), a + 2 * a.sin(), b + 2 * b.sin())):
        torch.testing.assert_close(got, want)
    for got, want in zip(vmap(vmap(f))(a[None], b[None]), (a.sin(), b.sin())):
        torch.testing.assert_close(got[0], want)
    with pytest.raises(RuntimeError, match="`out` has 1 tensors, but there are 2 results"):
        vmap(lambda a, b: torch.ops.aten._foreach_sin.out([a, b], out=[torch.zeros(2)]))(a, b)
