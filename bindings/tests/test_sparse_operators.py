"""Operators that make sparse tensors of batched or differentiated ones: computed dense."""

import pytest
import torch

import torchlift
from torchlift import UnsupportedError, grad, hessian, jet, jvp, vjp, vmap

f64 = torch.float64
INDICES = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])


@pytest.fixture(autouse=True)
def strict():
    torch.manual_seed(0)
    with torchlift.strict():
        yield


def real(*shape):
    return torch.randn(*shape, dtype=f64)


def matrix_of(values):
    return torch.sparse_coo_tensor(INDICES, values, (4, 4))


FUNCTIONS = {
    "to_sparse": lambda x: x.to_sparse().to_dense(),
    "to_sparse of one dim": lambda x: x.to_sparse(1).to_dense(),
    "to_sparse_csr": lambda x: x.to_sparse_csr().to_dense(),
    "sparse.mm": lambda x: torch.sparse.mm(x.to_sparse(), x.sin()),
    "sparse.mm with a constant": lambda x: torch.sparse.mm(x.to_sparse(), torch.ones(4, 2, dtype=f64)),
    "sparse.mm of a constant": lambda x: torch.sparse.mm(torch.eye(4, dtype=f64).to_sparse(), x),
    "matmul": lambda x: x.to_sparse() @ x,
    "product": lambda x: (x.to_sparse() * 2).to_dense(),
    "sparse_coo_tensor": lambda x: matrix_of(x[0]).to_dense() * x,
    "sparse_coo_tensor in a product": lambda x: torch.sparse.mm(matrix_of(x[0] * x[1]), x),
    "duplicates": lambda x: torch.sparse_coo_tensor(INDICES[:1] // 2, x[0], (3,)).to_dense() + x[0, :3],
}  # fmt: skip
each_function = pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS)


def difference(f, x, t, step=1e-6):
    return (f(x + step * t) - f(x - step * t)) / (2 * step)


def close(got, expected, tolerance=1e-8):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@each_function
@pytest.mark.parametrize("size", [1, 3])
def test_values(f, size):
    xs = real(size, 4, 4)
    close(vmap(f)(xs), torch.stack([f(x) for x in xs]))
    close(vmap(f, in_dims=2)(xs.movedim(0, 2)), torch.stack([f(x) for x in xs]))
    pairs = real(2, size, 4, 4)
    close(vmap(vmap(f))(pairs), torch.stack([torch.stack([f(x) for x in xs]) for xs in pairs]))
    assert vmap(f)(xs[:0]).shape[0] == 0


@each_function
def test_derivatives(f):
    x, t, second = real(4, 4), real(4, 4), real(4, 4)
    xs = torch.stack([x, 2 * x])

    def loss(x):
        return f(x).sin().sum()

    close(jvp(f, (x,), (t,))[1], difference(f, x, t), 1e-6)
    value, tangent = jvp(grad(loss), (x,), (t,))
    close(tangent, difference(vmap_of_one(grad(loss)), x, t), 1e-5)
    close(jvp(lambda y: jvp(f, (y,), (t,))[1], (x,), (second,))[1], difference(lambda y: jvp(f, (y,), (t,))[1], x, second), 1e-5)
    close(grad(lambda y: vmap(loss)(torch.stack([y, 2 * y])).sum())(x), grad(lambda y: loss(y) + loss(2 * y))(x))
    close(vmap(grad(loss))(xs), torch.stack([grad(loss)(x) for x in xs]))
    close((vmap(grad(loss))(xs) * t).sum((1, 2)), torch.stack([difference(loss, x, t) for x in xs]), 1e-6)
    close(vmap(lambda x: jvp(f, (x,), (t,))[1])(xs), torch.stack([difference(f, x, t) for x in xs]), 1e-6)
    close(jvp(vmap(f), (xs,), (xs.sin(),))[1], torch.stack([jvp(f, (x,), (x.sin(),))[1] for x in xs]))
    close(hessian(loss)(x), jacobian_of_gradient(loss, x), 1e-5)


def vmap_of_one(f):
    """Inside vmap the gradient has derivatives that libtorch's of a sparse tensor lacks."""
    return lambda x: vmap(f)(x[None])[0]


def jacobian_of_gradient(loss, x):
    columns = [difference(vmap_of_one(grad(loss)), x, e.reshape(4, 4)) for e in torch.eye(16, dtype=f64)]
    return torch.stack(columns, -1).reshape(4, 4, 4, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.to_sparse(),
        lambda x: x.to_sparse(1),
        lambda x: x.to_sparse().coalesce(),
        lambda x: matrix_of(x[0]),
        lambda x: matrix_of(x[0]).coalesce(),
    ],
)
def test_what_vmap_returns(make):
    xs = real(3, 4, 4)
    expected = torch.stack([make(x) for x in xs])
    for options in ({}, {"chunk_size": 2}):
        got = vmap(make, **options)(xs)
        assert got.layout == torch.sparse_coo and got.sparse_dim() == expected.sparse_dim()
        close(got.to_dense(), expected.to_dense())
    nested = vmap(vmap(make))(torch.stack([xs, -xs]))
    assert nested.layout == torch.sparse_coo and nested.sparse_dim() == expected.sparse_dim() + 1
    close(nested.to_dense(), torch.stack([expected.to_dense(), -expected.to_dense()]))
    turned = vmap(make, out_dims=-1)(xs)
    close(turned.to_dense(), expected.to_dense().movedim(0, -1))
    assert vmap(lambda x: make(x) * 2)(xs).layout == torch.strided
    leaf = xs.clone().requires_grad_()
    vmap(make)(leaf).to_dense().sum().backward()
    close(leaf.grad, vmap(grad(lambda x: make(x).to_dense().sum()))(xs))


def test_a_shape_without_the_batch():
    shapes = []
    vmap(lambda x: shapes.append(x.to_sparse().shape) or x)(real(3, 4, 5))
    assert shapes == [(4, 5)]


def test_constants_stay_sparse():
    layouts = []

    def f(x):
        shared = matrix_of(torch.ones(4, dtype=f64))
        layouts.append(shared.layout)
        return torch.sparse.mm(shared, x)

    xs = real(3, 4, 2)
    close(vmap(f)(xs), matrix_of(torch.ones(4, dtype=f64)).to_dense() @ xs)
    assert layouts == [torch.sparse_coo]


def test_a_bad_number_of_dims():
    with pytest.raises(RuntimeError, match=r"\[vmap\] to_sparse: sparse_dim must be from 0 to 2"):
        vmap(lambda x: x.to_sparse(3))(real(3, 4, 4))


def test_series():
    x, series = real(4, 4), real(3, 4, 4)
    got = jet(lambda x: torch.sparse.mm(x.to_sparse(), x), (x,), (series,))
    close(got, jet(lambda x: x @ x, (x,), (series,)))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_mask(layout):
    xs, mask = real(3, 4, 4), matrix_of(torch.ones(4, dtype=f64)).to_sparse(layout=layout)
    pattern = mask.to_dense() != 0
    close(vmap(lambda x: x.sparse_mask(mask).to_dense() * x)(xs), torch.where(pattern, xs * xs, 0))
    slopes = vmap(grad(lambda x: (x.sparse_mask(mask).to_dense() ** 3).sum()))(xs)
    close(slopes, torch.where(pattern, 3 * xs**2, 0))
    with pytest.raises(UnsupportedError, match=r"sparse_mask by a mask that differs.*torch.where\(mask != 0, x, 0\)"):
        vmap(lambda x: x.sparse_mask(x.to_sparse()))(xs)


def test_a_shared_primal():
    """libtorch's own sparse tensor, whose backward pass has batched cotangents."""
    x, cots = torch.tensor([[1.0, 0.0], [2.0, 3.0]], dtype=f64), real(3, 2, 2)
    got = vmap(lambda c: vjp(lambda x: x.to_sparse().to_dense(), x)[1](c)[0])(cots)
    assert got.layout == torch.strided
    close(got, torch.stack([vjp(lambda x: x.to_sparse().to_dense(), x)[1](c)[0] for c in cots]))


def test_pullbacks_of_a_sparse_result():
    xs, cots = real(3, 4, 4), real(3, 4, 4)
    got = vmap(lambda x, c: vjp(lambda x: x.to_sparse().to_dense(), x)[1](c)[0])(xs, cots)
    close(got, cots)


# --- products with a reduction ---------------------------------------------------------------------


@pytest.mark.parametrize("reduce", ["sum", "mean", "amax", "amin"])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_products_with_a_reduction(reduce, size):
    a = torch.randn(4, 5, dtype=f64).relu().to_sparse_csr()
    xs, w = torch.randn(size, 5, 2, dtype=f64), torch.randn(4, 2, dtype=f64)

    def f(x):
        return torch.sparse.mm(a, x, reduce)

    loss = lambda x: (f(x) * w).sum()
    mapped, grads = torchlift.vmap(f)(xs), torchlift.vmap(torchlift.grad(loss))(xs)
    assert mapped.shape == (size, 4, 2) and grads.shape == xs.shape
    outside = torchlift.grad(lambda xs: torchlift.vmap(loss)(xs).sum())(xs)
    for i in range(size):
        x = xs[i].clone().requires_grad_()
        torch.testing.assert_close(mapped[i], f(xs[i]))
        (expected,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(grads[i], expected)
        torch.testing.assert_close(outside[i], expected)
    pairs = torch.randn(2, size, 5, 2, dtype=f64)
    twice = torchlift.vmap(torchlift.vmap(torchlift.grad(loss)))(pairs)
    for i in range(2):
        torch.testing.assert_close(twice[i], torchlift.vmap(torchlift.grad(loss))(pairs[i]))


def test_products_with_a_reduction_in_a_trace():
    a, x = torch.randn(4, 5).relu().to_sparse_csr(), torch.randn(5, 2)
    for reduce in ("sum", "mean"):
        f = torchlift.grad(lambda x: torch.sparse.mm(a, x, reduce).sin().sum())
        torch.testing.assert_close(torchlift.trace(f)(x)(x), f(x))
    for reduce in ("amax", "amin"):
        f = lambda x: torch.sparse.mm(a, x, reduce).sum()
        torch.testing.assert_close(torchlift.trace(f)(x)(x), f(x))
        with pytest.raises(torchlift.UnsupportedError, match="sparse.mm with the reduction amax or amin"):
            torchlift.trace(torchlift.grad(f))(x)
        with pytest.raises(torchlift.UnsupportedError, match="sparse.mm with the reduction amax or amin"):
            torchlift.trace(torchlift.vmap(torchlift.grad(f)))(x[None])
