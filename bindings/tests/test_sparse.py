"""Sparsity patterns, colourings, sparse Jacobians and Hessians, and sparse constants in functions."""

import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F

import torchlift

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Sparse CSR tensor support.*")
        warnings.filterwarnings("ignore", ".*does not know the dependences.*")
        yield


def points(*shape, count=3):
    """Some inputs, of both signs."""
    return [torch.randn(*shape, dtype=DOUBLE) for _ in range(count)]


def nonzeros(f, xs):
    """Where the Jacobian is not zero at any of the points: [outputs, inputs]."""
    found = [torchlift.jacrev(f)(x).reshape(-1, x.numel()) != 0 for x in xs]
    return torch.stack(found).any(0)


def pattern_of(f, x):
    return torchlift.sparsity(f)(x).to_dense()


def assert_tight(f, *shape):
    xs = points(*shape)
    assert torch.equal(pattern_of(f, xs[0]), nonzeros(f, xs))
    assert torchlift.dense_operators() == []


def assert_right(f, *shape):
    """No nonzero outside of the pattern, and the sparse Jacobian is the dense one."""
    xs = points(*shape)
    pattern = torchlift.sparsity(f)(xs[0])
    missed = nonzeros(f, xs) & ~pattern.to_dense()
    assert not missed.any(), missed.nonzero()
    found_once = torchlift.coloring(pattern)
    for x in xs:
        dense = torchlift.jacrev(f)(x).reshape(-1, x.numel())
        torch.testing.assert_close(torchlift.sparse_jacobian(f, found_once)(x).to_dense(), dense)


# --- patterns that are known ----------------------------------------------------------------------


def laplacian_by_slices(u):
    return u[1:-1, 1:-1] * 4 - u[2:, 1:-1] - u[:-2, 1:-1] - u[1:-1, 2:] - u[1:-1, :-2]


def laplacian_by_convolution(u):
    kernel = torch.tensor([[0.0, -1, 0], [-1, 4, -1], [0, -1, 0]], dtype=DOUBLE)
    return F.conv2d(u[None, None], kernel[None, None], padding=1)[0, 0].sin()


def tridiagonal(n):
    return torch.diag(torch.full((n,), 2.0, dtype=DOUBLE)) - torch.diag(
        torch.ones(n - 1, dtype=DOUBLE), 1
    )


def test_stencils():
    assert_tight(lambda u: u[2:] - 2 * u[1:-1] + u[:-2], 7)
    assert_tight(laplacian_by_slices, 4, 5)
    assert_tight(laplacian_by_convolution, 4, 5)
    for layout in (torch.sparse_csr, torch.sparse_coo, torch.strided):
        matrix = tridiagonal(6)
        matrix = matrix if layout == torch.strided else matrix.to_sparse(layout=layout)
        assert_tight(lambda u: (matrix @ u).sin() * u, 6)
        assert_tight(lambda u: (matrix @ u).cos(), 6, 2)


def test_chains_and_blocks():
    def chain(x):
        for _ in range(3):
            x = F.pad(x[1:] * x[:-1], (0, 1), value=1.0).tanh()
        return x

    assert_tight(chain, 8)
    blocks = torch.randn(3, 2, 2, dtype=DOUBLE)
    assert_tight(lambda x: torch.bmm(blocks, x.reshape(3, 2, 1)).reshape(-1), 6)
    assert_tight(lambda x: torch.einsum("nij,nj->ni", blocks, x), 3, 2)
    assert_tight(lambda x: x.cumsum(0).exp(), 5)


def test_reductions():
    for reduce in (torch.sum, torch.mean, torch.logsumexp, torch.var, torch.norm):
        assert_tight(lambda x: reduce(x, dim=1), 3, 4)
        assert_tight(lambda x: reduce(x, dim=(0, 1), keepdim=True), 3, 4)
    assert_tight(lambda x: x.softmax(1), 3, 4)
    assert_tight(lambda x: F.layer_norm(x, (4,)), 3, 4)
    assert_tight(lambda x: F.avg_pool1d(x[None], 2)[0], 2, 6)
    assert_right(lambda x: F.max_pool1d(x[None], 2)[0], 2, 6)


def test_pointwise():
    for f in (torch.sin, torch.exp, torch.sigmoid, F.silu, F.softplus, torch.tanh, F.gelu):
        assert_tight(f, 5)
        assert_tight(torchlift.grad(lambda x: f(x).sum()), 5)
    for f in (torch.relu, torch.abs, F.elu, F.leaky_relu, F.hardtanh):
        assert torch.equal(pattern_of(f, torch.full((3,), -9.0)), torch.eye(3) != 0)


def test_a_network_is_dense():
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    assert_tight(net, 4)
    assert torch.equal(pattern_of(net, torch.zeros(2, 4, dtype=DOUBLE)), torch.block_diag(
        torch.ones(3, 4), torch.ones(3, 4)) != 0)


def test_writes():
    def f(x):
        z = torch.zeros(6, dtype=DOUBLE)
        z[1:4] = x[:3]
        z[2] = 5.0
        z[4] += x[0] * x[1]
        z.mul_(2)
        return z + x.new_empty(6).zero_()

    assert_tight(f, 4)


def test_constants():
    def f(x):
        with torch.no_grad():
            scale = x.flip(0) * 2
        return x * scale + x.detach().sum() + torch.where(x > 0, x.round(), x.floor())

    assert_tight(f, 4)
    mask = torch.tensor([1.0, 0, 1, 0], dtype=DOUBLE)
    assert_tight(lambda x: mask * x, 4)
    assert_tight(lambda x: torch.where(mask > 0, x, x.flip(0) ** 2), 4)
    assert_tight(lambda x: x**0 + x[torch.tensor([0, 0, 1, 3])], 4)


def test_holds_at_every_point():
    f = lambda x: torch.where(x > 0, x, x.flip(0))  # noqa: E731
    for x in points(4):
        assert torch.equal(pattern_of(f, x), (torch.eye(4) + torch.eye(4).flip(0)) != 0)
    # An index that depends on the values may be any.
    assert pattern_of(lambda x: x.index_select(0, x.argmax()[None]), torch.zeros(3)).all()
    assert pattern_of(lambda x: x.masked_fill(x > 0, 1.0), torch.zeros(3)).sum() == 3


def rosenbrock(x):
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


HESSIANS = {
    "rosenbrock": rosenbrock,
    "linear": lambda x: (3 * x).sum(),
    "products": lambda x: (x[::2] * x[1::2]).sum(),
    "elementwise": lambda x: (x.exp() + x**3 + x.sigmoid()).sum(),
    "arrow": lambda x: (x[0] * x**2).sum(),
    "energy": lambda x: ((x[1:] - x[:-1]).cos() * 2).sum() + torch.relu(x).sum(),
    "gather": lambda x: (x[torch.tensor([0, 2, 5])] ** 2 * x[1]).sum(),
    "softplus": lambda x: F.softplus(x[:3] + x[3:]).sum(),
}


@pytest.mark.parametrize("name", HESSIANS)
def test_hessians(name):
    f = HESSIANS[name]
    xs = points(6)
    pattern = torchlift.hessian_sparsity(f)(xs[0])
    assert torchlift.dense_operators() == []
    dense = [torchlift.hessian(f)(x) for x in xs]
    assert torch.equal(pattern.to_dense(), torch.stack(dense).ne(0).any(0))
    for mode in ("symmetric", "auto", "forward", "reverse"):
        found_once = torchlift.coloring(pattern, mode)
        for x, h in zip(xs, dense):
            got = torchlift.sparse_hessian(f, found_once)(x)
            torch.testing.assert_close(got.to_dense(), h)


def test_hessian_of_a_network_with_convolutions():
    weight = torch.randn(2, 1, 3, dtype=DOUBLE)

    def f(x):
        hidden = F.conv1d(x[None, None], weight, padding=1).tanh()
        return F.avg_pool1d(hidden, 2).square().sum()

    x = points(8)[0]
    pattern = torchlift.hessian_sparsity(f)(x)
    h = torchlift.hessian(f)(x)
    assert not ((h != 0) & ~pattern.to_dense()).any() and not pattern.to_dense().all()
    found_once = torchlift.coloring(pattern, "symmetric")
    torch.testing.assert_close(torchlift.sparse_hessian(f, found_once)(x).to_dense(), h)


# --- operators, and random programs ---------------------------------------------------------------

INDEX = torch.tensor([3, 0, 2])
OPERATORS = {
    "atan2": lambda x: torch.atan2(x, x.flip(0)),
    "addcmul": lambda x: torch.addcmul(x, x.flip(0), x * 2, value=0.5),
    "lerp": lambda x: torch.lerp(x, x.flip(0), 0.3),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "maximum": lambda x: torch.maximum(x, x.flip(0)),
    "prod": lambda x: x.prod(1),
    "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "sort": lambda x: x.sort(1).values,
    "topk": lambda x: x.topk(2, 1).values,
    "max": lambda x: x.max(1).values,
    "median": lambda x: x.median(1).values,
    "kthvalue": lambda x: x.kthvalue(2, 1).values,
    "std_mean": lambda x: torch.cat(torch.std_mean(x, 1)),
    "glu": lambda x: F.glu(x, 1),
    "log_softmax": lambda x: x.log_softmax(0),
    "cross_entropy": lambda x: F.cross_entropy(x, INDEX[:3] % 4, reduction="none"),
    "mse": lambda x: F.mse_loss(x, x.flip(0), reduction="none"),
    "huber": lambda x: F.huber_loss(x, x.flip(1) * 2),
    "group_norm": lambda x: F.group_norm(x[None], 3),
    "batch_norm": lambda x: F.batch_norm(x, None, None, training=True),
    "index_add": lambda x: x.index_add(1, INDEX, x[:, 1:] ** 2, alpha=-1),
    "scatter_add": lambda x: x.scatter_add(1, INDEX.expand(3, 3), x[:, :3] * 2),
    "gather": lambda x: x.gather(1, INDEX.expand(3, 3)),
    "index_put": lambda x: x.index_put((INDEX[1:],), x[:2] * 3, accumulate=True),
    "roll": lambda x: x.roll(1, 1) * x,
    "tril": lambda x: x.tril(),
    "pad": lambda x: F.pad(x[None], (1, 2), mode="replicate"),
    "reflect": lambda x: F.pad(x[None], (1, 2), mode="reflect"),
    "unfold": lambda x: x.unfold(1, 2, 1).sin(),
    "stack": lambda x: torch.stack([x, torch.ones_like(x), x.t().reshape(3, 4)]),
    "matmul": lambda x: x @ x.t(),
    "addmm": lambda x: torch.addmm(x[:, :3], x, x.t()),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "addr": lambda x: torch.addr(torch.ones(4, 4, dtype=DOUBLE), x[0], x[1]),
    "cdist": lambda x: torch.cdist(x[:2], x[1:] + 1),
    "inverse": lambda x: torch.linalg.inv(x[:, :3] + 5 * torch.eye(3, dtype=DOUBLE)),
    "solve": lambda x: torch.linalg.solve(x[:, :3] + 5 * torch.eye(3, dtype=DOUBLE), x),
    "det": lambda x: torch.linalg.det(x[:, :3]),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.t() + torch.eye(3, dtype=DOUBLE)),
    "fft": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=1)),
    "complex": lambda x: (torch.complex(x, x.flip(0)) ** 2).abs(),
    "conv": lambda x: F.conv1d(x[None], torch.ones(3, 1, 2, dtype=DOUBLE), groups=3),
    "conv_weight": lambda x: F.conv1d(torch.ones(1, 1, 6, dtype=DOUBLE), x[:, None]),
    "conv_transpose": lambda x: F.conv_transpose1d(x[None], torch.ones(3, 2, 2, dtype=DOUBLE)),
    "interpolate": lambda x: F.interpolate(x[None], 7, mode="linear"),
    "adaptive_pool": lambda x: F.adaptive_avg_pool1d(x, 3),
    "max_pool2d": lambda x: F.max_pool2d(x[None], 2, 1),
    "embedding": lambda x: F.embedding(torch.tensor([2, 0]), x),
    "unknown": lambda x: x.renorm(2, 0, 0.5),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "trapezoid": lambda x: torch.trapezoid(x, dim=1),
    "diff": lambda x: x.diff(dim=0),
    "view_as_real": lambda x: torch.view_as_complex(x.reshape(3, 2, 2)).conj().imag,
    "dropout": lambda x: F.dropout(x, 0.0),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    assert_right(OPERATORS[name], 3, 4)


SECOND = [name for name in OPERATORS if name not in ("unknown", "complex", "attention")]


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_of_operators(name):
    f = OPERATORS[name]
    weights = torch.randn(f(points(3, 4)[0]).shape, dtype=DOUBLE)

    def loss(x):
        return (f(x) * weights).sum()

    xs = points(3, 4)
    pattern = torchlift.hessian_sparsity(loss)(xs[0]).to_dense()
    for x in xs:
        h = torchlift.jacrev(torchlift.jacrev(loss))(x).reshape(12, 12)
        assert not ((h.abs() > 1e-12) & ~pattern).any()


class Program:
    """A random chain of operators on vectors of 6."""

    def __init__(self, seed):
        g = torch.Generator().manual_seed(seed)
        sparse = (torch.rand(6, 6, generator=g) < 0.3) * torch.randn(6, 6, generator=g)
        matrix = sparse.double()
        index = torch.randint(0, 6, (6,), generator=g)
        shift = int(torch.randint(1, 6, (), generator=g))

        def write(x, y):
            z = torch.zeros(6, dtype=DOUBLE)
            z[shift:] = x[shift:]
            z[:shift] += y[:shift] ** 2
            return z

        choices = [
            lambda x, y: x.sin() * y,
            lambda x, y: x + y.flip(0),
            lambda x, y: matrix @ x,
            lambda x, y: matrix.to_sparse_csr() @ x + 0 * y,
            lambda x, y: x[index],
            lambda x, y: x.roll(shift) - y.detach(),
            lambda x, y: torch.where(x > y, x, y.cos()),
            lambda x, y: torch.cat([x[:shift], y[shift:]]),
            lambda x, y: x.index_add(0, index, y, alpha=-1),
            lambda x, y: F.pad(x[1:] * y[:-1], (1, 0)),
            lambda x, y: x.reshape(2, 3).softmax(1).reshape(-1),
            lambda x, y: x.reshape(3, 2).sum(1).repeat(2) * y,
            lambda x, y: x.cumsum(0) * 0.1,
            lambda x, y: torch.relu(x) + 0.1 * x.abs(),
            write,
            lambda x, y: torchlift.vmap(lambda a, b: a * b.exp())(x, y.tanh()),
            lambda x, y: torchlift.grad(lambda v: (v[1:] * v[:-1] ** 2).sum())(x),
            lambda x, y: torchlift.jvp(torch.tanh, (x,), (y,))[1],
        ]
        picks = torch.randint(0, len(choices), (6,), generator=g)
        self.steps = [choices[i] for i in picks]

    def __call__(self, x):
        y = x
        for step in self.steps:
            x, y = step(x, y).tanh(), x
        return x + 0.1 * y


@pytest.mark.parametrize("seed", range(40))
def test_random_programs(seed):
    assert_right(Program(seed), 6)
    program = Program(seed)
    xs = points(6, count=2)
    loss = lambda x: program(x).square().sum()  # noqa: E731
    pattern = torchlift.hessian_sparsity(loss)(xs[0])
    found_once = torchlift.coloring(pattern, "symmetric")
    for x in xs:
        h = torchlift.hessian(loss)(x)
        got = torchlift.sparse_hessian(loss, found_once)(x)
        torch.testing.assert_close(got.to_dense(), h, atol=1e-9, rtol=1e-7)


# --- colourings -----------------------------------------------------------------------------------


def arrow(x):
    return torch.cat([x.square().sum()[None], x[1:] ** 2 * x[0]])


def test_modes():
    x = points(20)[0]
    pattern = torchlift.sparsity(arrow)(x)
    assert torchlift.coloring(pattern, "forward").colors == 20
    assert torchlift.coloring(pattern, "reverse").colors == 20
    both = torchlift.coloring(pattern)
    assert (both.mode, both.colors) == ("both", 3)
    dense = torchlift.jacrev(arrow)(x)
    torch.testing.assert_close(torchlift.sparse_jacobian(arrow, both)(x).to_dense(), dense)
    again = pickle.loads(pickle.dumps(both))
    got = torchlift.sparse_jacobian(arrow, again, layout="coo", chunk_size=1)(x)
    assert got.layout == torch.sparse_coo and got.is_coalesced()
    torch.testing.assert_close(got.to_dense(), dense)
    assert torch.equal(again.pattern().to_dense(), pattern.to_dense())
    assert repr(both) == "Coloring(mode='both', shape=[20, 20], nonzeros=58, colors=3)"


def test_any_pattern_that_holds_the_nonzeros():
    x = points(5)[0]
    f = lambda x: x[1:] * x[:-1]  # noqa: E731
    dense = torchlift.jacrev(f)(x)
    for pattern in (dense != 0, (dense != 0).to_sparse(), torch.ones(4, 5), dense.to_sparse_csr()):
        found = torchlift.coloring(pattern)
        torch.testing.assert_close(torchlift.sparse_jacobian(f, found)(x).to_dense(), dense)


def test_trees_and_arguments():
    def f(params, x, scale):
        return {"a": params["w"] * x[0], "b": (params["v"] * scale).sum(0)}

    params = {"w": points(3)[0], "v": points(2, 3)[0]}
    x = points(2)[0]
    run = (params, x, 2.0)
    found = torchlift.coloring(torchlift.sparsity(f, argnums=(0, 1))(*run))
    assert (found.rows, found.columns) == (6, 11)
    got = torchlift.sparse_jacobian(f, found, argnums=(0, 1))(*run).to_dense()
    blocks = torchlift.jacrev(f, argnums=(0, 1))(*run)
    rows = []
    for name in ("a", "b"):
        by_params, by_x = blocks[name]
        parts = [by_params[key].reshape(3, -1) for key in sorted(params)] + [by_x.reshape(3, -1)]
        rows.append(torch.cat(parts, 1))
    torch.testing.assert_close(got, torch.cat(rows))


def test_under_vmap_and_grad():
    f = lambda x: x[1:].sin() * x[:-1]  # noqa: E731
    xs = torch.stack(points(5))
    found = torchlift.coloring(torchlift.sparsity(f)(xs[0]))
    values = torchlift.sparse_jacobian(f, found, layout="values")
    for batch in (xs, xs[:1], xs[:0]):
        got = torchlift.vmap(values)(batch)
        assert got.shape == (len(batch), found.nonzeros)
        for one, x in zip(got, batch):
            torch.testing.assert_close(one, values(x))
    loss = lambda x: values(x).square().sum()  # noqa: E731
    reference = lambda x: torchlift.jacrev(f)(x).square().sum()  # noqa: E731
    torch.testing.assert_close(
        torchlift.vmap(torchlift.grad(loss))(xs), torchlift.vmap(torchlift.grad(reference))(xs)
    )
    torch.testing.assert_close(
        torchlift.jacfwd(loss)(xs[0]), torchlift.jacfwd(reference)(xs[0])
    )
    for layout in ("csr", "coo"):
        x = xs[0].clone().requires_grad_()
        jacobian = torchlift.sparse_jacobian(f, found, layout=layout)(x)
        jacobian.to_dense().square().sum().backward()
        torch.testing.assert_close(x.grad, torchlift.grad(reference)(xs[0]))
    with pytest.raises(torchlift.UnsupportedError, match='layout="values"'):
        torchlift.vmap(torchlift.sparse_jacobian(f, found))(xs)


def test_ten_thousand_points():
    n = 10_000
    f = lambda u: u[2:] * u[:-2] - 2 * u[1:-1]  # noqa: E731
    x = torch.rand(n, dtype=DOUBLE)
    pattern = torchlift.sparsity(f)(x)
    assert pattern.values().numel() == 3 * (n - 2)
    found = torchlift.coloring(pattern)
    assert found.colors == 3
    got = torchlift.sparse_jacobian(f, found)(x)
    i = 777
    row = got.col_indices()[3 * i : 3 * i + 3], got.values()[3 * i : 3 * i + 3]
    assert row[0].tolist() == [i, i + 1, i + 2]
    torch.testing.assert_close(row[1], torch.stack([x[i + 2], torch.tensor(-2.0).double(), x[i]]))


# --- errors ---------------------------------------------------------------------------------------


def test_errors():
    x = points(4)[0]
    found = torchlift.coloring(torchlift.sparsity(lambda x: x[1:])(x))
    with pytest.raises(torchlift.TransformError, match=r"made for a matrix of shape \[3, 4\].*\[4, 4\]"):
        torchlift.sparse_jacobian(lambda x: x, found)(x)
    with pytest.raises(torchlift.TransformError, match=r"made for a matrix of shape \[3, 4\].*\[3, 5\]"):
        torchlift.sparse_jacobian(lambda x: x[1:], found)(torch.ones(5))
    with pytest.raises(torchlift.UnsupportedError, match=r"A number was asked for .*torch.where"):
        torchlift.sparsity(lambda x: x if x.sum() > 0 else -x)(x)
    with pytest.raises(torchlift.UnsupportedError, match="looks at the values"):
        torchlift.sparsity(lambda x: x[x > 0])(x)
    with pytest.raises(torchlift.UnsupportedError, match="depends on the inputs"):
        torchlift.sparsity(lambda x: torchlift.cond(x.sum() > 0, torch.sin, torch.cos, x))(x)
    with pytest.raises(torchlift.TransformError, match="has dtype torch.int64"):
        torchlift.sparsity(lambda x: x)(torch.ones(3, dtype=torch.long))
    with pytest.raises(torchlift.TransformError, match="mode must be one of"):
        torchlift.coloring(torch.eye(2), "sideways")
    with pytest.raises(torchlift.TransformError, match="a pattern is a matrix"):
        torchlift.coloring(torch.ones(2))
    with pytest.raises(torchlift.TransformError, match="is not symmetric"):
        torchlift.coloring(torch.ones(2, 3), "symmetric")
    with pytest.raises(torchlift.TransformError, match="layout must be one of"):
        torchlift.sparse_jacobian(lambda x: x, found, layout="dense")
    with pytest.raises(torchlift.TransformError, match="coloring must be a torchlift.Coloring"):
        torchlift.sparse_jacobian(lambda x: x, torch.eye(3))
    with pytest.raises(torchlift.TransformError, match="one real number"):
        torchlift.hessian_sparsity(lambda x: x)(x)
    with pytest.raises(torchlift.TransformError, match="chunk_size"):
        torchlift.sparsity(lambda x: x, chunk_size=0)


def test_functions_with_derivatives_of_their_own():
    class Straight(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return g

    custom = torchlift.custom_vjp(torch.round)
    custom.defvjp(lambda x: (torch.round(x), None), lambda residual, g: (g,))
    for f in (Straight.apply, custom):
        advice = r"rule of its own.*coloring\(pattern\) takes any that contains the nonzeros"
        with pytest.raises(torchlift.UnsupportedError, match=advice):
            torchlift.sparsity(f)(points(3)[0])


def test_operators_of_no_table_are_told():
    torchlift.sparsity(lambda x: x.renorm(2, 0, 1))(torch.ones(2, 2))
    assert torchlift.dense_operators() == ["aten::renorm"]
    torchlift.sparsity(torch.sin)(torch.ones(2))
    assert torchlift.dense_operators() == []


# --- sparse constants in functions ----------------------------------------------------------------

PRODUCTS = {
    "vector": (lambda a, v: a @ v, (5,)),
    "matrix": (lambda a, v: a @ v, (5, 3)),
    "column": (lambda a, v: a @ v, (5, 1)),
    "mv": (torch.mv, (5,)),
    "mm": (lambda a, v: torch.mm(a, v), (5, 3)),
    "matmul": (lambda a, v: a.matmul(v), (5, 3)),
    "addmm": (lambda a, v: torch.addmm(torch.ones(4, 3, dtype=DOUBLE), a, v, beta=2, alpha=3), (5, 3)),
    "sparse.mm": (lambda a, v: torch.sparse.mm(a, v) if a.layout != torch.strided else a @ v, (5, 3)),
    "left": (lambda a, v: v @ a, (3, 4)),
    "transposed": (lambda a, v: a.t() @ v, (4, 2)),
}


def _second(f):
    return lambda v: f(v).sin().sum()


TRANSFORMS = {
    "grad": lambda f: torchlift.grad(_second(f)),
    "vjp": lambda f: lambda v: (lambda out, pull: pull(out))(*torchlift.vjp(f, v))[0],
    "jvp": lambda f: lambda v: torchlift.jvp(f, (v,), (v * v,))[1],
    "jacrev": torchlift.jacrev,
    "jacfwd": torchlift.jacfwd,
    "hessian": lambda f: torchlift.hessian(_second(f)),
    "vmap": lambda f: lambda v: torchlift.vmap(f)(torch.stack([v, 2 * v])),
    "vmap of one": lambda f: lambda v: torchlift.vmap(f)(v[None]),
    "vmap(grad)": lambda f: lambda v: torchlift.vmap(torchlift.grad(_second(f)))(torch.stack([v, 2 * v])),
    "grad(vmap)": lambda f: torchlift.grad(
        lambda v: torchlift.vmap(f)(torch.stack([v, 2 * v])).sin().sum()
    ),
    "vmap(vmap)": lambda f: lambda v: torchlift.vmap(torchlift.vmap(f))(
        torch.stack([v, 2 * v, 3 * v, v]).reshape(2, 2, *v.shape)
    ),
    "vmap(jvp)": lambda f: lambda v: torchlift.vmap(lambda u: torchlift.jvp(f, (u,), (u * u,))[1])(
        torch.stack([v, 2 * v])
    ),
    "vmap(hessian)": lambda f: lambda v: torchlift.vmap(torchlift.hessian(_second(f)))(
        torch.stack([v, 2 * v])
    ),
    "sparsity": lambda f: lambda v: torchlift.sparsity(f)(v).to_dense(),
    "hessian_sparsity": lambda f: lambda v: torchlift.hessian_sparsity(_second(f))(v).to_dense(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_coo], ids=["csr", "coo"])
def test_sparse_constants(transform, layout):
    dense = torch.randn(4, 5, dtype=DOUBLE) * (torch.rand(4, 5) > 0.5)
    sparse = dense.to_sparse(layout=layout)
    for name, (product, shape) in PRODUCTS.items():
        v = torch.randn(*shape, dtype=DOUBLE)
        make = TRANSFORMS[transform]
        expected = make(lambda u: product(dense, u))(v)
        got = make(lambda u: product(sparse, u))(v)
        torch.testing.assert_close(got, expected, msg=lambda text: f"{name}: {text}")
