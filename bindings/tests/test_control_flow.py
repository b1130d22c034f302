"""cond, while_loop, fori_loop and scan, against Python's if, while and for on one row at a time."""

import itertools
import math

import pytest
import torch

import torchlift
from torchlift import TransformError, UnsupportedError, grad, hessian, jacfwd, jacrev, jvp, vmap

D = torch.float64


def rows(*values):
    return torch.tensor(values, dtype=D)


def loop(f, *args, in_dims=None):
    """f row by row."""
    dims = in_dims or [0] * len(args)
    size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    outs = []
    for i in range(size):
        outs.append(f(*(a if d is None else a.select(d, i) for a, d in zip(args, dims))))
    if isinstance(outs[0], tuple):
        return tuple(torch.stack(part) for part in zip(*outs))
    return torch.stack(outs)


# Each function twice: with ours, and with Python's own.


def halve(x):
    """Newton-like: the number of steps depends on x."""
    return torchlift.while_loop(lambda c: c > 1, lambda c: c / 2 + 0.1 * c.sin(), x)


def halve_py(x):
    while bool(x > 1):
        x = x / 2 + 0.1 * x.sin()
    return x


def root(x):
    return torchlift.cond(x > 0, lambda x: x.sqrt() + x.log(), lambda x: x * x, x)


def root_py(x):
    return x.sqrt() + x.log() if bool(x > 0) else x * x


def newton(a):
    """Closes over a, which differs from row to row."""
    step = lambda c: (0.5 * (c[0] + a / c[0]), c[1] + 1)
    return torchlift.while_loop(lambda c: (c[0] * c[0] - a).abs() > 1e-9, step, (a, 0))[0]


def newton_py(a):
    x = a
    while bool((x * x - a).abs() > 1e-9):
        x = 0.5 * (x + a / x)
    return x


def cumulate(x):
    """A scan of x's own size, with a branch in it."""
    xs = x * torch.arange(1.0, 4.0, dtype=D)

    def step(total, item):
        total = torchlift.cond(total > item, lambda: total - item.exp(), lambda: total * item)
        return total, total.sin()

    total, ys = torchlift.scan(step, x, xs)
    return total + ys.prod()


def cumulate_py(x):
    total, ys = x, []
    for item in x * torch.arange(1.0, 4.0, dtype=D):
        total = total - item.exp() if bool(total > item) else total * item
        ys.append(total.sin())
    return total + torch.stack(ys).prod()


def powers(x):
    """As many factors as x is large."""
    n = x.abs().floor().long()
    return torchlift.fori_loop(0, n, lambda i, y: y * x + i, torch.ones((), dtype=D))


def powers_py(x):
    y = torch.ones_like(x)
    for i in range(int(x.detach().abs().floor())):
        y = y * x + i
    return y


def nested(x):
    """A loop in a branch in a loop."""

    def body(c):
        return torchlift.cond(
            c > 4,
            lambda c: torchlift.while_loop(lambda d: d > 3, lambda d: d - x.abs() - 1, c),
            lambda c: c - 0.3 * x.cos().abs() - 0.2,
            c,
        )

    return torchlift.while_loop(lambda c: c > 1, body, x * x)


def nested_py(x):
    c = x * x
    while bool(c > 1):
        if bool(c > 4):
            while bool(c > 3):
                c = c - x.abs() - 1
        else:
            c = c - 0.3 * x.cos().abs() - 0.2
    return c


FUNCTIONS = {
    "while": (halve, halve_py),
    "cond": (root, root_py),
    "captured": (newton, newton_py),
    "scan": (cumulate, cumulate_py),
    "fori": (powers, powers_py),
    "nested": (nested, nested_py),
}
X = rows(7.3, 0.5, 2.25, 16.1, 1.2, 3.3)

every = pytest.mark.parametrize("name", FUNCTIONS)


@every
def test_without_vmap(name):
    f, py = FUNCTIONS[name]
    for x in X:
        assert torch.equal(f(x), py(x))


@every
@pytest.mark.parametrize("size", [0, 1, 6])
def test_vmap_is_the_loop(name, size):
    f, py = FUNCTIONS[name]
    out = vmap(f)(X[:size])
    assert out.shape == (size,) and out.dtype == D
    if size:
        torch.testing.assert_close(out, loop(py, X[:size]))


@every
def test_all_rows_alike(name):
    f, py = FUNCTIONS[name]
    for x in X:
        torch.testing.assert_close(vmap(f)(x.expand(3)), py(x).expand(3))


TRANSFORMS = {
    "grad": grad,
    "grad of grad": lambda f: grad(grad(f)),
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.full_like(x, 0.7),))[1],
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (torch.full_like(x, 0.7),))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (torch.full_like(x, 0.7),))[1]),
    "jvp of jvp": lambda f: (
        lambda x: jvp(lambda y: jvp(f, (y,), (torch.ones_like(y),))[1], (x,), (torch.ones_like(x),))[1]
    ),
    "vjp": lambda f: lambda x: torchlift.vjp(f, x)[1](torch.full_like(x, 1.3))[0],
    "jet": lambda f: (
        lambda x: torchlift.jet(f, (x,), (torch.stack([torch.ones_like(x), torch.zeros_like(x)]),))[1][1]
    ),
    "laplacian": torchlift.laplacian,
}


def derivative(py, x, order):
    x = x.detach().clone().requires_grad_()
    y = py(x)
    for _ in range(order):
        (y,) = torch.autograd.grad(y, x, create_graph=True) if y.requires_grad else (y * 0,)
    return y.detach()


FACTOR = {"jvp": 0.7, "jvp of grad": 0.7, "grad of jvp": 0.7, "vjp": 1.3}
ORDER = {"grad of grad": 2, "hessian": 2, "jvp of grad": 2, "grad of jvp": 2, "jvp of jvp": 2, "jet": 2, "laplacian": 2}


@every
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_inside(name, transform):
    f, py = FUNCTIONS[name]
    expected = loop(lambda x: derivative(py, x, ORDER.get(transform, 1)), X)
    expected = expected * FACTOR.get(transform, 1.0)
    torch.testing.assert_close(vmap(TRANSFORMS[transform](f))(X), expected)
    torch.testing.assert_close(TRANSFORMS[transform](f)(X[0]), expected[0])


@every
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_derivatives_outside(name, transform):
    f, py = FUNCTIONS[name]
    order = ORDER.get(transform, 1)
    expected = loop(lambda x: derivative(py, x, order), X) * FACTOR.get(transform, 1.0)
    total = lambda x: vmap(f)(x).sum()
    if transform == "vjp":
        found = torchlift.vjp(vmap(f), X)[1](torch.full_like(X, 1.3))[0]
        torch.testing.assert_close(found, expected)
    elif transform in ("jvp", "grad", "jacrev", "jacfwd", "jvp of grad"):
        found = TRANSFORMS[transform](total)(X)
        torch.testing.assert_close(found, expected.sum() if transform == "jvp" else expected)
    elif transform == "hessian":
        torch.testing.assert_close(hessian(total)(X), torch.diag(expected))
    elif transform == "grad of grad":
        torch.testing.assert_close(grad(lambda x: grad(total)(x).sum())(X), expected)
    elif transform == "grad of jvp":
        torch.testing.assert_close(TRANSFORMS[transform](total)(X), expected)
    else:
        torch.testing.assert_close(TRANSFORMS[transform](total)(X), expected.sum())


@every
def test_autograd_of_vmap(name):
    f, py = FUNCTIONS[name]
    x = X.clone().requires_grad_()
    vmap(f)(x).sum().backward()
    torch.testing.assert_close(x.grad, loop(lambda x: derivative(py, x, 1), X))


@every
def test_jacobians_of_vmap(name):
    f, py = FUNCTIONS[name]
    expected = torch.diag(loop(lambda x: derivative(py, x, 1), X))
    torch.testing.assert_close(jacrev(vmap(f))(X), expected)
    torch.testing.assert_close(jacfwd(vmap(f))(X), expected)


GRID = torch.stack([X, X.flip(0) + 0.3, X * 0.1, X * 1.7 + 1.1])


@every
@pytest.mark.parametrize("dims", list(itertools.product([0, 1], [0])))
def test_nested_vmap(name, dims):
    f, py = FUNCTIONS[name]
    expected = loop(lambda r: loop(py, r), GRID)
    outer, inner = dims
    found = vmap(vmap(f, in_dims=inner, out_dims=inner), in_dims=outer, out_dims=outer)(GRID)
    torch.testing.assert_close(found, expected)
    deriv = loop(lambda r: loop(lambda x: derivative(py, x, 1), r), GRID)
    torch.testing.assert_close(vmap(vmap(grad(f)))(GRID), deriv)
    torch.testing.assert_close(grad(lambda g: vmap(vmap(f))(g).sum())(GRID), deriv)
    torch.testing.assert_close(vmap(grad(lambda r: vmap(f)(r).sum()))(GRID), deriv)
    torch.testing.assert_close(vmap(lambda r: jvp(vmap(f), (r,), (torch.ones_like(r),))[1])(GRID), deriv)


@every
def test_three_levels(name):
    f, py = FUNCTIONS[name]
    cube = torch.stack([GRID, GRID * 0.9 + 0.2])
    expected = loop(lambda g: loop(lambda r: loop(py, r), g), cube)
    torch.testing.assert_close(vmap(vmap(vmap(f)))(cube), expected)
    deriv = loop(lambda g: loop(lambda r: loop(lambda x: derivative(py, x, 1), r), g), cube)
    torch.testing.assert_close(vmap(vmap(vmap(grad(f))))(cube), deriv)
    torch.testing.assert_close(vmap(grad(lambda g: vmap(vmap(f))(g).sum()))(cube), deriv)


def test_second_derivatives_across_levels():
    expected = loop(lambda r: torch.diag(loop(lambda x: derivative(halve_py, x, 2), r)), GRID)
    torch.testing.assert_close(vmap(hessian(lambda r: vmap(halve)(r).sum()))(GRID), expected)
    found = grad(lambda g: vmap(grad(lambda r: vmap(halve)(r).sum()))(g).sum())(GRID)
    torch.testing.assert_close(found, expected.sum(-1))


# --- what is captured ----------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [(0, 0), (1, 0), (0, 1), (None, 0)])
def test_captured_matrices(dims):
    a = torch.randn(5, 5, 5, dtype=D, generator=torch.Generator().manual_seed(0)) * 0.3
    x = torch.linspace(1, 9, 25, dtype=D).reshape(5, 5)
    a = a[0] if dims[0] is None else a

    def f(a, x):
        return torchlift.while_loop(lambda c: c.norm() > 2, lambda c: a @ c * 0.7 + 0.1, x)

    def py(a, x):
        while bool(x.norm() > 2):
            x = a @ x * 0.7 + 0.1
        return x

    torch.testing.assert_close(vmap(f, in_dims=dims)(a, x), loop(py, a, x, in_dims=dims))
    both = lambda f: lambda a, x: vmap(f, in_dims=dims)(a, x).square().sum()
    expected = torch.autograd.functional.jacobian(
        lambda a, x: loop(py, a, x, in_dims=dims).square().sum(), (a, x)
    )
    for found, wanted in zip(grad(both(f), argnums=(0, 1))(a, x), expected):
        torch.testing.assert_close(found, wanted)


def test_captured_weights_that_require_grad():
    w = torch.tensor(1.1, dtype=D, requires_grad=True)
    f = lambda x: torchlift.while_loop(lambda c: c < 9, lambda c: c * w + w * w, x)

    def py(x):
        while bool(x < 9):
            x = x * w + w * w
        return x

    (expected,) = torch.autograd.grad(loop(py, X).sum(), w)
    (found,) = torch.autograd.grad(vmap(f)(X).sum(), w)
    torch.testing.assert_close(found, expected)
    # At the level of the loop, and outside of it.
    g = lambda w, x: torchlift.while_loop(lambda c: c < 9, lambda c: c * w + w * w, x)
    torch.testing.assert_close(
        vmap(grad(g), in_dims=(None, 0))(w.detach(), X),
        loop(lambda x: torch.autograd.grad(py(x), w)[0] if x < 9 else torch.zeros((), dtype=D), X),
    )


def test_branches_without_operands():
    """Branches that close over everything are run on their rows only, too."""
    seen = []

    def f(x):
        def small():
            seen.append(torchlift._C.level_of(x.exp())[1])
            return x.sqrt()

        return torchlift.cond(x > 0, small, lambda: x * 0)

    x = rows(4.0, 0.0, -1.0, 9.0)
    torch.testing.assert_close(vmap(grad(f))(x), rows(0.25, 0, 0, 1 / 6))
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(x), rows(0.25, 0, 0, 1 / 6))
    assert seen == [2, 2]


def test_gradient_taken_inside_of_a_body():
    """Gradient descent until it converges, by rows; a is captured by the function that is differentiated."""

    def f(a):
        objective = lambda y: (y - a).square() * 0.5 + 0.1 * y.cos()
        step = lambda y: y - 0.3 * grad(objective)(y)
        return torchlift.while_loop(lambda y: grad(objective)(y).abs() > 1e-3, step, a * 3)

    def py(a):
        slope = lambda y: (y - a) - 0.1 * y.sin()
        y = a * 3
        while bool(slope(y).abs() > 1e-3):
            y = y - 0.3 * slope(y)
        return y

    torch.testing.assert_close(vmap(f)(X), loop(py, X))
    expected = loop(lambda x: derivative(py, x, 1), X)
    torch.testing.assert_close(vmap(grad(f))(X), expected)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X), expected)
    # Differentiated by what is captured.
    outer = lambda a: torchlift.cond(a > 2, lambda: grad(lambda y: y * y * y)(a), lambda: a)
    torch.testing.assert_close(vmap(outer)(X), torch.where(X > 2, 3 * X * X, X))
    torch.testing.assert_close(vmap(grad(outer))(X), torch.where(X > 2, 6 * X, torch.ones_like(X)))


def test_vmap_and_jacobians_inside_of_a_body():
    v = torch.arange(1.0, 4.0, dtype=D)

    def f(x):
        body = lambda c: c - vmap(lambda u: u * x.abs() + 0.1)(v).sum() - jacfwd(torch.sin)(c)
        return torchlift.while_loop(lambda c: c > 0, body, x * 10)

    def py(x):
        c = x * 10
        while bool(c > 0):
            c = c - (v * x.abs() + 0.1).sum() - c.cos()
        return c

    torch.testing.assert_close(vmap(f)(X), loop(py, X))
    torch.testing.assert_close(vmap(grad(f))(X), loop(lambda x: derivative(py, x, 1), X))


def test_condition_that_depends_on_the_inner_level_later():
    """Batched by the outer vmap alone at first, by both afterwards."""

    def f(x, y):
        return torchlift.while_loop(lambda c: c[0] < 6, lambda c: (c[0] + 1 + y * c[1], c[1] + 1), (x, 0.0))[0]

    def py(x, y):
        n = 0.0
        while bool(x < 6):
            x, n = x + 1 + y * n, n + 1
        return x

    x, y = rows(1.0, 3.0, 9.0), rows(0.2, 1.5)
    expected = loop(lambda x: loop(lambda y: py(x, y), y), x)
    found = vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(x, y)
    torch.testing.assert_close(found, expected)
    g = lambda x, y: vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(x, y).sin().sum()
    p = lambda x, y: loop(lambda x: loop(lambda y: py(x, y), y), x).sin().sum()
    expected = torch.autograd.functional.jacobian(p, (x, y))
    for found, wanted in zip(grad(g, argnums=(0, 1))(x, y), expected):
        torch.testing.assert_close(found, wanted)


def test_autograd_function_and_dropout_in_a_branch():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.save_for_backward(x, y)
            return x * x * y

        @staticmethod
        def backward(ctx, g):
            x, y = ctx.saved_tensors
            return 2 * x * y * g, x * x * g

    f = lambda x: torchlift.cond(x > 2, lambda c: Cube.apply(x, c), lambda c: c, x)
    torch.testing.assert_close(vmap(f)(X), torch.where(X > 2, X**3, X))
    expected = torch.where(X > 2, 3 * X * X, torch.ones_like(X))
    torch.testing.assert_close(vmap(grad(f))(X), expected)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X), expected)

    def noisy(x):
        return torchlift.cond(x > 2, lambda: torch.nn.functional.dropout(x, 0.5) + torch.rand(()) * 0, lambda: x)

    out = vmap(noisy, randomness="different")(X)
    chosen = X > 2
    assert torch.equal(out[~chosen], X[~chosen])
    assert all(v in (0, 2 * x) for v, x in zip(out[chosen], X[chosen]))


# --- the work that is done -----------------------------------------------------------------------


def test_no_work_for_finished_rows():
    sizes = []

    def f(n):
        def body(c):
            sizes.append(torchlift._C.level_of(c)[1])
            return c - 1

        return torchlift.while_loop(lambda c: c > 0, body, n)

    n = torch.tensor([0, 5, 1, 5, 0, 2])
    assert torch.equal(vmap(f)(n), torch.zeros(6, dtype=torch.long))
    assert sizes == [4, 3, 2, 2, 2] and sum(sizes) == n.sum()


def test_no_work_for_finished_pairs():
    sizes = []

    def f(n):
        def body(c):
            value, _, inner, _ = torchlift._C.lower_lifted(c)
            sizes.append(inner * torchlift._C.lower_lifted(value)[2])
            return c - 1

        return torchlift.while_loop(lambda c: c > 0, body, n)

    n = torch.tensor([[0, 3, 0, 1], [0, 0, 0, 0], [2, 0, 0, 0]])
    assert torch.equal(vmap(vmap(f))(n), torch.zeros(3, 4, dtype=torch.long))
    assert sizes == [2 * 2, 2 * 1, 1]


def test_captured_tensors_are_read_once_while_the_rows_stay(monkeypatch):
    w = torch.randn(6, 50, dtype=D)
    f = lambda n, w: torchlift.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] + w), (n, w))[1]
    n = torch.tensor([9, 9, 9, 2, 2, 9])
    with torch.profiler.profile() as profile:
        out = vmap(f)(n, w)
    torch.testing.assert_close(out, w * (n[:, None] + 1))
    selects = sum(e.count for e in profile.key_averages() if e.key == "aten::index_select")
    assert selects < 12, selects


def test_finished_rows_are_not_run_again():
    """A body that would never return, or raise, for a row that has finished."""

    def f(x):
        def body(c):
            return torchlift.while_loop(lambda d: d != 0, lambda d: d - 1, c) - 1  # endless below 0

        return torchlift.while_loop(lambda c: c >= 0, body, x)

    assert torch.equal(vmap(f)(torch.tensor([3, -1, 0, 5])), torch.tensor([-1, -1, -1, -1]))


# --- no NaN ---------------------------------------------------------------------------------------


def test_no_nan_from_branches_and_finished_rows():
    x = rows(4.0, 0.0, 0.25, 1.0, -3.0)
    safe = lambda x: torchlift.cond(x > 0, torch.sqrt, torch.zeros_like, x)
    expected = rows(0.25, 0, 1, 0.5, 0)
    for g in (vmap(grad(safe)), vmap(jacfwd(safe)), grad(lambda x: vmap(safe)(x).sum())):
        torch.testing.assert_close(g(x), expected)
    assert not vmap(hessian(safe))(x).isnan().any()

    # The root of a number that gets to 0, where sqrt has no derivative.
    def down(x):
        return torchlift.while_loop(lambda c: c > 0.5, lambda c: (c - 0.25).sqrt() - 0.25, x)

    def down_py(x):
        while bool(x > 0.5):
            x = (x - 0.25).sqrt() - 0.25
        return x

    x = rows(0.25, 0.5, 0.75, 3.0, 100.0)
    expected = loop(lambda x: derivative(down_py, x, 1), x)
    assert not expected.isnan().any()
    for g in (vmap(grad(down)), vmap(jacfwd(down)), grad(lambda x: vmap(down)(x).sum())):
        torch.testing.assert_close(g(x), expected)
    # In pairs of rows, some are repeated.
    grid = torch.stack([x, x.flip(0), x * 0.2])
    expected = loop(lambda r: loop(lambda x: derivative(down_py, x, 1), r), grid)
    torch.testing.assert_close(vmap(vmap(grad(down)))(grid), expected)
    torch.testing.assert_close(grad(lambda g: vmap(vmap(down))(g).sum())(grid), expected)


def test_gradcheck():
    x = X.clone().requires_grad_()
    mild = (X * 0.2).requires_grad_()
    for f, at in ((halve, x), (newton, x), (powers, x), (cumulate, mild)):
        assert torch.autograd.gradcheck(vmap(f), (at,))
        assert torch.autograd.gradgradcheck(vmap(f), (at,))


# --- trees, numbers, constants --------------------------------------------------------------------


def test_trees():
    def f(x):
        init = {"a": (x, 0), "b": [torch.ones(2, dtype=D)], "name": "state", "none": None}

        def body(c):
            y, n = c["a"]
            return {"a": (y - 1, n + 1), "b": [c["b"][0] * y], "name": c["name"], "none": None}

        return torchlift.while_loop(lambda c: c["a"][0] > 1, body, init)

    out = vmap(lambda x: {k: v for k, v in f(x).items() if k in "ab"})(X)
    for i, x in enumerate(X):
        y, n, b = x, 0, torch.ones(2, dtype=D)
        while y > 1:
            b, y, n = b * y, y - 1, n + 1
        assert out["a"][1].dtype == torch.long and out["a"][1][i] == n
        torch.testing.assert_close(out["a"][0][i], y)
        torch.testing.assert_close(out["b"][0][i], b)
    alone = f(X[0])
    assert alone["name"] == "state" and alone["none"] is None


def test_numbers_take_the_dtype_of_the_tensors():
    total = torchlift.fori_loop(0, 6, lambda i, s: s + X[i], 0.0)
    assert total.dtype == D and torch.equal(total, torchlift.fori_loop(0, 6, lambda i, s: s + X[i], torch.zeros((), dtype=D)))
    assert torchlift.while_loop(lambda s: s < 5, lambda s: s + X[0], 0).dtype == D
    assert torchlift.scan(lambda s, x: (s + x, 1), 0, X)[0].dtype == D
    out = vmap(lambda x: torchlift.cond(x > 2, lambda: 0.0, lambda: x))(X)
    assert out.dtype == D and torch.equal(out, torch.where(X > 2, 0.0, X))
    out = vmap(lambda x: torchlift.cond(x > 2, lambda: x, lambda: 1))(X)
    assert out.dtype == D and torch.equal(out, torch.where(X > 2, X, 1.0))
    assert torchlift.cond(True, lambda: 1, lambda: 2).dtype == torch.long
    assert torchlift.fori_loop(0, 3, lambda i, s: 0, torch.ones((), dtype=D)).dtype == D


def test_cond_with_a_bool_and_operands_of_other_kinds():
    assert torchlift.cond(True, lambda x, k: x * k, lambda x, k: x, X, 2).equal(X * 2)
    out = vmap(lambda x: torchlift.cond(x > 2, lambda t, k: t["x"] * k, lambda t, k: t["x"], {"x": x, "s": "s"}, 3))(X)
    assert torch.equal(out, torch.where(X > 2, X * 3, X))


def test_results_that_do_not_depend_on_the_rows():
    out = vmap(lambda x: torchlift.cond(x > 2, lambda: torch.ones(2), lambda: torch.zeros(2)))(X)
    assert torch.equal(out, (X > 2).float()[:, None].expand(6, 2))
    whole = torch.arange(3.0, dtype=D, requires_grad=True)
    out = vmap(lambda x: torchlift.cond(x > 2, lambda: whole, lambda: whole * x))(X)
    (found,) = torch.autograd.grad(out.sum(), whole)
    torch.testing.assert_close(found, torch.where(X > 2, 1.0, X).sum().expand(3))


def test_scan():
    xs = {"a": torch.arange(8.0).reshape(4, 2), "b": torch.arange(4)}
    step = lambda c, x: (c + x["a"], (c * x["b"], x["b"]))
    for reverse in (False, True):
        carry, (ys, bs) = torchlift.scan(step, torch.zeros(2), xs, reverse=reverse)
        c, expected = torch.zeros(2), {}
        for i in reversed(range(4)) if reverse else range(4):
            expected[i] = c * i
            c = c + xs["a"][i]
        assert torch.equal(carry, c) and torch.equal(bs, xs["b"])
        assert torch.equal(ys, torch.stack([expected[i] for i in range(4)]))
    carry, ys = torchlift.scan(lambda c, _: (c * 2, c), torch.tensor(1), None, length=5)
    assert carry == 32 and ys.tolist() == [1, 2, 4, 8, 16]
    carry, ys = torchlift.scan(lambda c, x: (c, (x, c + 1)), torch.tensor(1), torch.ones(0, 3))
    assert carry == 1 and ys[0].shape == (0, 3) and ys[1].shape == (0,) and ys[1].dtype == torch.long
    out = vmap(lambda x: torchlift.scan(lambda c, y: (c + y, c), x, torch.ones(0, dtype=D)))(X)
    assert out[1].shape == (6, 0)


def test_scan_of_batched_slices():
    xs = torch.randn(5, 7, 3, dtype=D, generator=torch.Generator().manual_seed(1))
    w = torch.randn(3, 3, dtype=D, generator=torch.Generator().manual_seed(2))

    def rnn(w, x):
        step = lambda h, x: ((h @ w + x).tanh(),) * 2
        return torchlift.scan(step, torch.zeros(3, dtype=D), x)[1].sum()

    def py(w, x):
        h, total = torch.zeros(3, dtype=D), 0
        for item in x:
            h = (h @ w + item).tanh()
            total = total + h.sum()
        return total

    torch.testing.assert_close(vmap(rnn, in_dims=(None, 1))(w, xs), loop(lambda x: py(w, x), xs.movedim(1, 0)))
    expected = torch.stack([torch.autograd.functional.jacobian(lambda w: py(w, x), w) for x in xs.unbind(1)])
    torch.testing.assert_close(vmap(grad(rnn), in_dims=(None, 1))(w, xs), expected)


# --- errors ----------------------------------------------------------------------------------------


def fails(text, f, *args, error=TransformError):
    with pytest.raises(error) as info:
        f(*args)
    assert text in str(info.value), str(info.value)
    assert torchlift._C.open_levels() == 0


def test_errors_of_conditions():
    ident = lambda c: c
    fails("must be a bool tensor without dims, got a tensor of shape [6]", torchlift.cond, X > 0, ident, ident, X)
    fails("got a tensor of shape [] and dtype Double", torchlift.cond, X[0], ident, ident, X)
    fails("[cond] pred must be a bool or a bool tensor without dims, got 1", torchlift.cond, 1, ident, ident)
    fails("[while_loop] what <lambda> returned must be a bool", torchlift.while_loop, lambda c: None, ident, X)
    fails("[while_loop] the condition must be a bool tensor", torchlift.while_loop, lambda c: c > 0, ident, X)
    fails("Compare (x > 0), and reduce it by .all()", vmap(lambda x: torchlift.cond(x, ident, ident, x)), X)


def test_errors_of_carries():
    def body(c):
        return c.float()

    less = lambda c: c < 9
    text = "[while_loop] body returned a tensor of shape [] and dtype torch.float32, but the carry it got has a tensor of shape [] and dtype torch.float64 there"
    fails(text, torchlift.while_loop, less, body, X[1])
    fails(text, vmap(lambda x: torchlift.while_loop(less, body, x)), X)
    fails("[fori_loop] <lambda> returned a tensor of shape [2]", torchlift.fori_loop, 0, 3, lambda i, c: c.expand(2), X[0])
    fails("[fori_loop] <lambda> returned", torchlift.fori_loop, torch.tensor(0), 3, lambda i, c: c.expand(2), X[0])
    fails("returned the structure", torchlift.while_loop, lambda c: c[0] < 9, lambda c: [c[0], c[1]], (X[1], X[1]))
    fails("at ['a'][1] a tensor of shape [2]", torchlift.while_loop, lambda c: c["a"][0] < 9, lambda c: {"a": (c["a"][0], X[:2])}, {"a": (X[1], X[1])})
    fails("only tensors can change", torchlift.while_loop, lambda c: c[0] < 9, lambda c: (c[0], "b"), (X[1], "a"))
    fails("[scan] <lambda>, as carry, returned a tensor of shape [3]", torchlift.scan, lambda c, x: (X[:3], x), X[0], X)
    fails("[scan] <lambda> must return a tuple (carry, y)", torchlift.scan, lambda c, x: c, X[0], X)


def test_errors_of_branches():
    x = X[0]
    f = lambda a, b: vmap(lambda x: torchlift.cond(x > 2, a, b, x))(X)
    fails("[cond] false_fn (<lambda>) returned a tensor of shape [2]", f, lambda x: x, lambda x: x.expand(2))
    fails("true_fn (<lambda>) returned a tensor of shape [] and dtype torch.float64 there", f, lambda x: x, lambda x: x > 0)
    fails("[cond] false_fn (<lambda>) returned the structure", f, lambda x: x, lambda x: (x, x))
    assert torchlift.cond(x > 0, lambda x: x, lambda x: x.expand(2), x).equal(x)


def test_errors_of_scan_and_bounds():
    step = lambda c, x: (c, c)
    fails("xs[0]: size 6 (shape [6])\n  xs[1]: size 2", torchlift.scan, step, X[0], (X, X[:2]))
    fails("length: 3", torchlift.scan, step, X[0], X, 3)
    fails("[scan] xs has no tensors: give length", torchlift.scan, step, X[0], None)
    fails("xs['a'] is a tensor without dims", torchlift.scan, step, X[0], {"a": X[0]})
    fails("length must be an int of at least 0, got -1", torchlift.scan, step, X[0], None, -1)
    fails("[fori_loop] upper must be an int or an integer tensor without dims, got a tensor of shape []", torchlift.fori_loop, 0, X[0], lambda i, c: c, X)
    ys = iter([X, X[:2]])
    fails("[scan] <lambda>, as y, returned a tensor of shape [2]", torchlift.scan, lambda c, x: (c, next(ys)), X[0], X[:2])


def test_errors_of_writes():
    def into_captured(x):
        buffer = x * 2
        torchlift.cond(x > 2, lambda: buffer.add_(1), lambda: buffer)
        return buffer

    fails("from outside of the branch or loop body at work", vmap(into_captured), X, error=UnsupportedError)

    def through_view(x):
        buffer = torch.stack([x, x])
        torchlift.cond(x > 2, lambda: buffer[0].add_(1), lambda: x)
        return buffer

    fails("wrote in place into a tensor of shape [2] that it closes over", vmap(through_view), X, error=UnsupportedError)

    def own(x):
        def body(c):
            fresh = c * 1
            fresh[0].sub_(1)
            return fresh.mul_(0.9)

        return torchlift.while_loop(lambda c: c[0] > 1, body, torch.stack([x, x]))

    def own_py(x):
        c = torch.stack([x, x])
        while bool(c[0] > 1):
            c = torch.stack([c[0] - 1, c[1]]) * 0.9
        return c

    torch.testing.assert_close(vmap(own)(X), loop(own_py, X))
    torch.testing.assert_close(vmap(jacrev(own))(X), loop(lambda x: torch.autograd.functional.jacobian(own_py, x), X))


def test_a_tensor_that_escapes_from_a_branch():
    kept = []

    def f(x):
        torchlift.cond(x > 2, lambda: kept.append(x * 2) or x, lambda: x)
        return x + kept[-1]

    fails("", vmap(f), X, error=UnsupportedError)


def test_exceptions_leave_nothing_behind():
    class Stop(Exception):
        pass

    def body(c):
        if torchlift._C.level_of(c)[1] < 4:
            raise Stop
        return c - 1

    f = lambda x: torchlift.while_loop(lambda c: c > 0, body, x)
    for g in (vmap(f), vmap(grad(f)), grad(lambda x: vmap(f)(x).sum())):
        with pytest.raises(Stop):
            g(X)
        assert torchlift._C.open_levels() == 0
    torch.testing.assert_close(vmap(halve)(X), loop(halve_py, X))


def test_no_grad_and_inference_mode():
    x = X.clone().requires_grad_()
    with torch.no_grad():
        out = vmap(halve)(x)
    assert not out.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(vmap(newton)(X), loop(newton_py, X))
    g = lambda x: vmap(lambda x: torchlift.cond(x > 2, lambda: _no_grad(x), lambda: x * x))(x).sum()
    torch.testing.assert_close(grad(g)(X), torch.where(X > 2, 1.0, 2 * X))


def _no_grad(x):
    with torch.no_grad():
        y = x * x
    return y + x


def test_error_messages_name_the_fix():
    fails("torchlift.while_loop(cond, body, x)", vmap(lambda x: x if x > 0 else -x), X, error=UnsupportedError)
    fails("torchlift.nonzero(x, size=n)", vmap(torch.nonzero), GRID, error=UnsupportedError)
    fails("torchlift.unique(x, size=n)", vmap(torch.unique), GRID, error=UnsupportedError)
    fails("torchlift.masked_select(x, mask, size=n)", vmap(lambda x: x[x > 0]), GRID, error=UnsupportedError)
    fails("torchlift.masked_select(x, mask, size=n)", vmap(lambda x: torch.masked_select(x, x > 0)), GRID, error=UnsupportedError)


def test_many_steps_and_rows():
    n = torch.randperm(300, generator=torch.Generator().manual_seed(3)).to(D)
    f = lambda n: torchlift.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] * 0.99 + n), (n, n))[1]
    out = grad(lambda n: vmap(f)(n).sum())(n)
    k = torch.arange(300, dtype=D)
    slope = 0.99**k + (1 - 0.99**k) / 0.01
    torch.testing.assert_close(out, slope[n.long()])
    assert math.isfinite(out.sum().item())


# --- with other transforms and domains --------------------------------------------------------------


def test_an_ensemble_in_a_loop():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(6, 3, 3, dtype=D, generator=generator)
    bias, start = torch.randn(2, 6, 3, dtype=D, generator=generator)

    def f(weight, bias, x):
        layer = lambda c: torch.nn.functional.linear(c, weight, bias).tanh() * 0.3 + c * 0.3
        return torchlift.while_loop(lambda c: c.square().sum() > 0.5, layer, x)

    def py(weight, bias, x):
        while bool(x.square().sum() > 0.5):
            x = torch.nn.functional.linear(x, weight, bias).tanh() * 0.3 + x * 0.3
        return x

    arguments = [weight, bias, start * 3]
    torch.testing.assert_close(vmap(f)(*arguments), loop(py, *arguments))
    expected = torch.autograd.functional.jacobian(
        lambda *a: loop(py, *a).square().sum(), tuple(arguments)
    )
    outside = grad(lambda *a: vmap(f)(*a).square().sum(), argnums=(0, 1, 2))(*arguments)
    inside = vmap(grad(lambda *a: f(*a).square().sum(), argnums=(0, 1, 2)))(*arguments)
    for wanted, out, in_ in zip(expected, outside, inside):
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(in_, wanted)


def test_a_pullback_from_outside():
    def f(x):
        y, pull = torchlift.vjp(lambda z: z * z * x, x)
        return torchlift.cond(x > 2, lambda: pull(torch.ones_like(x))[0] + y, lambda: x)

    torch.testing.assert_close(vmap(f)(X), torch.where(X > 2, 2 * X * X + X**3, X))
    slope = torch.where(X > 2, 4 * X + 3 * X * X, torch.ones_like(X))
    torch.testing.assert_close(vmap(grad(f))(X), slope)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X), slope)


def test_no_grad_around_and_inside():
    def around(x):
        with torch.no_grad():
            y = torchlift.cond(x > 2, lambda: x * x, lambda: x)
        return y * x

    def inside(x):  # What is closed over is used under no_grad first, then without.
        def branch():
            with torch.no_grad():
                s = x.sin()
            return s * x * x

        return torchlift.cond(x > 2, branch, lambda: x)

    for f, slope in (
        (around, torch.where(X > 2, X * X, X)),
        (inside, torch.where(X > 2, 2 * X.sin() * X, torch.ones_like(X))),
    ):
        torch.testing.assert_close(vmap(grad(f))(X), slope)
        torch.testing.assert_close(vmap(jacfwd(f))(X), slope)
        torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X), slope)
        torch.testing.assert_close(jacfwd(lambda x: vmap(f)(x).sum())(X), slope)


def test_derivatives_between_two_vmaps():
    a = rows(0.6, 1.4, 0.9)
    f = lambda a, x: torchlift.while_loop(
        lambda c: c > 1, lambda c: c * 0.5 + 0.02 * a * c.sin() * a.exp(), x
    )

    def py(a, x):
        while bool(x > 1):
            x = x * 0.5 + 0.02 * a * x.sin() * a.exp()
        return x

    inner = lambda a: vmap(f, in_dims=(None, 0))(a, X).sum()
    alone = lambda a: sum(py(a, x) for x in X)
    first = torch.stack([torch.autograd.functional.jacobian(alone, each) for each in a])
    second = torch.stack([torch.autograd.functional.hessian(alone, each) for each in a])
    push = lambda f: lambda a: jvp(f, (a,), (torch.ones_like(a),))[1]
    for transform in (grad, jacfwd, push):
        torch.testing.assert_close(vmap(transform(inner))(a), first)
    for transform in (hessian, lambda f: push(push(f)), lambda f: push(grad(f)), lambda f: grad(push(f))):
        torch.testing.assert_close(vmap(transform(inner))(a), second)
    torch.testing.assert_close(hessian(lambda a: vmap(inner)(a).sum())(a), torch.diag(second))


def test_many_directions_at_once():
    expected = torch.diag(loop(lambda x: derivative(halve_py, x, 1), X))
    basis = torch.eye(6, dtype=D)
    push = vmap(lambda v: jvp(vmap(halve), (X,), (v,))[1])(basis)
    pull = vmap(lambda v: torchlift.vjp(vmap(halve), X)[1](v)[0])(basis)
    torch.testing.assert_close((push, pull), (expected, expected))
    torch.testing.assert_close(vmap(halve, chunk_size=4)(X), vmap(halve)(X))


def test_custom_derivatives_in_a_loop():
    @torchlift.custom_vjp
    def square(x):
        return x * x

    square.defvjp(lambda x: (x * x, x), lambda x, g: (g * 2 * x,))
    f = lambda x: torchlift.while_loop(lambda c: c < 50, lambda c: square(c) + x * 0.1, x + 1)

    def py(x):
        c = x + 1
        while bool(c < 50):
            c = c * c + x * 0.1
        return c

    slope = loop(lambda x: derivative(py, x, 1), X)
    torch.testing.assert_close(vmap(f)(X), loop(py, X))
    torch.testing.assert_close(vmap(grad(f))(X), slope)
    torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X), slope)


def test_random_numbers():
    f = lambda n: torchlift.while_loop(
        lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] + torch.rand(())), (n, torch.zeros(()))
    )[1]
    n = torch.tensor([3, 3, 0, 3, 1])
    same = vmap(f, randomness="same")(n)
    assert same[0] == same[1] == same[3] > same[4] > same[2] == 0
    different = vmap(f, randomness="different")(n)
    assert different[0] != different[1] and different[2] == 0
    fails("randomness", vmap(f), n, error=UnsupportedError)
    p = rows(0.0, 1.0, 1.0, 0.0)
    flip = lambda p, x: torchlift.cond(x > 0, lambda: torch.bernoulli(p), lambda: p * 0 - 1)
    for randomness in ("same", "different"):
        found = vmap(flip, randomness=randomness)(p, rows(1, 1, -1, 1))
        assert found.tolist() == [0, 1, -1, 0]
