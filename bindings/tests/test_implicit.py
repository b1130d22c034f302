"""custom_root, fixed_point and the linear solvers, against formulas, dense solves and unrolling."""

import pytest
import torch

import torchlift
from torchlift import (
    TransformError,
    cg,
    check_grads,
    custom_root,
    fixed_point,
    gmres,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vmap,
    while_loop,
)

D = torch.float64


def newton(g, start):
    """For one unknown."""
    step = lambda y: y - g(y) / grad(g)(y)
    return while_loop(lambda y: g(y).abs() > 1e-13, step, start)


def cube_root(a):
    return custom_root(
        lambda y, a: y**3 - a, torch.tensor(2.0, dtype=D), newton, params=(a,)
    )


def derivatives(a):
    """Of a^(1/3)."""
    return a ** (1 / 3), a ** (-2 / 3) / 3, -2 * a ** (-5 / 3) / 9, 10 * a ** (-8 / 3) / 27


ORDERS = {
    "reverse": grad,
    "forward": jacfwd,
}


@pytest.mark.parametrize("third", ORDERS)
@pytest.mark.parametrize("second", ORDERS)
@pytest.mark.parametrize("first", ORDERS)
def test_orders(first, second, third):
    a = torch.tensor(5.0, dtype=D)
    expected = derivatives(a)
    f = cube_root
    torch.testing.assert_close(f(a), expected[0])
    for order, mode in enumerate([first, second, third]):
        f = ORDERS[mode](f)
        torch.testing.assert_close(f(a), expected[order + 1])


@pytest.mark.parametrize("size", [0, 1, 4])
def test_vmap(size):
    a = torch.linspace(1, 9, 4, dtype=D)[:size]
    expected = derivatives(a)
    torch.testing.assert_close(vmap(cube_root)(a), expected[0])
    torch.testing.assert_close(vmap(grad(cube_root))(a), expected[1])
    torch.testing.assert_close(vmap(jacfwd(cube_root))(a), expected[1])
    torch.testing.assert_close(vmap(hessian(cube_root))(a), expected[2])
    torch.testing.assert_close(vmap(grad(grad(cube_root)))(a), expected[2])
    torch.testing.assert_close(grad(lambda a: vmap(cube_root)(a).sum())(a), expected[1])
    torch.testing.assert_close(
        grad(lambda a: vmap(grad(cube_root))(a).sum())(a), expected[2]
    )
    if size > 1:
        torch.testing.assert_close(
            vmap(vmap(grad(cube_root)))(a.view(2, 2)), expected[1].view(2, 2)
        )


def test_torch_backward():
    a = torch.tensor(5.0, dtype=D, requires_grad=True)
    (first,) = torch.autograd.grad(cube_root(a), a, create_graph=True)
    (second,) = torch.autograd.grad(first, a)
    torch.testing.assert_close(first, derivatives(a)[1])
    torch.testing.assert_close(second, derivatives(a.detach())[2])


# --- several unknowns ---------------------------------------------------------------------------


def equation(y, w, b):
    return {"u": y["u"] + 0.3 * torch.tanh(w @ y["v"]) - b, "v": y["v"] - 0.2 * y["u"].sin()}


def unrolled(w, b):
    u, v = torch.zeros_like(b), torch.zeros_like(b)
    for _ in range(60):
        u, v = b - 0.3 * torch.tanh(w @ v), 0.2 * u.sin()
    return torch.cat([u, v])


def relaxed(g, y):
    for _ in range(120):
        rest = g(y)
        y = {name: y[name] - rest[name] for name in y}
    return y


def rooted(w, b):
    initial = {name: torch.zeros(4, dtype=D) for name in "uv"}
    y = custom_root(equation, initial, relaxed, params=(w, b))
    return torch.cat([y["u"], y["v"]])


@pytest.fixture
def problem():
    return torch.randn(4, 4, dtype=D), torch.randn(4, dtype=D)


def test_systems(problem):
    w, b = problem
    torch.testing.assert_close(rooted(w, b), unrolled(w, b))
    for transform in [
        lambda f: jacrev(f, argnums=(0, 1)),
        lambda f: jacfwd(f, argnums=(0, 1)),
        lambda f: lambda w, b: hessian(lambda b: f(w, b).sin().sum())(b),
        lambda f: lambda w, b: jacrev(jacrev(lambda b: f(w, b).sin().sum()))(b),
        lambda f: lambda w, b: jvp(lambda b: f(w, b), (b,), (b.cos(),)),
    ]:
        torch.testing.assert_close(transform(rooted)(w, b), transform(unrolled)(w, b))


def test_systems_under_vmap(problem):
    w, _ = problem
    bs = torch.randn(3, 4, dtype=D)
    for transform in [
        lambda f: vmap(lambda b: f(w, b)),
        lambda f: vmap(jacrev(lambda b: f(w, b))),
        lambda f: jacrev(vmap(lambda b: f(w, b))),
        lambda f: lambda bs: grad(lambda w: vmap(lambda b, w: f(w, b), (0, None))(bs, w).sin().sum())(w),
        lambda f: lambda bs: vmap(grad(lambda w, b: f(w, b).sin().sum()), (None, 0))(w, bs),
    ]:
        torch.testing.assert_close(transform(rooted)(bs), transform(unrolled)(bs))


def test_check_grads(problem):
    check_grads(rooted, problem, order=2)


# --- fixed points -------------------------------------------------------------------------------


def test_fixed_point():
    def f(y, a):
        return torch.cos(a * y) * 0.8

    def found(a):
        return fixed_point(f, torch.tensor(0.5, dtype=D), a)

    def plain(a):
        y = torch.tensor(0.5, dtype=D)
        for _ in range(300):
            y = f(y, a)
        return y

    a = torch.tensor(0.9, dtype=D)
    torch.testing.assert_close(found(a), plain(a))
    torch.testing.assert_close(grad(found)(a), grad(plain)(a))
    torch.testing.assert_close(jacfwd(found)(a), grad(plain)(a))
    torch.testing.assert_close(hessian(found)(a), hessian(plain)(a))
    rows = torch.linspace(0.1, 1, 5, dtype=D)
    torch.testing.assert_close(vmap(grad(found))(rows), vmap(grad(plain))(rows))
    torch.testing.assert_close(
        grad(lambda r: vmap(found)(r).sum())(rows), vmap(grad(plain))(rows)
    )


def test_fixed_point_with_a_solver_of_ones_own():
    calls = []

    def solve(g, y):
        calls.append(0)
        for _ in range(100):
            y = g(y)
        return y

    def found(a):
        return fixed_point(lambda y, a: 0.5 * y.cos() + a, a.detach() * 0, a, solve=solve)

    a = torch.randn(3, dtype=D)
    check_grads(found, (a,))
    assert calls


def test_what_does_not_converge_is_nan():
    y = vmap(lambda a: fixed_point(lambda y, a: a * y + 1, torch.tensor(0.0, dtype=D), a))(
        torch.tensor([0.5, 2.0], dtype=D)
    )
    torch.testing.assert_close(y, torch.tensor([2.0, float("nan")], dtype=D), equal_nan=True)


# --- linear solvers -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 40])
def test_gmres(size):
    a = torch.randn(size, size, dtype=D) + size**0.5 * 2 * torch.eye(size, dtype=D)
    b = torch.randn(size, dtype=D)
    torch.testing.assert_close(gmres(lambda x: a @ x, b), torch.linalg.solve(a, b))
    matrices, rows = torch.stack([a, 2 * a, a.t()]), torch.randn(3, size, dtype=D)
    found = vmap(lambda a, b: gmres(lambda x: a @ x, b))(matrices, rows)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, rows))


def test_gmres_ends_early():
    """Zero right-hand sides, and those that few products span."""
    a = torch.diag(torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0], dtype=D))
    for b in [torch.zeros(5, dtype=D), torch.ones(5, dtype=D), torch.eye(5, dtype=D)[2]]:
        torch.testing.assert_close(gmres(lambda x: a @ x, b), torch.linalg.solve(a, b))
    assert gmres(lambda x: x, torch.zeros(0, dtype=D)).shape == (0,)
    flat = torch.full((2, 2), 1.0, dtype=D)
    assert gmres(lambda x: flat @ x, torch.tensor([1.0, 0.0], dtype=D)).isnan().all()


@pytest.mark.parametrize("dtype", [D, torch.float32])
def test_cg(dtype):
    factor = torch.randn(9, 9, dtype=dtype)
    a = factor @ factor.t() + 5 * torch.eye(9, dtype=dtype)
    b = {"x": torch.randn(2, 3, dtype=dtype), "y": torch.randn(3, dtype=dtype)}
    join = lambda t: torch.cat([t["x"].reshape(-1), t["y"]])
    split = lambda t: {"x": t[:6].view(2, 3), "y": t[6:]}
    for solver in [cg, gmres]:
        found = solver(lambda t: split(a @ join(t)), b)
        torch.testing.assert_close(
            join(found), torch.linalg.solve(a, join(b)), rtol=1e-4, atol=1e-4
        )
    rows = torch.randn(4, 9, dtype=dtype)
    found = vmap(lambda r: cg(lambda x: a @ x, r))(rows)
    torch.testing.assert_close(found, torch.linalg.solve(a, rows.t()).t(), rtol=1e-4, atol=1e-4)


def test_tangent_solve_is_used():
    used = []

    def solve(matvec, b):
        used.append(0)
        return cg(matvec, b)

    a = torch.tensor([1.0, 4.0], dtype=D)
    root = lambda a: custom_root(
        lambda y, a: y * y - a, torch.ones(2, dtype=D), lambda g, y: a.sqrt(), solve, params=(a,)
    )
    torch.testing.assert_close(jacrev(root)(a), torch.diag(0.5 / a.sqrt()))
    torch.testing.assert_close(jacfwd(root)(a), torch.diag(0.5 / a.sqrt()))
    assert len(used) >= 2


# --- errors -------------------------------------------------------------------------------------


def test_closures_are_refused():
    start = torch.tensor(2.0, dtype=D)

    def root(a):
        return custom_root(lambda y: y * y - a, start, lambda g, y: a.sqrt())

    a = torch.tensor(3.0, dtype=D)
    torch.testing.assert_close(root(a), a.sqrt())
    for transform in [grad, jacfwd, lambda f: vmap(grad(f)), lambda f: grad(lambda a: vmap(f)(a).sum())]:
        x = a if transform in (grad, jacfwd) else a.expand(2)
        with pytest.raises(TransformError, match="closes over a tensor that is differentiated"):
            transform(root)(x)


def test_errors():
    y, a = torch.zeros(2), torch.ones(2)
    with pytest.raises(TransformError, match="the shapes must be the same"):
        custom_root(lambda y, a: y.sum(), y, lambda g, y: (g(y), y)[1], params=(a,))
    with pytest.raises(TransformError, match="solve returned the structure"):
        custom_root(lambda y, a: y, y, lambda g, y: (y, y), params=(a,))
    with pytest.raises(TransformError, match="params must be a tuple"):
        custom_root(lambda y, a: y, y, lambda g, y: y, params=a)
    with pytest.raises(TransformError, match="the unknowns must be real tensors, got torch.int64"):
        fixed_point(lambda y: y, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(TransformError, match="the params must be real tensors"):
        fixed_point(lambda y, a: y, y, a + 1j)
    with pytest.raises(TransformError, match="must return one like its first argument"):
        fixed_point(lambda y: (y, y), y)
