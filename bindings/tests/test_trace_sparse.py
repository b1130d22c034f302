"""Functions whose results come from to_sparse, traced: each graph is run on zeros in other places."""

import pytest
import torch
from torch.testing import assert_close

import torchlift
from torchlift import ShapeDtype, UnsupportedError, grad, hessian, jacrev, jit, jvp, make_fx, trace, vjp, vmap
from torchlift.compile import aot_function, default_partition, min_cut_rematerialization_partition, nop

f64 = torch.float64


def traced_with():
    return torch.tensor([[1.0, 0, 2], [0, 0, 0], [-0.0, 3, 0]], dtype=f64)


def run_with():
    return torch.tensor([[0.0, 5, 0], [7, 0, 0], [0, -0.0, 9]], dtype=f64)


def ways_of(f, args, tmp_path):
    """All ways to run the graph of f: as it is traced, optimized, by fx, by shapes alone, and from a file."""
    path = str(tmp_path / "f.tlc")
    torchlift.save(f, path, *args)
    traced = trace(f)(*args)
    traced.graph.verify()
    by_shapes = trace(f)(*[ShapeDtype(a.shape, a.dtype) for a in args])
    jitted = jit(f)
    jitted(*args)
    return {
        "traced": traced,
        "optimized": lambda *a: traced.rebuild(traced.optimized().run(list(a))),
        "by shapes": by_shapes,
        "by shapes, optimized": lambda *a: by_shapes.rebuild(by_shapes.optimized().run(list(a))),
        "fx": make_fx(f)(*args),
        "jit": jitted,
        "loaded": torchlift.load(path),
    }


def assert_same(got, expected, way):
    if not isinstance(expected, torch.Tensor):
        assert len(got) == len(expected), way
        for a, b in zip(got, expected):
            assert_same(a, b, way)
        return
    assert got.layout == expected.layout, way
    assert got.shape == expected.shape and got.dtype == expected.dtype, way
    if expected.layout == torch.sparse_coo:
        assert got.is_coalesced(), way
        assert torch.equal(got.indices(), expected.indices()), way
        got, expected = got.values(), expected.values()
    assert_close(got, expected, msg=lambda text: f"{way}: {text}")


def check(f, tmp_path, first=None, other=None):
    first = traced_with() if first is None else first
    other = run_with() if other is None else other
    expected = f(other.clone())
    for way, run in ways_of(f, (first,), tmp_path).items():
        assert_same(run(other.clone()), expected, way)


TO_SPARSE = {
    "all dims": lambda x: x.to_sparse(),
    "one dim": lambda x: x.to_sparse(1),
    "dense_dim": lambda x: x.to_sparse(layout=torch.sparse_coo, dense_dim=1),
    "twice": lambda x: x.to_sparse(1).to_sparse(),
    "coalesce": lambda x: x.to_sparse().coalesce(),
    "detach": lambda x: x.to_sparse().detach(),
}
each_form = pytest.mark.parametrize("to_sparse", TO_SPARSE.values(), ids=TO_SPARSE)
each_gradient = pytest.mark.parametrize("masked_grad", [None, True, False])


@each_form
class TestResults:
    def test_of_functions(self, to_sparse, tmp_path):
        check(lambda x: to_sparse(x * 2), tmp_path)

    def test_beside_others(self, to_sparse, tmp_path):
        def f(x):
            y = to_sparse(x)
            return y, x, y.to_dense(), y

        check(f, tmp_path)

    def test_of_vmap(self, to_sparse, tmp_path):
        if to_sparse is TO_SPARSE["detach"]:
            return  # dense under vmap
        rows = lambda x: to_sparse(x.sin())  # noqa: E731
        first = torch.stack([traced_with(), run_with()])
        for in_dim in (0, 1):
            f = vmap(rows, in_dims=in_dim)
            check(f, tmp_path, first, first.flip(0))
        nested = torch.stack([first, first.flip(1)])
        check(vmap(vmap(rows)), tmp_path, nested, nested.flip(0))

    @each_gradient
    def test_dense_again(self, to_sparse, masked_grad, tmp_path):
        # zeros that are left out are positive
        check(lambda x: 1 / to_sparse(x).to_dense(masked_grad=masked_grad), tmp_path)


@each_form
@each_gradient
class TestGradients:
    """Those of to_dense reach the elements alone, unless masked_grad is False."""

    @staticmethod
    def loss(to_sparse, masked_grad):
        return lambda x: (to_sparse(x).to_dense(masked_grad=masked_grad).exp() * x.cos()).sum()

    def test_grad(self, to_sparse, masked_grad, tmp_path):
        loss = self.loss(to_sparse, masked_grad)
        check(grad(loss), tmp_path)
        check(grad(lambda x: grad(loss)(x).sin().sum()), tmp_path)

    def test_under_vmap(self, to_sparse, masked_grad, tmp_path):
        loss = self.loss(to_sparse, masked_grad)
        check(vmap(grad(loss)), tmp_path)
        check(grad(lambda x: vmap(loss)(x).sum()), tmp_path)

    def test_jacobians(self, to_sparse, masked_grad, tmp_path):
        loss = self.loss(to_sparse, masked_grad)
        check(jacrev(lambda x: to_sparse(x).to_dense(masked_grad=masked_grad).exp()), tmp_path)
        if to_sparse is TO_SPARSE["coalesce"]:
            return  # under forward mode to_sparse gives a dense tensor
        check(hessian(loss), tmp_path)
        check(lambda x: jvp(loss, (x,), (x.cos(),)), tmp_path)


def test_gradients_of_sparse_results(tmp_path):
    f = lambda x: x.sin().to_sparse()  # noqa: E731
    check(lambda x: vjp(f, x)[0], tmp_path)
    check(lambda x: vjp(f, x)[1](x.cos()), tmp_path)
    check(lambda x: vjp(f, x)[1](x.to_sparse()), tmp_path)
    check(grad(lambda x: vmap(f)(x).to_dense().exp().sum()), tmp_path)
    check(grad(lambda x: (x.exp().sum(), f(x)), has_aux=True), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.int64, torch.bool])
def test_dtypes(dtype, tmp_path):
    check(lambda x: (x.to_sparse(), x.to_sparse(1), x.to_sparse().to_dense()), tmp_path,
          traced_with().to(dtype), run_with().to(dtype))  # fmt: skip


def test_no_dims_and_no_elements(tmp_path):
    check(lambda x: x.to_sparse(), tmp_path, torch.tensor(0.0), torch.tensor(2.0))
    check(lambda x: x.to_sparse(), tmp_path, torch.tensor(2.0), torch.tensor(0.0))
    check(grad(lambda x: x.to_sparse().to_dense().exp()), tmp_path, torch.tensor(2.0), torch.tensor(0.0))
    check(lambda x: x.to_sparse(), tmp_path, torch.zeros(0, 3), torch.zeros(0, 3))


def test_writes_do_not_reach_it(tmp_path):
    def f(x):
        y = x * 2
        sparse = y.to_sparse()
        y.add_(1)
        sparse.to_dense().mul_(3)
        return sparse, y

    check(f, tmp_path)


def test_dynamic_dims():
    f = lambda x: x.sin().to_sparse()  # noqa: E731
    traced = trace(f, dynamic={"x": {0: "n"}})(traced_with())
    for n in (1, 2, 5):
        x = torch.arange(3 * n, dtype=f64).remainder(2).view(n, 3)
        assert_same(traced(x), f(x), n)


def test_what_is_tracked_runs_the_function():
    f = lambda x: x.exp().to_sparse()  # noqa: E731
    jitted, traced = jit(f), trace(f)(traced_with())
    for run in (jitted, traced):
        x = run_with().requires_grad_()
        run(x).to_dense().sum().backward()
        assert torch.equal(x.grad, run_with().exp())
        assert_same(vmap(run)(torch.stack([traced_with()] * 2)), vmap(f)(torch.stack([traced_with()] * 2)), "vmap")


def test_tensors_of_indices_and_values(tmp_path):
    """Without their zeros."""
    indices = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 0]])

    def f(x):
        return torch.sparse_coo_tensor(indices, x, (3, 3))

    first, other = torch.tensor([1.0, 0.0, 2.0, 3.0]), torch.tensor([0.0, 4.0, 5.0, -7.0])
    for way, run in ways_of(f, (first,), tmp_path).items():
        assert_same(run(other), f(other).to_dense().to_sparse(), way)
    for dense in (
        lambda x: f(x).to_dense(),
        lambda x: f(x).coalesce().to_dense(),
        lambda x: f(x).to_sparse().to_dense(),
        lambda x: f(x).to_sparse(2).to_sparse().to_dense(),
    ):
        check(dense, tmp_path, first, other)
        check(grad(lambda x: dense(x).exp().sum()), tmp_path, first, other)  # noqa: B023
    check(vmap(f), tmp_path, torch.stack([first, other]), torch.stack([other, first]))


def test_a_constant_stays_sparse():
    sparse = traced_with().to_sparse()
    traced = trace(lambda x: (sparse, x))(run_with())
    given = traced(run_with())[0]
    assert_same(given, sparse, "the constant")
    given.mul_(2)  # a copy, as all outputs that are constants
    assert_same(traced(run_with())[0], sparse, "the constant")


def test_backends(tmp_path):
    f = lambda x: (x.sin().to_sparse(), x.to_sparse().to_dense())  # noqa: E731
    for backend in ("ts", "inductor"):
        jitted = jit(f, backend=backend)
        jitted(traced_with())
        assert_same(jitted(run_with()), f(run_with()), backend)
    path = str(tmp_path / "f.tlc")
    torchlift.save(f, path, traced_with(), backend="inductor")
    loaded = torchlift.load(path, allow_native_code=True)
    assert loaded.backend == "inductor"
    assert_same(loaded(run_with()), f(run_with()), "machine code")


@pytest.mark.parametrize("partition", [default_partition, min_cut_rematerialization_partition])
def test_aot(partition):
    def f(x):
        return x.exp().to_sparse(), x.sin().to_sparse().to_dense(), x.cos()

    compiled = aot_function(f, nop, partition_fn=partition)
    assert_same(compiled(run_with()), f(run_with()), "without gradients")
    gradients = []
    for run in (f, compiled):
        x = run_with().requires_grad_()
        sparse, dense, cosines = run(x)
        assert sparse.layout == torch.sparse_coo
        (sparse.to_dense().sin().sum() + (dense * cosines).sum()).backward()
        gradients.append(x.grad)
    assert_close(*gradients)


class TestErrors:
    @pytest.mark.parametrize(
        "f, op",
        [
            (lambda y: y * 2, "aten::mul.Tensor"),
            (lambda y: y.sin(), "aten::sin"),
            (lambda y: y.sum(), "aten::sum"),
            (lambda y: y @ traced_with(), "aten::mm"),
            (lambda y: torch.sparse.mm(y, traced_with()), "aten::"),
            (lambda y: y[0], "aten::select.int"),
            (lambda y: y.indices(), "aten::indices"),
            (lambda y: y.values(), "aten::values"),
            (lambda y: y._nnz(), "aten::_nnz"),
            (lambda y: y.add_(1), "aten::add_.Tensor"),
            (lambda y: vmap(lambda row: row * 2)(y), "aten::mul.Tensor"),
            (lambda y: vmap(lambda row: row * y)(traced_with()), "aten::mul.Tensor"),
            (lambda y: torch.cat([y, y]), "aten::cat"),
        ],
    )
    def test_operators(self, f, op):
        for make in (lambda x: x.to_sparse(), vmap(lambda row: row.to_sparse())):
            for run in (trace, jit, make_fx):
                with pytest.raises(UnsupportedError, match="it was given a sparse tensor") as caught:
                    run(lambda x: f(make(x)))(traced_with())
                assert f"] {op}" in str(caught.value)
                assert "test_trace_sparse.py:" in str(caught.value)

    @pytest.mark.parametrize(
        "f, layout",
        [
            (lambda x: x.to_sparse_csr(), "SparseCsr"),
            (lambda x: x.to_sparse_csc(), "SparseCsc"),
            (lambda x: x.to_sparse_bsr((1, 1)), "SparseBsr"),
            (lambda x: x.to_sparse_bsc((1, 1)), "SparseBsc"),
            (lambda x: x.to_sparse(layout=torch.sparse_csr), "SparseCsr"),
        ],
    )
    def test_other_layouts(self, f, layout):
        with pytest.raises(UnsupportedError, match=f"layout {layout}, which a graph cannot give"):
            trace(f)(traced_with())
        with pytest.raises(UnsupportedError, match=f"layout {layout}, which a graph cannot give"):
            trace(f)(ShapeDtype((3, 3), f64))

    def test_of_libtorch(self):
        for f in (
            lambda x: x.to_sparse(0),
            lambda x: x.to_sparse(3),
            lambda x: x.to_sparse(1).to_sparse(2),
            lambda x: x.to_sparse().to_dense(torch.float32),
        ):
            with pytest.raises((RuntimeError, IndexError)) as eager:
                f(traced_with())
            with pytest.raises((RuntimeError, IndexError)) as traced:
                trace(f)(traced_with())
            assert str(eager.value).splitlines()[0] in str(traced.value)

    def test_branches_and_loops(self):
        def branch(x):
            return x.to_sparse()

        with pytest.raises(UnsupportedError, match="a branch or a loop: it was given a sparse tensor"):
            trace(lambda x: torchlift.cond(x.sum() > 0, branch, branch, x))(traced_with())
        with pytest.raises(UnsupportedError, match="a branch or a loop: it was given a sparse tensor"):
            trace(lambda x: torchlift.scan(lambda c, row: (c, row.to_sparse()), x[0], x))(traced_with())

    def test_captured_tensors(self):
        kept = torch.zeros(3, 3, dtype=f64)
        with pytest.raises(UnsupportedError, match="aten::copy_: it was given a sparse tensor"):
            trace(lambda x: kept.copy_(x.to_sparse()))(traced_with())


def test_branches_of_dense_ones(tmp_path):
    def f(x):
        outside = x.sin().to_sparse()
        return torchlift.cond(
            x.sum() > 10, lambda v: v + outside.to_dense(), lambda v: v.to_sparse().to_dense(), x
        )

    check(f, tmp_path)
