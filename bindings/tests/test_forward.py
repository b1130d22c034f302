"""jvp, linearize, jacrev, jacfwd, jacobian, hessian and what they are made of."""

import threading

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.func as peer
import torch.nn.functional as F

import torchlift
from torchlift import TransformError, grad, hessian, jacfwd, jacobian, jacrev, jvp, vjp, vmap


def randn(*sizes):
    return torch.randn(sizes, dtype=torch.float64)


def close(a, b):
    torch.testing.assert_close(a, b)


@pytest.fixture(autouse=True)
def nothing_left_behind():
    yield
    assert torchlift._C.open_levels() == 0
    assert not torchlift._C.forward_mode_open()
    assert torch.is_grad_enabled()
    with fwAD.dual_level():  # libtorch refuses a second one
        pass


GENERATOR = torch.Generator().manual_seed(3)
W1, W2, B, TARGET = (
    torch.randn(size, generator=GENERATOR, dtype=torch.float64) for size in ((5, 3), (4, 5), 5, 3)
)


def mlp(x):
    return torch.tanh(x @ W1.T + B) @ W2.T


# Functions of a [3]-tensor, a family each.
FAMILIES = {
    "arithmetic": lambda x: (2 * x + 1 - x / 3) * x - 3 / (x + 5),
    "constants": lambda x: (torch.arange(3.0).double() - x) * torch.ones(3).double() + x,
    "mlp": mlp,
    "softmax": lambda x: F.softmax(x * x, -1) + F.log_softmax(x, -1) + x.logsumexp(0),
    "norms": lambda x: F.layer_norm(x * x, (3,), x, x) + F.group_norm((x * x)[None, :, None], 1)[0, :, 0],
    "batch_norm": lambda x: F.batch_norm((x * x)[:, None], None, None, x[:1], training=True)[:, 0],
    "losses": lambda x: torch.stack(
        [
            F.mse_loss(x, TARGET),
            F.huber_loss(x, TARGET, delta=0.5),
            F.cross_entropy(x[None], torch.tensor([1])),
            F.smooth_l1_loss(x, TARGET + 2),
        ]
    ),
    "activations": lambda x: F.gelu(x) + F.silu(x) + F.mish(x) + F.elu(x) + F.softplus(x),
    "conv": lambda x: F.conv1d((x * x)[None, None], torch.ones(1, 1, 2).double()).flatten(),
    "indexing": lambda x: torch.cat([x[[0, 2]], x[1:] * x[:-1]]),
    "in_place": lambda x: (x * x).mul_(2).add_(x).sin_(),
    "where": lambda x: torch.where(x > 0, x * x, x.sin()),
    "linalg": lambda x: torch.linalg.solve(torch.diag(x * x) + torch.ones(3, 3).double(), x),
    "reductions": lambda x: torch.stack([x.prod(), x.var(), x.norm(), x.exp().mean()]),
}


def difference(f, x, step=1e-6):
    flat = x.reshape(-1)
    columns = []
    for i in range(flat.numel()):
        e = torch.zeros_like(flat)
        e[i] = step
        columns.append((f((flat + e).view_as(x)) - f((flat - e).view_as(x))) / (2 * step))
    out = torch.stack(columns, -1)
    return out.reshape(*out.shape[:-1], *x.shape)


TRANSFORMS = {
    "vmap": lambda f: lambda x: vmap(lambda s: f(x * s))(torch.tensor([1.0, 1.5]).double()),
    "vjp": lambda f: lambda x: (lambda y, pull: pull(y.cos())[0])(*vjp(f, x)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.tensor([0.3, -1.0, 0.5]).double(),))[1],
    "jacrev": jacrev,
    "jacfwd": jacfwd,
}


class TestCompositions:
    X = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_jacobians(self, family):
        f = FAMILIES[family]
        expected = difference(f, self.X)
        for transform in (jacrev, jacfwd, jacobian):
            torch.testing.assert_close(transform(f)(self.X), expected, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("inner", TRANSFORMS)
    def test_two(self, family, inner):
        f = TRANSFORMS[inner](FAMILIES[family])
        expected = difference(f, self.X)
        for transform in (jacrev, jacfwd):
            torch.testing.assert_close(transform(f)(self.X), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("family", ["arithmetic", "mlp", "softmax", "in_place", "indexing"])
    @pytest.mark.parametrize("middle", TRANSFORMS)
    @pytest.mark.parametrize("inner", TRANSFORMS)
    def test_three(self, family, middle, inner):
        f = TRANSFORMS[middle](TRANSFORMS[inner](FAMILIES[family]))
        expected = difference(f, self.X)
        for transform in (jacrev, jacfwd):
            torch.testing.assert_close(transform(f)(self.X), expected, rtol=1e-3, atol=1e-4)


class TestJvp:
    def test_value_tangent_and_aux(self):
        x, t = randn(3), randn(3)
        close(jvp(torch.sin, (x,), (t,)), (x.sin(), x.cos() * t))
        y, dy, aux = jvp(lambda x: ({"a": x * x}, [x, "text"]), (x,), (t,), has_aux=True)
        close(dy["a"], 2 * x * t)
        close(aux[0], x)
        assert aux[1] == "text"

    def test_pytrees(self):
        p = {"w": randn(3), "b": [randn()]}
        t = {"w": randn(3), "b": [randn()]}
        _, dy = jvp(lambda p: p["w"] * p["b"][0], (p,), (t,))
        close(dy, t["w"] * p["b"][0] + p["w"] * t["b"][0])

    def test_like_torch_func(self):
        x, t = randn(4, 3), randn(4, 3)
        close(jvp(mlp, (x,), (t,)), peer.jvp(mlp, (x,), (t,)))

    def test_strict(self):
        x = randn(3)
        with pytest.raises(TransformError, match=r"strict=True: the output\[1\] does not depend"):
            jvp(lambda x: (x, torch.ones(2)), (x,), (x,), strict=True)
        close(jvp(lambda x: torch.ones(2), (x,), (x,))[1], torch.zeros(2))

    @pytest.mark.parametrize(
        "primals, tangents, message",
        [
            (lambda: randn(3), lambda: (randn(3),), "primals must be a tuple"),
            (lambda: (randn(3),), lambda: randn(3), "tangents must be a tuple"),
            (lambda: (), lambda: (), "there are no primals"),
            (lambda: (randn(3),), lambda: (randn(2),), r"shape \[2\] and dtype torch.float64, but"),
            (lambda: (randn(3),), lambda: (torch.ones(3),), r"Convert it with .to\(torch.float64\)"),
            (lambda: (randn(3),), lambda: ([randn(3)],), "the tangents have structure"),
            (lambda: (randn(3),), lambda: (1.0,), "is 1.0 .of type float., but must be a tensor"),
            (lambda: (torch.ones(3).long(),), lambda: (torch.ones(3).long(),), "dtype torch.int64"),
        ],
    )
    def test_bad_inputs(self, primals, tangents, message):
        with pytest.raises(TransformError, match=message):
            jvp(torch.sin, primals(), tangents())

    def test_nested_derivatives_do_not_mix(self):
        def d(f, x):
            return jvp(f, (x,), (torch.ones_like(x),))[1]

        two = torch.tensor(2.0)
        assert d(lambda a: a * d(lambda b: a + b, a), two) == 1
        assert d(lambda a: a * d(lambda b: a * b, a), two) == 4
        assert d(lambda a: a * d(lambda b: a * b * b, a), two) == 24

    def test_threads(self):
        x = randn(20)
        expected = jvp(lambda x: jvp(mlp3, (x,), (x,))[1], (x,), (x,))[1]
        wrong = []

        def work():
            for _ in range(20):
                got = jvp(lambda x: jvp(mlp3, (x,), (x,))[1], (x,), (x,))[1]
                if not torch.allclose(got, expected):
                    wrong.append(got)

        threads = [threading.Thread(target=work) for _ in range(4)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert not wrong


def mlp3(x):
    return (x.sin() * x).exp()


class TestNoGradMeansTheSameInBothModes:
    def check(self, f):
        x = randn(3)
        reverse, forward = jacrev(f)(x), jacfwd(f)(x)
        close(forward, reverse)
        close(jacfwd(jacfwd(f))(x), jacfwd(jacrev(f))(x))
        close(jacfwd(jacfwd(f))(x), jacrev(jacrev(f))(x))
        return reverse

    def test_no_grad(self):
        def f(x):
            with torch.no_grad():
                square = x * x
            return x * square

        x = torch.tensor(2.0)
        assert jacrev(f)(x) == jacfwd(f)(x) == 4  # torch.func: 4 and 12
        self.check(f)

    def test_views_and_detach(self):
        def f(x):
            with torch.no_grad():
                view = x.view(1, 3)[0]
            return x * view + x.detach() * x.sin() + x.data

        self.check(f)

    def test_in_place(self):
        def f(x):
            y = x.sin()
            with torch.no_grad():
                y.mul_(2)
            return y * x.detach()

        self.check(f)

    def test_stop_gradient(self):
        x = randn(3)
        got = self.check(lambda x: x * torchlift.stop_gradient({"a": x})["a"])
        assert got.shape == (3, 3)
        close(jacfwd(lambda x: x * torchlift.stop_gradient(x))(x), torch.diag(x))

    def test_a_function(self):
        def f(x):
            with torch.no_grad():
                y = Square.apply(x)
            return x * y

        self.check(f)

    def test_around_a_call_it_only_disconnects(self):
        w, x = randn(3).requires_grad_(), randn(3)
        with torch.no_grad():
            j = jacfwd(lambda x: (x * w).sin())(x)
            h = hessian(lambda x: (x * w).sin().sum())(x)
        close(j, torch.diag((x * w).cos() * w).detach())
        close(h, torch.diag(-(x * w).sin() * w * w).detach())
        assert not j.requires_grad and not h.requires_grad


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


@torchlift.custom_jvp
def square_by_jvp(x):
    return x * x


@square_by_jvp.defjvp
def _(primals, tangents):
    return square_by_jvp(*primals), 2 * primals[0] * tangents[0]


@torchlift.custom_vjp
def square_by_vjp(x):
    return x * x


square_by_vjp.defvjp(lambda x: (x * x, x), lambda x, g: (2 * x * g,))


class TestCustomRules:
    @pytest.mark.parametrize("square", [Square.apply, square_by_jvp, square_by_vjp])
    def test_fourth_power(self, square):
        f, x = (lambda x: square(square(x))), torch.tensor(3.0)
        for transforms in ([jacfwd] * 3, [jacrev] * 3, [jacfwd, jacrev, jacfwd], [jacrev, jacfwd]):
            g, values = f, []
            for transform in transforms:
                g = transform(g)
                values.append(g(x).item())
            assert values == [108, 108, 72][: len(values)]

    @pytest.mark.parametrize("square", [square_by_jvp, square_by_vjp])
    def test_under_vmap(self, square):
        xs = randn(4, 3)
        close(vmap(square)(xs), xs * xs)
        close(vmap(jacfwd(square))(xs), torch.diag_embed(2 * xs))
        close(vmap(jacrev(square))(xs), torch.diag_embed(2 * xs))
        close(vmap(hessian(lambda x: square(x).sum()))(xs), 2 * torch.eye(3).double().expand(4, 3, 3))
        close(jacrev(vmap(square))(xs[:2]), jacrev(lambda x: x * x)(xs[:2]))

    def test_the_rule_decides(self):
        @torchlift.custom_jvp
        def straight_through(x):
            return x.round()

        straight_through.defjvp(lambda p, t: (straight_through(*p), t[0]))
        x = randn(3)
        close(grad(lambda x: (straight_through(x) * x).sum())(x), x + x.round())
        close(jvp(straight_through, (x,), (x,))[1], x)

    def test_trees_and_constants(self):
        @torchlift.custom_vjp
        def scaled(p, factor):
            return {"y": p["a"] * factor, "z": p["b"]}

        scaled.defvjp(
            lambda p, factor: ({"y": p["a"] * factor, "z": p["b"] * 1}, factor),
            lambda factor, g: ({"a": g["y"] * factor, "b": g["z"]}, None),
        )
        p = {"a": randn(3), "b": randn(2)}
        grads = grad(lambda p: scaled(p, 3.0)["y"].sum() + scaled(p, 3.0)["z"].sum())(p)
        close(grads["a"], torch.full((3,), 3.0).double())
        tangent = jvp(lambda p: scaled(p, 3.0), (p,), (p,))[1]
        close(tangent["y"], 3 * p["a"])

    def test_errors(self):
        @torchlift.custom_jvp
        def bare(x):
            return x

        with pytest.raises(TransformError, match="bare has no rule yet. Give it one with bare.defjvp"):
            bare(randn(3))
        bare.defjvp(lambda p, t: t[0])
        with pytest.raises(TransformError, match="the jvp rule must return .output, tangent."):
            jvp(bare, (randn(3),), (randn(3),))

        @torchlift.custom_vjp
        def wrong(x):
            return x * 1

        wrong.defvjp(lambda x: (x * 1, None), lambda _, g: (g.sum(),))
        with pytest.raises(TransformError, match=r"gradient of argument 0 has shape \[\], but"):
            grad(lambda x: wrong(x).sum())(randn(3))


class TestJacobians:
    def test_like_torch_func(self):
        p, x = {"w": randn(4, 3), "b": randn(4)}, randn(3)

        def f(p, x):
            y = torch.tanh(p["w"] @ x + p["b"])
            return {"y": y, "s": (y.sum(), x * 2)}

        for argnums in (0, 1, (0, 1), (1,)):
            for ours, theirs in ((jacrev, peer.jacrev), (jacfwd, peer.jacfwd)):
                got, expected = ours(f, argnums)(p, x), theirs(f, argnums)(p, x)
                leaves = torch.utils._pytree.tree_flatten(got)
                wanted = torch.utils._pytree.tree_flatten(expected)
                assert leaves[1] == wanted[1]
                close(leaves[0], wanted[0])

    def test_names_aux_keywords_and_chunks(self):
        x, y = randn(5), randn(5)

        def f(x, *, y):
            return x * y, [x + y]

        for transform in (jacrev, jacfwd, jacobian):
            for chunk_size in (None, 1, 2, 5, 9):
                j, aux = transform(f, "y", has_aux=True, chunk_size=chunk_size)(x, y=y)
                close(j, torch.diag(x))
                close(aux, [x + y])

    def test_memory_budget(self):
        x, w = randn(128), randn(300, 128)
        f = lambda x: torch.tanh(w @ torch.sin(x))
        expected = jacrev(f)(x)
        for transform in (jacrev, jacfwd, jacobian):
            close(transform(f, memory_budget=200_000)(x), expected)
            report = torchlift.memory_report()
            assert report.peak_bytes <= 200_000 and 1 < report.chunk_size < 128
        energy = lambda x: f(x).sum()
        h = hessian(energy)(x)
        close(hessian(energy, memory_budget=500_000)(x), h)
        close(torchlift.laplacian(energy, memory_budget=500_000)(x), h.trace())
        close(torchlift.hessian_diag(energy, memory_budget=500_000)(x), h.diag())
        with pytest.raises(ValueError, match=r"jacrev: both chunk_size \(1\) and memory_budget \(2\)"):
            jacrev(f, chunk_size=1, memory_budget=2)

    def test_hessian(self):
        x = randn(4)
        f = lambda x: (mlp(x[:3]) * x).sum()
        close(hessian(f)(x), peer.hessian(f)(x))
        close(hessian(f, chunk_size=3)(x), peer.hessian(f)(x))
        xs = randn(6, 4)
        close(vmap(hessian(f))(xs), torch.stack([hessian(f)(x) for x in xs]))

    def test_empty_and_scalar(self):
        assert jacrev(torch.sin)(randn(0)).shape == (0, 0)
        assert jacfwd(torch.sin)(randn(0)).shape == (0, 0)
        close(hessian(lambda x: x**3)(torch.tensor(2.0)), torch.tensor(12.0))

    def test_no_graph_is_left_that_nobody_asked_for(self):
        x = randn(3)
        total = lambda x: (mlp(x) ** 2).sum()
        results = [t(mlp)(x) for t in (jacrev, jacfwd)]
        results += [s(t(mlp))(x) for s in (jacrev, jacfwd) for t in (jacrev, jacfwd)]
        results += [hessian(total)(x), jvp(grad(total), (x,), (x,))[1]]
        results += [*torchlift.hvp(total, (x,), (x,))[1], *torchlift.vhp(total, (x,), (x,))[1]]
        results += [torchlift.linearize(mlp, x)[1](x)]
        assert not any(result.requires_grad for result in results)

    def test_cotangents_of_many_pullbacks_are_differentiated(self):
        x, c = randn(3), randn(4, 3)
        for f in (torch.sin, F.silu, lambda x: torch.linalg.solve(torch.diag(x) + 5, x)):
            pull = vjp(f, x)[1]
            many = lambda c: vmap(lambda g: pull(g)[0])(c)
            loop = lambda c: torch.stack([pull(g)[0] for g in c])
            for transform in (jacrev, jacfwd):
                close(transform(many)(c), transform(loop)(c))
            row = lambda c: jacrev(lambda x: vmap(lambda g: vjp(f, x)[1](g)[0])(c))(x)
            close(jacrev(row)(c), jacfwd(row)(c))

    def test_a_fresh_buffer(self):
        def f(x):
            z = torch.zeros(4, dtype=x.dtype)
            z[1] = x[0] * x[2]
            return z

        x = randn(3)
        close(jacfwd(f)(x), jacrev(f)(x))

    def test_random_operators_run_once(self):
        j = jacfwd(lambda x: F.dropout(x, 0.5))(torch.ones(50))
        assert set(j.diag().tolist()) == {0.0, 2.0}

    @pytest.mark.parametrize(
        "call, message",
        [
            (lambda x: jacrev(torch.sin)(x.long()), "dtype torch.int64"),
            (lambda x: jacrev(lambda x: x > 0)(x), r"\[jacrev\] output 0 of the function has dtype"),
            (lambda x: jacfwd(lambda x: 3.0)(x), "the output is 3.0"),
            (lambda x: jacfwd(torch.sin, chunk_size=0), "chunk_size must be None or an int of at least 1, got 0"),
            (lambda x: jacrev(torch.sin, argnums=1)(x), "asks for argument 1"),
            (lambda x: jacfwd(torch.sin, randomness="no"), "randomness must be"),
            (lambda x: jacrev(torch.sin)(x + 0j), "is complex"),
        ],
    )
    def test_errors(self, call, message):
        with pytest.raises((TransformError, torchlift.UnsupportedError), match=message):
            call(randn(3))


class TestCurvature:
    X, V = torch.tensor([0.4, -0.7, 1.1, 0.2]).double(), torch.tensor([1.0, 0.5, -2, 3]).double()

    @staticmethod
    def energy(x):
        return (x.sin() * x.roll(1)).sum() + x.prod()

    def test_products(self):
        h = hessian(self.energy)(self.X)
        for product in (torchlift.hvp, torchlift.vhp):
            value, (hv,) = product(self.energy, (self.X,), (self.V,))
            close(value, self.energy(self.X))
            close(hv, h @ self.V)
            value, (hv,), aux = product(
                lambda x: (self.energy(x), {"x": x}), (self.X,), (self.V,), has_aux=True
            )
            close(aux, {"x": self.X})

    def test_gauss_newton(self):
        loss = lambda y: (y**3).sum()
        x, v = randn(3), randn(3)
        j, h = jacrev(mlp)(x), hessian(loss)(mlp(x))
        y, (product,) = torchlift.ggn_vp(mlp, loss, (x,), (v,))
        close(y, mlp(x))
        close(product, j.T @ (h @ (j @ v)))

    def test_laplacian_and_diagonal(self):
        h = hessian(self.energy)(self.X)
        for chunk_size in (None, 1, 3):
            close(torchlift.laplacian(self.energy, chunk_size=chunk_size)(self.X), h.trace())
            close(torchlift.hessian_diag(self.energy, chunk_size=chunk_size)(self.X), h.diag())
        x = randn(3)
        close(torchlift.laplacian(mlp)(x), hessian(mlp)(x).diagonal(0, 1, 2).sum(1))
        xs = randn(5, 3)
        close(vmap(torchlift.laplacian(mlp))(xs), vmap(lambda x: hessian(mlp)(x).diagonal(0, 1, 2).sum(1))(xs))
        close(torchlift.laplacian(lambda x: (x**3).sum(), samples=2)(x), 6 * x.sum())

    def test_laplacian_of_what_has_no_series(self):
        @torchlift.custom_jvp
        def cube(x):
            return x**3

        @cube.defjvp
        def cube_jvp(primals, tangents):
            (x,), (t,) = primals, tangents
            return cube(x), 3 * x * x * t

        x = randn(4)
        f = lambda x: cube(x.sin()).sum()
        expected = hessian(lambda x: (x.sin() ** 3).sum())(x).trace()
        close(torchlift.laplacian(f)(x), expected)
        close(torchlift.laplacian(f, chunk_size=3)(x), expected)
        torch.manual_seed(0)
        close(torchlift.laplacian(lambda x: cube(x).sum(), samples=2)(x), 6 * x.sum())

    def test_laplacian_in_other_transforms(self):
        f = lambda w, x: torch.tanh(w * x).prod() + (x * x).sum().sqrt()
        w, x = randn(4), randn(4)
        laplacian = torchlift.laplacian(f, argnums=1)
        trace = lambda w, x: hessian(f, argnums=1)(w, x).trace()
        close(laplacian(w, x), trace(w, x))
        for transform in (lambda g: grad(g), lambda g: jacfwd(g), lambda g: hessian(g)):
            close(transform(laplacian)(w, x), transform(trace)(w, x))
        biharmonic = torchlift.laplacian(lambda x: laplacian(w, x))(x)
        close(biharmonic, hessian(lambda x: trace(w, x))(x).trace())
        leaf = w.clone().requires_grad_()
        laplacian(leaf, x).backward()
        close(leaf.grad, grad(trace)(w, x))

    def test_hessian_of_two_numbers(self):
        """Taylor mode, against forward over reverse (chunk_size)."""
        w = randn(2)
        f = lambda w, x: torch.tanh(w * x).prod() + (x * x).sum().sqrt() * w.sum()
        small, other = hessian(f, argnums=1), hessian(f, argnums=1, chunk_size=2)
        xs = randn(5, 2)
        close(vmap(small, (None, 0))(w, xs), vmap(other, (None, 0))(w, xs))
        close(vmap(vmap(small, (0, None)), (None, 0))(xs, xs), vmap(vmap(other, (0, None)), (None, 0))(xs, xs))
        for transform in (grad, jacrev, jacfwd, hessian):
            total = lambda h: lambda w, x: h(w, x).sum() if transform is grad else h(w, x)
            close(transform(total(small))(w, xs[0]), transform(total(other))(w, xs[0]))
        close(hessian(lambda x: hessian(lambda y: f(w, y))(x))(xs[0]), jacfwd(jacfwd(lambda x: other(w, x)))(xs[0]))
        leaf = w.clone().requires_grad_()
        small(leaf, xs[0]).pow(2).sum().backward()
        close(leaf.grad, grad(lambda w: other(w, xs[0]).pow(2).sum())(w))

    def test_hessian_of_few_numbers_in_trees(self):
        a, b = randn().squeeze(), randn(1)
        f = lambda p, c: ({"y": (p["a"] * p["b"]).sin() * c}, p["a"].item())
        got, aux = hessian(f, has_aux=True)({"a": a, "b": b}, randn(3))
        assert aux == a.item()
        c = randn(3)
        got, _ = hessian(f, has_aux=True)({"a": a, "b": b}, c)
        expected, _ = hessian(f, has_aux=True, chunk_size=1)({"a": a, "b": b}, c)
        close(got, expected)
        g = lambda a, b: (a * b).exp().sum()
        close(hessian(g, argnums=(0, 1))(a, b), hessian(g, argnums=(0, 1), chunk_size=1)(a, b))
        with pytest.raises(TransformError, match="only floating-point tensors have a Jacobian"):
            hessian(lambda a: a > 0)(a)
        with pytest.raises(TransformError, match="returned no tensor"):
            hessian(lambda a: ())(a)

    def test_laplacian_of_constants_and_nothing(self):
        close(torchlift.laplacian(lambda x: torch.ones(2) + x.detach()[:2])(randn(3)), torch.zeros(2).double())
        close(torchlift.laplacian(lambda x: x.sum())(randn(0)), torch.zeros(()).double())

    def test_linearize(self):
        x = randn(3)
        calls = []
        y, push = torchlift.linearize(lambda x: calls.append(1) or mlp(x), x)
        for _ in range(3):
            t = randn(3)
            close(push(t), jvp(mlp, (x,), (t,))[1])
        assert len(calls) == 1
        close(vmap(push)(torch.eye(3).double()), jacrev(mlp)(x).T)
        with pytest.raises(TransformError, match="the tangent of argument 0"):
            push(randn(2))

    def test_not_a_number(self):
        with pytest.raises(TransformError, match=r"hvp\(mlp.*shape \[4\], but it must return"):
            torchlift.hvp(mlp, (randn(3),), (randn(3),))


class TestCheckGrads:
    def test_right_and_wrong(self):
        x = randn(3)
        torchlift.check_grads(mlp, (x,), order=2)
        torchlift.check_grads(lambda p: {"y": p["a"] * p["b"]}, ({"a": randn(2), "b": randn(2)},), 2)

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x * 2

            @staticmethod
            def backward(ctx, g):
                return g * 3

            @staticmethod
            def jvp(ctx, t):
                return t * 3

        for mode in ("fwd", "rev"):
            with pytest.raises(AssertionError, match="differs from finite differences by"):
                torchlift.check_grads(Wrong.apply, (x,), modes=(mode,))
        with pytest.raises(TransformError, match="modes must be a tuple"):
            torchlift.check_grads(mlp, (x,), modes="fwd")


@pytest.mark.parametrize("name", ["jacrev", "jacfwd", "hessian"])
def test_results_carry_no_graph_that_nobody_asked_for(name):
    def f(x):
        return (x * x * x).sum() + x[0] * x[1] ** 2

    x = torch.tensor([1.0, 3.0])
    transform = getattr(torchlift, name)
    result = transform(f)(x) if name == "hessian" else transform(torchlift.grad(f))(x)
    assert not result.requires_grad
    assert transform(torchlift.grad(f) if name != "hessian" else f)(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("f", [torch.sin, torch.log1p, torch.nn.functional.silu])
def test_pullbacks_of_cotangents_with_tangents_carry_no_graph(f):
    x, c, t = (torch.tensor([v], dtype=torch.float64, requires_grad=False) for v in (0.5, 2.0, 3.0))

    def pulled(x, c):
        return torchlift.vjp(f, x)[1](c)[0]

    slope = torch.autograd.functional.jacobian(lambda x: f(x), x)[0]
    found = torchlift.jvp(lambda c: pulled(x, c), (c,), (t,))
    torch.testing.assert_close(found, (c * slope, t * slope))
    both = torchlift.jvp(pulled, (x, c), (t, t))
    assert not any(each.requires_grad for each in found + both)
    # Somebody asks for it.
    c.requires_grad_()
    _, tangent = torchlift.jvp(pulled, (x, c), (t, t))
    (of_cotangent,) = torch.autograd.grad(tangent, c)
    second = torchlift.grad(lambda x: torchlift.grad(lambda x: f(x).sum())(x).sum())(x)
    torch.testing.assert_close(of_cotangent, second * t)


@pytest.mark.parametrize("transform", [torchlift.jacrev, torchlift.jacfwd, torchlift.jacobian])
def test_complex_jacobians(transform):
    z = torch.randn(3, dtype=torch.complex128)
    f = lambda z: {"square": z * z, "sum": (z * z[0]).sum()}
    got = transform(f, holomorphic=True)(z)
    torch.testing.assert_close(got["square"], torch.diag(2 * z))
    want = z[0].expand(3).clone()
    want[0] += z.sum()
    torch.testing.assert_close(got["sum"], want)
    # The same numbers in real ones, and those of a function that is not holomorphic.
    parts = transform(lambda z: z * z, real_view=True)(z)
    assert parts.shape == (3, 2, 3, 2) and parts.dtype == torch.float64
    torch.testing.assert_close(torch.diagonal(parts[:, 0, :, 0]), 2 * z.real)
    torch.testing.assert_close(torch.diagonal(parts[:, 0, :, 1]), -2 * z.imag)
    norm = transform(lambda z, a: {"n": a * torch.real(z * z.conj()).sum()}, argnums=(0, 1), real_view=True)
    by_z, by_a = norm(z, torch.tensor(2.0, dtype=torch.float64))["n"]
    torch.testing.assert_close(by_z, 4 * torch.view_as_real(z))
    torch.testing.assert_close(by_a, (z.abs() ** 2).sum())
    _, (aux, note) = transform(lambda z: (z.conj(), (z + 1, "note")), has_aux=True, real_view=True)(z)
    torch.testing.assert_close(aux, z + 1)
    assert note == "note"


def test_complex_hessians():
    z = torch.randn(3, dtype=torch.complex128)
    got = torchlift.hessian(lambda z: (z**3).sum(), holomorphic=True)(z)
    torch.testing.assert_close(got, torch.diag(6 * z))
    got = torchlift.hessian(lambda z: (z.abs() ** 2).sum(), real_view=True)(z)
    torch.testing.assert_close(got.reshape(6, 6), 2 * torch.eye(6, dtype=torch.float64))
    zs = torch.randn(4, 3, dtype=torch.complex128)
    got = torchlift.vmap(torchlift.hessian(lambda z: (z**3).sum(), holomorphic=True))(zs)
    torch.testing.assert_close(got, torch.diag_embed(6 * zs))


def test_complex_jacobians_ask_what_is_meant():
    z = torch.randn(3, dtype=torch.complex128)
    for transform in (torchlift.jacrev, torchlift.jacfwd, torchlift.jacobian, torchlift.hessian):
        with pytest.raises(torchlift.UnsupportedError, match="complex.*holomorphic.*real_view"):
            transform(lambda z: z * z)(z)
        with pytest.raises(torchlift.TransformError, match="holomorphic and real_view were both given"):
            transform(torch.sin, holomorphic=True, real_view=True)
        with pytest.raises(torchlift.TransformError, match=r"holomorphic: (in|out)put 0.* dtype Double"):
            transform(torch.sin, holomorphic=True)(z.real)
