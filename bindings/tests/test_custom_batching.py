"""custom_batching against the same function without it."""

import threading

import pytest
import torch

import torchlift
from torchlift import (
    TransformError,
    custom_batching,
    custom_vjp,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)

D = torch.float64


def make_scaled(factor=1.0):
    """f(x, w) = sum of w * x^3, whose rule does `factor` times that; calls are counted."""

    @custom_batching
    def scaled(x, w):
        return (w * x**3).sum()

    @scaled.defbatching
    def rule(size, batched, x, w):
        scaled.calls += 1
        for tensor, flag in ((x, batched[0]), (w, batched[1])):
            assert not flag or len(tensor) == size
        return factor * (w * x**3).sum(-1), True

    scaled.calls = 0
    return scaled


def plain(x, w):
    return (w * x**3).sum()


def points(*shape):
    count = torch.Size(shape).numel()
    return torch.linspace(-0.9, 1.1, count, dtype=D).reshape(shape)


TRANSFORMS = {
    "grad": grad,
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.ones((), dtype=D))[0],
    "jvp": lambda f: lambda x: jvp(f, (x,), (x.cos(),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacfwd of grad": lambda f: jacfwd(grad(f)),
    "grad of grad": lambda f: grad(lambda x: grad(f)(x).sin().sum()),
    "jvp of jvp": lambda f: lambda x: jvp(lambda y: jvp(f, (y,), (y,))[1], (x,), (x,))[1],
}


@pytest.mark.parametrize("factor", [1.0, 5.0])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, factor):
    t, w, xs = TRANSFORMS[name], points(3) + 2, points(4, 3)
    f = make_scaled(factor)

    def other(x, w):
        return factor * plain(x, w)

    def inside(g):
        return vmap(t(lambda x: g(x, w).sin()))(xs)

    def outside(g):
        return t(lambda x: vmap(g, in_dims=(0, None))(x, w).sin().sum())(xs)

    def of_shared(g):
        return t(lambda v: vmap(g, in_dims=(0, None))(xs, v).sin().sum())(w)

    def inside_of_shared(g):
        return vmap(lambda x: t(lambda v: g(x, v).sin())(w))(xs)

    # In the vmap of a Jacobian's own rows, the rule is applied there.
    for run in (inside, outside, of_shared, inside_of_shared):
        torch.testing.assert_close(run(f), run(other))
    assert f.calls > 0


def test_alone():
    f = make_scaled(5.0)
    x, w = points(3), points(3)
    assert torch.equal(f(x, w), plain(x, w)) and f.calls == 0
    torch.testing.assert_close(grad(f)(x, w), grad(plain)(x, w))
    assert f.calls == 0


def test_nested():
    f = make_scaled(5.0)
    x, w = points(2, 4, 3), points(2, 3)
    expected = 5 * vmap(vmap(plain, in_dims=(0, None)))(x, w)
    torch.testing.assert_close(vmap(vmap(f, in_dims=(0, None)))(x, w), expected)
    assert f.calls == 1
    x.requires_grad_(True)
    vmap(vmap(f, in_dims=(0, None)))(x, w).sum().backward()
    torch.testing.assert_close(x.grad, (15 * x**2 * w[:, None]).detach())


@pytest.mark.parametrize("size", [0, 1, 3])
def test_sizes(size):
    f, x, w = make_scaled(), points(3, size), points(3)
    expected = vmap(grad(plain), in_dims=(1, None), out_dims=-1)(x, w)
    torch.testing.assert_close(vmap(grad(f), in_dims=(1, None), out_dims=-1)(x, w), expected)


def test_numpy():
    @custom_batching
    def outside_of_torch(x):
        return torch.from_numpy(x.detach().numpy() * 2)

    @outside_of_torch.defbatching
    def rule(size, batched, x):
        return torch.from_numpy(x.detach().numpy() * 2), True

    x = points(4, 3)
    torch.testing.assert_close(vmap(outside_of_torch)(x), 2 * x)


def test_pytrees():
    @custom_batching
    def f(tree, scale):
        return {"sum": tree["x"] + tree["y"][0], "y": tree["y"][0] * scale}

    @f.defbatching
    def rule(size, batched, tree, scale):
        assert size == 4 and scale == 3
        assert batched == ({"x": True, "y": [False]}, False)
        y = tree["y"][0]
        return {"sum": tree["x"] + y, "y": y * scale}, {"sum": True, "y": False}

    x, y = points(4, 3), points(3)
    result = vmap(
        lambda row: f({"x": row, "y": [y]}, 3), out_dims={"sum": 0, "y": None}
    )(x)
    torch.testing.assert_close(result, {"sum": x + y, "y": 3 * y})


def test_in_custom_vjp():
    cube = custom_batching(lambda x: x**3)
    cube.defbatching(lambda size, batched, x: (x**3, True))

    @custom_vjp
    def square(x):
        return cube(x) / x

    square.defvjp(lambda x: (cube(x) / x, x), lambda x, g: (2 * g * cube(x) / x**2,))
    x = points(4) + 2
    torch.testing.assert_close(vmap(grad(square))(x), 2 * x)
    torch.testing.assert_close(grad(lambda x: vmap(square)(x).sum())(x), 2 * x)


def test_threads():
    f, x, w = make_scaled(), points(4, 3), points(3)
    expected = vmap(grad(plain), in_dims=(0, None))(x, w)
    failures = []

    def work():
        for _ in range(10):
            found = vmap(grad(f), in_dims=(0, None))(x, w)
            if not torch.allclose(found, expected):
                failures.append(found)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_errors():
    x = points(4, 3)

    def with_rule(rule):
        f = custom_batching(lambda x: (x,))
        f.defbatching(rule)
        return f

    with pytest.raises(TransformError, match="has no rule yet.*defbatching"):
        custom_batching(lambda x: x)(x)
    with pytest.raises(TypeError, match="must be a function"):
        custom_batching(3)
    cases = [
        (lambda size, batched, x: x, r"must return \(output, batched\)"),
        (lambda size, batched, x: ((x.sum(0),), True), r"shape \[3\] for result 0, whose first dim"),
        (lambda size, batched, x: ((x,), (True, True)), "must be a bool, or a tree of bools"),
        (lambda size, batched, x: ((3,), True), "must be a tree of tensors"),
    ]
    for rule, message in cases:
        with pytest.raises(TransformError, match=message):
            vmap(with_rule(rule))(x)

    def failing(size, batched, x):
        raise KeyError("rule")

    with pytest.raises(KeyError, match="rule"):
        vmap(with_rule(failing))(x)
    torch.testing.assert_close(vmap(torch.sin)(x), x.sin())  # no level is left open


def test_is_public():
    assert "custom_batching" in torchlift.__all__
    assert repr(make_scaled()).startswith("<custom_batching ")
