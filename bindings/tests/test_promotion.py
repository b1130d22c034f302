"""Writes of batched values into tensors that f makes: z = torch.zeros(5); z[0] = x[0]."""

import copy
import io
import pickle
import sys
import threading

import pytest
import torch
from torch import empty as empty_by_name
from torch import zeros as zeros_by_name

import torchlift
from torchlift import (
    UnsupportedError,
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vmap,
)

X = torch.randn(3, 5, dtype=torch.float64)
W = torch.randn(5, dtype=torch.float64)


def loop(f, *args):
    return torch.stack([f(*each) for each in zip(*args)])


def scalar(f):
    return lambda x: (f(x) * torch.linspace(1, 2, f(x).numel(), dtype=x.dtype)).sum()


def into_zeros(x):
    z = torch.zeros(5, dtype=torch.float64)
    z[0] = x[0]
    z[3:] = x[1:3] * 2
    return z


def into_empty(x):
    z = torch.empty(2, 3, dtype=torch.float64)
    z.fill_(1)
    z[1, :] *= x[:3]
    return z.flatten()


def through_views(x):
    z = torch.ones(2, 5, dtype=torch.float64)
    row, column = z[0], z.T[1]
    z.view(10)[3:7] += x[:4]
    return torch.cat([z.flatten(), row, column])


def like_captured(x):
    z = torch.zeros_like(W)
    z += x
    z[1:3].copy_(x[:2].sin())
    return z


def cloned(x):
    z = W.clone()
    z.mul_(x)
    return z


def new_of_captured(x):
    z = W.new_empty(4, 5).zero_()
    z.index_put_((torch.tensor([1, 2]),), x[:2].unsqueeze(1))
    z.scatter_(0, torch.tensor([[3, 3, 0, 0, 1]]), x.unsqueeze(0))
    return z.flatten()


def from_numbers(x):
    z = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    z[2] = x[0]
    return z


def masked(x):
    z = torch.full((5,), 2.0, dtype=torch.float64)
    z.masked_fill_(x > 0, 7.0)
    return z * x


def recurrence(x):
    out = torch.zeros(6, dtype=torch.float64)
    for i in range(5):
        out[i + 1] = 0.5 * out[i] + x[i]
    return out


def matrix(x):
    z = torch.eye(3, dtype=torch.float64)
    z[0, 1], z[1, 0] = x[0], -x[1]
    z[2, :2] = x[2:4]
    z[..., 2, 2] = torch.tensor(4.0, dtype=torch.float64)
    return (z @ z).flatten()


def grids(x):
    a, b = torch.linspace(0, 1, 5, dtype=torch.float64), torch.arange(5, dtype=torch.float64)
    a[-1], b[x.numel() - 5] = x[0], x[1]
    return a * b + torch.hann_window(5, dtype=torch.float64) * torch.kaiser_window(5).double()


def by_name(x):
    z, y = zeros_by_name(3, dtype=torch.float64), empty_by_name(3, dtype=torch.float64)
    z[0], y[:] = x[0], x[:3]
    return z + y


def complex_parts(x):
    z = torch.zeros(4, dtype=torch.complex128)
    conjugate, imaginary = z.conj(), z.imag
    torch.view_as_real(z)[0, 0] = x[0]
    z[1] = torch.complex(x[1], x[2])
    return torch.cat([torch.view_as_real(conjugate.resolve_conj()).flatten(), imaginary])


FUNCTIONS = [
    into_zeros, into_empty, through_views, like_captured, cloned, new_of_captured, from_numbers,
    masked, recurrence, matrix, grids, by_name, complex_parts,
]  # fmt: skip


@pytest.mark.parametrize("f", FUNCTIONS)
def test_agrees_with_a_loop(f):
    torch.testing.assert_close(vmap(f)(X), loop(f, X))
    xx = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.stack([loop(f, x) for x in xx])
    torch.testing.assert_close(vmap(vmap(f))(xx), expected)
    torch.testing.assert_close(vmap(f, in_dims=1)(X.T.contiguous()), loop(f, X))
    torch.testing.assert_close(vmap(f, chunk_size=2)(X), loop(f, X))


def reference(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(scalar(f)(x), x)[0]


@pytest.mark.parametrize("f", FUNCTIONS)
def test_gradients(f):
    expected = torch.stack([reference(f, x) for x in X])
    torch.testing.assert_close(vmap(grad(scalar(f)))(X), expected)
    torch.testing.assert_close(grad(lambda x: vmap(scalar(f))(x).sum())(X), expected)
    leaf = X.clone().requires_grad_()
    vmap(scalar(f))(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_inner_and_outer_values():
    def f(x, y):
        z = torch.zeros(3, dtype=torch.float64)
        z[0], z[1], z[2] = x, y, x * y
        return z

    x, y = torch.randn(2), torch.randn(3)
    x, y = x.double(), y.double()
    got = vmap(lambda x: vmap(lambda y: f(x, y))(y))(x)
    torch.testing.assert_close(got, torch.stack([torch.stack([f(a, b) for b in y]) for a in x]))


@pytest.mark.parametrize("f", [into_zeros, through_views, matrix, recurrence])
def test_jacobians(f):
    x = X[0]
    expected = torch.autograd.functional.jacobian(f, x)
    for jacobian in (jacfwd, jacrev):
        torch.testing.assert_close(jacobian(f)(x), expected)
        torch.testing.assert_close(vmap(jacobian(f))(X)[0], expected)
    tangent = torch.randn(5, dtype=torch.float64)
    torch.testing.assert_close(jvp(f, (x,), (tangent,))[1], expected @ tangent)


@pytest.mark.parametrize("f", [matrix, recurrence])
def test_second_derivatives(f):
    def total(x):
        return (f(x) ** 3).sum()

    expected = torch.stack([torch.autograd.functional.hessian(total, x) for x in X])
    compositions = [hessian, *(lambda f, a=a, b=b: a(b(f)) for a in (jacfwd, jacrev) for b in (jacfwd, jacrev))]  # fmt: skip
    for second in compositions:
        torch.testing.assert_close(second(total)(X[1]), expected[1])
        torch.testing.assert_close(vmap(second(total))(X), expected)


def test_under_functional_call():
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(W.clone())

        def forward(self, x):
            z = torch.zeros(2, 5, dtype=torch.float64)
            z[0] = self.weight
            z[1] = self.weight * x
            return z.prod(0)

    module = Table()
    weights = torch.randn(3, 5, dtype=torch.float64)
    got = vmap(lambda w, x: functional_call(module, {"weight": w}, (x,)))(weights, X)
    torch.testing.assert_close(got, weights * weights * X)
    torch.testing.assert_close(vmap(module)(X), (W * W * X))


class TestRecurrentModules:
    """Without an initial state they make one of zeros."""

    @pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
    def test_layers(self, kind):
        module = getattr(torch.nn, kind)(5, 4, num_layers=2, bidirectional=True).double()
        x = torch.randn(3, 6, 2, 5, dtype=torch.float64)
        torch.testing.assert_close(vmap(lambda x: module(x)[0])(x), loop(lambda x: module(x)[0], x))
        unbatched = x[:, :, 0]
        torch.testing.assert_close(
            vmap(lambda x: module(x)[0])(unbatched), loop(lambda x: module(x)[0], unbatched)
        )

    @pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
    def test_cells(self, kind):
        module = getattr(torch.nn, kind)(5, 4).double()

        def last(x):
            out = module(x)
            return out[0] if isinstance(out, tuple) else out

        def total(x):
            return (last(x) ** 2).sum()

        torch.testing.assert_close(vmap(last)(X), loop(last, X))
        expected = torch.stack([reference_of(total, x) for x in X])
        torch.testing.assert_close(vmap(grad(total))(X), expected)

    def test_ensembles_of_a_cell(self):
        cells = [torch.nn.GRUCell(5, 4).double() for _ in range(3)]
        state = {n: torch.stack([dict(c.named_parameters())[n] for c in cells]) for n in dict(cells[0].named_parameters())}  # fmt: skip
        got = vmap(lambda s, x: functional_call(cells[0], s, (x,)))(state, X)
        torch.testing.assert_close(got, torch.stack([c(x) for c, x in zip(cells, X)]))


def reference_of(f, x):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x)[0]


class TestOutForms:
    @pytest.mark.parametrize("size", [5, 0])
    def test_add(self, size):
        def f(x):
            z = torch.empty(size, dtype=torch.float64)
            assert torch.add(x, 1, out=z) is z
            return z

        with torchlift.strict():
            torch.testing.assert_close(vmap(f)(X), X + 1)
            torch.testing.assert_close(vmap(vmap(f))(X[None]), X[None] + 1)

    def test_many_results(self):
        def f(x):
            z, i = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.long)
            torch.sort(x, out=(z, i))
            m = torch.empty(2, 5, dtype=torch.float64)
            torch.stack([x, z], out=m)
            return m * i

        torch.testing.assert_close(vmap(f)(X), loop(f, X))

    def test_errors(self):
        z = torch.zeros(5, dtype=torch.float64)
        with pytest.raises(UnsupportedError, match="aten::add writes values that differ"):
            vmap(lambda x: torch.add(x, 1, out=z))(X)
        with pytest.raises(UnsupportedError, match=r"`out` has shape \[2\], and the result \[5\]"):
            vmap(lambda x: torch.add(x, 1, out=torch.zeros(2, dtype=torch.float64)))(X)


@pytest.mark.parametrize("write", ["z.add_(x)", "z[0] = x[0]", "z.view(5)[1:3].copy_(x[:2])"])
def test_captured_tensors_are_refused(write):
    z = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(UnsupportedError, match="no batch dimension"):
        vmap(lambda x: exec(write, {"z": z, "x": x}) or x)(X)
    assert torch.equal(z, torch.zeros(5, dtype=torch.float64))


def test_shared_values_into_captured_tensors():
    counter = torch.zeros(2)

    def f(x):
        counter.add_(torch.ones(2))
        counter[0] = torch.tensor(5.0)
        return x + counter[1]

    torch.testing.assert_close(vmap(f)(X), X + 1)
    assert counter.tolist() == [5, 1]
    torch.testing.assert_close(vmap(vmap(f))(X), X + 2)
    assert counter.tolist() == [5, 2]


def test_dropout_of_a_shared_input():
    x = torch.ones(200)
    drawn = vmap(lambda c: torch.nn.functional.dropout(x) * c, randomness="different")(torch.ones(2))
    assert not torch.equal(drawn[0], drawn[1])
    same = vmap(lambda c: torch.nn.functional.dropout(x) * c, randomness="same")(torch.ones(2))
    assert torch.equal(same[0], same[1])


class TestTensorsOfAFunction:
    def test_their_data_is_there(self):
        def f(x):
            table = torch.zeros(2, 3)
            assert table.tolist() == [[0.0] * 3] * 2
            assert table.numpy().sum() == 0
            assert int(torch.ones(2, dtype=torch.long).sum()) == 2
            return x + table.sum()

        torch.testing.assert_close(vmap(f)(X), X)

    def test_a_cache_outlives_the_level(self):
        cache = {}

        def f(x):
            if "mask" not in cache:
                cache["mask"] = torch.ones(5, 5).tril()
            return x @ cache["mask"].double()

        expected = X @ torch.ones(5, 5).tril().double()
        for _ in range(2):
            torch.testing.assert_close(vmap(f)(X), expected)
        assert torch.equal(cache["mask"], torch.ones(5, 5).tril())
        cache["mask"].add_(1)
        assert cache["mask"].numpy()[0, 1] == 1

    def test_what_is_cached_keeps_its_views(self):
        cache = {}

        def f(x):
            if "mask" not in cache:
                cache["table"] = torch.ones(5, 5, dtype=torch.float64).tril()
                cache["mask"] = cache["table"].view(1, 5, 5)[0].t()
                with torch.no_grad():
                    cache["row"] = cache["table"][3]
            return cache["mask"] @ x + cache["row"]

        expected = X @ torch.ones(5, 5).double().tril() + torch.tensor([1, 1, 1, 1, 0])
        torch.testing.assert_close(vmap(vmap(f))(X[None])[0], expected)
        torch.testing.assert_close(vmap(f)(X), expected)
        torch.testing.assert_close(torch.stack([f(x) for x in X]), expected)
        cache["mask"].mul_(2)
        assert cache["table"][4, 0].item() == 2 and cache["row"][0].item() == 2

    def test_parameters_and_losses_that_are_kept(self):
        w = W.clone().requires_grad_()
        kept = {}

        def f(x):
            kept["scale"] = torch.nn.Parameter(torch.full((5,), 2.0, dtype=torch.float64))
            kept["penalty"] = torch.zeros((), dtype=torch.float64)
            kept["penalty"] += (w**2).sum()
            return x * w * kept["scale"]

        out = vmap(f)(X)
        gradient = torch.autograd.grad(kept["penalty"] + out.sum(), w)[0]
        torch.testing.assert_close(gradient, 2 * W + 2 * X.sum(0))
        (kept["scale"] * W).sum().backward()
        torch.testing.assert_close(kept["scale"].grad, W)

    def test_leaves(self):
        def f(x):
            w = torch.ones(5, dtype=torch.float64, requires_grad=True)
            v = torch.nn.Parameter(torch.empty(5, dtype=torch.float64).fill_(3))
            ((w * v - x) ** 2).sum().backward()
            return torch.stack([w.grad, v.grad])

        torch.testing.assert_close(vmap(f)(X), loop(f, X))
        torch.testing.assert_close(vmap(vmap(f))(X[None])[0], loop(f, X))

    def test_data(self):
        def f(x):
            p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
            p.data = p.data * 2
            p.data[1] = x[0]
            return x * p

        torch.testing.assert_close(vmap(f)(X), loop(f, X))

    def test_copies(self):
        linear = torch.nn.Linear(5, 5).double()

        def f(x):
            file = io.BytesIO()
            torch.save(torch.ones(5, dtype=torch.float64), file)
            file.seek(0)
            return copy.deepcopy(linear)(x) * copy.deepcopy(W) * torch.load(file)

        torch.testing.assert_close(vmap(f)(X), loop(f, X))

    def test_lazy_modules(self):
        def f(x):
            torch.manual_seed(0)
            return torch.nn.LazyLinear(3, dtype=torch.float64)(x)

        torch.testing.assert_close(vmap(f, randomness="same")(X), loop(f, X))

    def test_inside_a_function_without_gradient(self):
        def f(x):
            with torch.no_grad():
                z = torch.zeros(5, dtype=torch.float64)
                z += x
            return (x * z).sum()

        torch.testing.assert_close(vmap(grad(f))(X), X)
        torch.testing.assert_close(grad(lambda x: vmap(f)(x).sum())(X), X)

    def test_functions_of_torch_stay_what_they_are(self):
        names = ["empty", "empty_like", "empty_strided", "tensor"]
        inside = []
        vmap(lambda x: inside.extend(getattr(torch, n) for n in names) or x)(X)
        for name, seen in zip(names, inside):
            function = getattr(torch, name)
            assert seen is function is getattr(torch._C._VariableFunctions, name)
            assert type(function) is type(torch.zeros) and function.__name__ == name
            assert pickle.loads(pickle.dumps(function)) is function
            assert function.__doc__
        with pytest.raises(TypeError, match="argument 'size'"):
            torch.empty("no")
        with pytest.raises(TypeError, match="argument 'size'"):
            vmap(lambda x: torch.empty("no"))(X)

    def test_plain_after_an_exception(self):
        with pytest.raises(ZeroDivisionError):
            vmap(lambda x: vmap(lambda y: 1 / 0)(x))(X)
        for made in (torch.zeros(2), torch.empty(2), torch.tensor([1.0]), W.new_zeros(2), W.clone()):
            assert "vmap" not in repr(made)
            assert made.untyped_storage().nbytes() > 0

    def test_references(self):
        def f(x):
            z = torch.empty(5)
            counts.append(sys.getrefcount(z))
            return x

        counts = []
        f(X)
        vmap(f)(X)
        assert counts[0] == counts[1]

    def test_two_threads(self):
        def f(x):
            for _ in range(20):
                z = torch.empty(2, 5, dtype=torch.float64)
                barrier.wait()
                z[0] = x
                barrier.wait()
                z[1] = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
            return z.sum(0)

        barrier = threading.Barrier(2)
        got = {}

        def run(key, transform, x):
            got[key] = transform(f)(x)

        threads = [
            threading.Thread(target=run, args=("vmap", vmap, X)),
            threading.Thread(target=run, args=("nested", lambda f: vmap(vmap(f)), X[None])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = X + torch.arange(1.0, 6)
        torch.testing.assert_close(got["vmap"], expected)
        torch.testing.assert_close(got["nested"][0], expected)

    def test_another_thread_makes_plain_tensors(self):
        made = []

        def make():
            made.extend([torch.zeros(3), torch.empty(3).zero_(), torch.tensor([0.0] * 3)])

        def f(x):
            thread = threading.Thread(target=make)
            thread.start()
            thread.join()
            assert all("vmap" not in repr(each) for each in made)
            return x

        vmap(f)(X)
        assert [each.tolist() for each in made] == [[0, 0, 0]] * 3

    def test_out_is_returned_itself(self):
        z, y = torch.ones(3), torch.ones(2)
        vmap(lambda x: x + torch.zeros(3, out=z).sum() + torch.empty(2, out=y).numel())(X)
        assert z.tolist() == [0, 0, 0]
        assert y.tolist() == [1, 1]




# --- what is a constant, and what shares memory with one ------------------------------------------


def read_by_data(x):
    z = torch.zeros(5, dtype=torch.float64)
    data = z.data
    z += x
    return data * z


def data_of_batched(x):
    z = x * 1
    return z.data * z


def read_detached(x):
    z = torch.zeros(10, dtype=torch.float64)
    rows = z.view(2, 5)
    seen = rows.detach()
    rows[0] = x
    return seen * z.view(2, 5).cos()


def written_detached(x):
    z = torch.zeros(5, dtype=torch.float64)
    other = z.detach()
    other[:3] = x[:3]
    return z * x


def given_data(x):
    z = torch.zeros(5, dtype=torch.float64)
    z.data = x * 2
    return (z + 1) * x


def whole_after_a_part(x):
    z = torch.zeros(5, dtype=torch.float64)
    z[0] = x[0]
    z += x
    return z * x


@pytest.mark.parametrize(
    "f", [read_by_data, data_of_batched, read_detached, written_detached, given_data, whole_after_a_part]
)
def test_constants_in_every_domain(f):
    def total(x):
        return f(x).sin().sum()

    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(torch.stack([total(row) for row in x]).sum(), x)[0]
    torch.testing.assert_close(vmap(f)(X), torch.stack([f(row) for row in X]))
    torch.testing.assert_close(vmap(grad(total))(X), expected)
    torch.testing.assert_close(grad(lambda xs: vmap(total)(xs).sum())(X), expected)
    torch.testing.assert_close(vmap(jacfwd(total))(X), expected)


def test_sparse_tensors_that_the_function_makes():
    def f(x):
        indices, values = torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0], dtype=torch.float64)
        return torch.sparse.mm(torch.sparse_coo_tensor(indices, values, (2, 5)), x[:, None])

    torch.testing.assert_close(vmap(f)(X), torch.stack([f(row) for row in X]))
    torch.testing.assert_close(
        grad(lambda xs: vmap(f)(xs).sum())(X), torch.tensor([2.0, 1, 0, 0, 0]).double().expand(3, 5)
    )


def test_one_hot_of_shared_classes():
    def f(x):
        return torch.nn.functional.one_hot(torch.tensor([0, 2])).double() @ x[:3]

    torch.testing.assert_close(vmap(f)(X), torch.stack([f(row) for row in X]))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.new_tensor([1.0, 2.0, 3.0]),
        lambda x: x.new_tensor([1, 2, 3], dtype=torch.int32),
        lambda x: x.new(3).fill_(2.0),
        lambda x: x.new(torch.Size([1, 3])).fill_(2.0),
        lambda x: x.new([1.0, 2.0, 3.0]),
        lambda x: x.new().resize_as_(x[:3]).fill_(1.0),
    ],
)
def test_legacy_constructors(make):
    def f(x):
        z = make(x)
        y = z * x[:3]
        z[..., 0] = x[1]
        return y + z

    torch.testing.assert_close(vmap(f)(X), torch.stack([f(row) for row in X]))
    torch.testing.assert_close(vmap(vmap(f))(X.expand(2, 3, 5))[1], torch.stack([f(row) for row in X]))


def test_kernels_on_plain_tensors():
    """What they make is theirs, also where they are written in Python."""

    @torch.library.custom_op("torchlift_test_promotion::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        y += x
        return y + torch.zeros(5, dtype=x.dtype) + x

    doubled.register_autograd(lambda ctx, g: doubled(g))
    w, bilinear = X[0], torch.nn.functional.bilinear
    weight = torch.randn(2, 5, 5, dtype=torch.float64)
    for f in (doubled, lambda w: bilinear(w, w, weight)):
        expected = grad(lambda w: 6 * f(w).sin().sum())(w)
        ours = grad(lambda w: vmap(lambda r: f(w).sin().sum() * r)(torch.tensor([1.0, 2, 3])).sum())(w)
        torch.testing.assert_close(ours, expected)
