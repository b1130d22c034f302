"""torchlift.trace and make_fx: that a graph computes what the function does, and says what it cannot."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import torchlift
from torchlift import TransformError, UnsupportedError, grad, make_fx, trace, vmap


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def ops(traced):
    return [name for name, *_ in traced.graph.nodes()]


def targets(module):
    return [str(node.target) for node in module.graph.nodes if node.op == "call_function"]


def check(f, *args, again=None, **kwargs):
    """Traced with args; run on args and on other numbers; as a graph, optimized, and by fx."""
    traced = trace(f)(*args, **kwargs)
    traced.graph.verify()
    others = again if again is not None else torch.utils._pytree.tree_map(fresh, args)
    for given in (args, others):
        expected = f(*given, **kwargs)
        assert_close(traced(*given, **kwargs), expected)
        leaves = torchlift._pytree.flatten((given, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        assert_close(traced.rebuild(traced.optimized().run(tensors)), expected)
        if not kwargs:
            assert_close(make_fx(f)(*args)(*given), expected)
    return traced


def fresh(leaf):
    return torch.randn_like(leaf) if isinstance(leaf, torch.Tensor) else leaf


def mlp(params, x):
    return (torch.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]).sum(-1)


def params(hidden=4):
    return {"w1": data(3, hidden), "b1": data(hidden), "w2": data(hidden, 2)}


def loss(p, x):
    return mlp(p, x).square().sum()


# --- transforms ------------------------------------------------------------------------------------

in_x = (None, 0)
COMPOSITIONS = {
    "plain": loss,
    "grad": grad(loss),
    "value_and_grad": torchlift.value_and_grad(loss),
    "vmap": vmap(loss, in_dims=in_x),
    "vmap(vmap)": vmap(vmap(mlp, in_dims=in_x), in_dims=in_x),
    "vmap(grad)": vmap(grad(loss), in_dims=in_x),
    "grad(vmap)": grad(lambda p, x: vmap(loss, in_dims=in_x)(p, x).sum()),
    "vmap(vmap(grad))": vmap(vmap(grad(loss), in_dims=in_x), in_dims=in_x),
    "jacrev": torchlift.jacrev(mlp),
    "jacfwd": torchlift.jacfwd(mlp),
    "hessian": torchlift.hessian(loss, argnums=1),
    "vmap(jacrev)": vmap(torchlift.jacrev(mlp, argnums=1), in_dims=in_x),
    "vmap(jacfwd)": vmap(torchlift.jacfwd(mlp, argnums=1), in_dims=in_x),
    "vmap(hessian)": vmap(torchlift.hessian(loss, argnums=1), in_dims=in_x),
    "jvp": lambda p, x: torchlift.jvp(lambda x: mlp(p, x), (x,), (x.cos(),)),
    "vjp": lambda p, x: torchlift.vjp(mlp, p, x)[1](torch.ones_like(mlp(p, x))),
    "jvp(grad)": lambda p, x: torchlift.jvp(
        lambda x: grad(loss, argnums=1)(p, x), (x,), (torch.ones_like(x),)
    ),
    "grad(jvp)": lambda p, x: grad(
        lambda x: torchlift.jvp(lambda x: loss(p, x), (x,), (x.sin(),))[1]
    )(x),
    "hvp": lambda p, x: torchlift.hvp(lambda x: loss(p, x), (x,), (x.sin(),)),
    "linearize": lambda p, x: torchlift.linearize(lambda x: mlp(p, x), x)[1](x.sin()),
    "jet": lambda p, x: torchlift.jet(lambda x: loss(p, x), (x,), (torch.stack([x.sin(), x.cos()]),)),
    "checkpoint": grad(lambda p, x: torchlift.checkpoint(loss, p, x)),
    "chunks": vmap(grad(loss), in_dims=in_x, chunk_size=2),
    "scan": lambda p, x: torchlift.scan(
        lambda c, row: (c + row.sum(), c * row.sum()), x.new_zeros(()), x
    ),
    "fori_loop": lambda p, x: torchlift.fori_loop(0, 3, lambda i, c: c * 2 + i, x),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_every_transform_and_composition(name):
    f = COMPOSITIONS[name]
    x = data(5, 2, 3) if name.count("vmap") == 2 else data(5, 3) if "vmap" in name else data(4, 3)
    if name == "chunks":
        x = data(5, 3)
    check(f, params(), x)


@pytest.mark.parametrize("size", [0, 1])
def test_batches_of_none_and_one(size):
    check(vmap(grad(loss), in_dims=in_x), params(), data(size, 3))


def test_transforms_of_a_traced_program():
    p, x = params(), data(3)
    traced = trace(loss)(p, x)
    assert_close(grad(traced)(p, x), grad(loss)(p, x))
    xs = data(5, 3)
    assert_close(vmap(grad(traced), in_dims=in_x)(p, xs), vmap(grad(loss), in_dims=in_x)(p, xs))
    assert_close(torchlift.hessian(traced, argnums=1)(p, x), torchlift.hessian(loss, argnums=1)(p, x))
    x = data(3).requires_grad_()
    traced(p, x).backward()
    assert_close(x.grad, grad(loss, argnums=1)(p, x.detach()))


def test_a_trace_inside_of_a_trace():
    check(lambda x: trace(torch.sin)(torch.ones(3, dtype=x.dtype))(x), data(3))


# --- arguments and results -------------------------------------------------------------------------


class TestArguments:
    def test_pytrees_numbers_and_strings(self):
        def f(tree, pair, n=2, *, mode="up"):
            sign = 1 if mode == "up" else -1
            return {"a": tree["x"] * n * sign, "b": [pair[0], 5, "s", None]}

        x, y = data(3), data(2)
        traced = trace(f)({"x": x}, (y, 1), 3, mode="down")
        out = traced({"x": x + 1}, (y, 1), 3, mode="down")
        assert_close(out["a"], -3 * (x + 1))
        assert out["b"][1:] == [5, "s", None]

    def test_the_names_of_inputs(self):
        traced = trace(loss)(params(), data(3))
        names = [value.name for value in traced.graph.inputs()]
        assert names == ["p_b1", "p_w1", "p_w2", "x"]

    def test_no_tensors_at_all(self):
        traced = trace(lambda: torch.ones(3) * 2)()
        assert_close(traced(), torch.full((3,), 2.0))

    def test_outputs_of_every_kind(self):
        captured = data(3)
        check(lambda x: (x, x[0], captured, captured[1:], torch.ones(2), x * captured, 3), data(3))

    def test_dtypes(self):
        check(
            lambda x: (x.to(torch.int32), x > 0, x.to(torch.complex64) * 1j, x.half()), data(4)
        )
        check(lambda i: i * 2 + (i % 3), torch.arange(5), again=(torch.arange(5) + 7,))

    @pytest.mark.parametrize(
        "args, message",
        [
            ((torch.zeros(4), 2), r"input 0 \(x\) is Float\[4\] on cpu; the program was traced"),
            ((torch.zeros(3).double(), 2), r"is Double\[3\]"),
            ((torch.zeros(3), 5), "got 5 .* where the function was traced with 2"),
            ((torch.zeros(3), torch.zeros(())), "a tensor of shape .* traced with 2"),
            ((2, 2), "got 2 .* traced with a tensor"),
            ((torch.zeros(3),), "another structure"),
            (([torch.zeros(3)], 2), "another structure"),
        ],
    )
    def test_wrong_arguments(self, args, message):
        traced = trace(lambda x, s: x * s)(torch.zeros(3), 2)
        with pytest.raises(TransformError, match=message):
            traced(*args)


# --- writes, views, constants, random operators ----------------------------------------------------


class TestWrites:
    def test_into_temporaries_and_views(self):
        def f(x):
            y = x.clone()
            y[0].mul_(2)
            y[:, 1] = 7
            y.add_(x.sum())
            return y, y.t()[0]

        check(f, data(3, 3))
        check(vmap(f), data(2, 3, 3))

    def test_into_tensors_that_the_function_makes(self):
        def f(x):
            z = torch.zeros(3, dtype=x.dtype)
            z[1:] += x[1:]
            return z

        for g, x in ((f, data(3)), (vmap(f), data(2, 3))):
            assert_close(trace(g)(data(*x.shape))(x), g(x))
            assert_close(make_fx(g)(data(*x.shape))(x), g(x))
            assert_close(torchlift.jit(g)(x), g(x))

    def test_into_arguments(self):
        def f(x):
            x.mul_(2)
            return x + 1

        x = data(3)
        before = x.clone()
        traced = trace(f)(x)
        assert_close(x, before)  # tracing wrote into a copy
        y = data(3)
        expected = f(y.clone())
        kept = y.clone()
        assert_close(traced(y), expected)
        assert_close(y, kept * 2)

    def test_out_arguments(self):
        def f(x):
            out = torch.empty_like(x)
            torch.sin(x, out=out)
            return out

        check(f, data(3))

    def test_views(self):
        def f(x):
            a, b = x.split(2)
            c = x.view(-1).unfold(0, 2, 1)
            return a * b, c.sum(), x.as_strided((2, 2), (1, 2)), x.t().flatten(), x.diagonal() + 1

        check(f, data(4, 4))


class TestConstants:
    def test_captured_tensors(self):
        captured = data(3)
        traced = trace(lambda x: x * captured)(data(3))
        (name, constant), *_ = traced.graph.constants()
        assert constant.data_ptr() == captured.data_ptr()
        captured.fill_(2)
        assert_close(traced(torch.ones(3, dtype=torch.float64)), captured)

    def test_factories(self):
        check(lambda x: x + torch.arange(3) + torch.zeros_like(x) + torch.full((3,), 2.0), data(3))

    def test_parameters(self):
        model = nn.Linear(3, 2).double()
        check(model, data(4, 3))
        state = {**dict(model.named_parameters())}
        check(lambda s, x: torchlift.functional_call(model, s, (x,)), dict(state), data(4, 3))


class TestRandom:
    def test_a_run_with_a_seed_repeats(self):
        traced = trace(lambda x: x + torch.randn(4) + torch.rand_like(x))(torch.zeros(4))
        state = torch.get_rng_state()
        a, b, c = (traced(torch.zeros(4), seed=s) for s in (1, 1, 2))
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert torch.equal(torch.get_rng_state(), state)
        assert not torch.equal(traced(torch.zeros(4)), traced(torch.zeros(4)))

    def test_without_a_seed_it_draws_as_the_function_does(self):
        def f(x):
            y = nn.functional.dropout(x) + torch.randn(20)
            return y + torch.randperm(20) + torch.bernoulli(0 * x + 0.5)

        traced = trace(f)(torch.zeros(20))
        torch.manual_seed(1)
        expected = f(torch.ones(20))
        torch.manual_seed(1)
        assert_close(traced(torch.ones(20)), expected)

    def test_of_captured_tensors(self):
        captured = torch.full((200,), 0.5)
        traced = trace(lambda x: x + torch.bernoulli(captured))(torch.zeros(200))
        assert not torch.equal(traced(torch.zeros(200)), traced(torch.zeros(200)))

    @pytest.mark.parametrize(
        "draw",
        [
            lambda: torch.bernoulli(torch.full((200,), 0.5)),
            lambda: torch.zeros(200).uniform_(),
            lambda: torch.randn_like(torch.zeros(200)),
        ],
    )
    def test_of_tensors_that_the_function_makes(self, draw):
        traced = trace(lambda x: x + draw())(torch.zeros(200))
        assert not torch.equal(traced(torch.zeros(200)), traced(torch.zeros(200)))

    def test_under_vmap(self):
        f = vmap(lambda x: nn.functional.dropout(x, 0.5), randomness="different")
        traced = trace(f)(torch.ones(4, 100))
        torch.manual_seed(1)
        out = traced(torch.ones(4, 100))
        assert set(out.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(out[0], out[1])


# --- functions with rules of their own -------------------------------------------------------------


class TestCustomRules:
    def test_custom_vjp(self):
        @torchlift.custom_vjp
        def f(x):
            return x.sin()

        f.defvjp(lambda x: (x.sin(), x), lambda x, g: (7 * g * x,))
        traced = check(vmap(grad(f)), data(3))
        assert "aten::cos" not in ops(traced)

    def test_custom_jvp(self):
        @torchlift.custom_jvp
        def f(x):
            return x.sin()

        f.defjvp(lambda primals, tangents: (primals[0].sin(), 7 * tangents[0]))
        x = data(3)
        traced = trace(lambda x: torchlift.jvp(f, (x,), (x,)))(x)
        assert_close(traced(x), (x.sin(), 7 * x))

    def test_autograd_function(self):
        class Seven(torch.autograd.Function):
            @staticmethod
            def forward(x):
                return x.sin()

            @staticmethod
            def setup_context(ctx, inputs, output):
                ctx.save_for_backward(*inputs)

            @staticmethod
            def backward(ctx, g):
                return 7 * g * ctx.saved_tensors[0]

        check(grad(lambda x: Seven.apply(x).sum()), data(3))

    def test_autograd_inside(self):
        def f(x):
            y = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(y.sin().sum(), y)
            return g

        check(f, data(3))

# --- branches and loops ----------------------------------------------------------------------------


def newton(a):
    return torchlift.while_loop(
        lambda x: (x * x - a).abs() > 1e-9, lambda x: 0.5 * (x + a / x), torch.ones_like(a)
    )


def root(x):
    return torchlift.cond(x > 0, torch.sqrt, torch.zeros_like, x)


class TestControlFlow:
    """The graph takes the way that its own inputs ask for, not that of the run that was traced."""

    def check(self, f, *inputs):
        traced = trace(f)(*inputs[0])
        jitted = torchlift.jit(f)
        for given in inputs:
            expected = f(*given)
            assert_close(traced(*given), expected, check_stride=False)
            assert_close(jitted(*given), expected, check_stride=False)
        assert jitted.cache_info().misses == 1
        return traced

    def test_cond(self):
        w = data(3)
        f = lambda x: torchlift.cond(x.sum() > 0, lambda x: {"y": x * w}, lambda x: {"y": x.cos()}, x)  # noqa: E731
        x = data(3).abs()
        traced = self.check(f, (x,), (-x,))
        assert "cond" in traced.code()

    def test_cond_by_example(self):
        x = torch.tensor([4.0, 0.0, -1.0], dtype=torch.float64)
        self.check(vmap(root), (x,), (-x,))
        self.check(vmap(grad(root)), (x,), (-x,))

    def test_gradients_of_cond(self):
        f = lambda x: torchlift.cond(x.sum() > 0, torch.sin, lambda x: x**3, x).sum()  # noqa: E731
        x = data(3).abs()
        for transform in (grad, torchlift.hessian):
            self.check(transform(f), (x,), (-x,))

    def test_numbers_as_results(self):
        f = lambda x: torchlift.cond(x.sum() > 0, lambda x: (x, 1.0), lambda x: (-x, 2.5), x)  # noqa: E731
        x = data(3).abs()
        self.check(f, (x,), (-x,))

    def test_while_loop(self):
        some = torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64)
        many = torch.tensor([1e6, 2.0, 1e-3], dtype=torch.float64)
        traced = self.check(vmap(newton), (some,), (many,))
        assert "while_loop" in traced.code()

    def test_loops_in_branches_in_loops(self):
        def collatz(n):
            step = lambda n: torchlift.cond(n % 2 == 0, lambda n: n // 2, lambda n: 3 * n + 1, n)  # noqa: E731
            body = lambda c: (step(c[0]), c[1] + 1)  # noqa: E731
            return torchlift.while_loop(lambda c: c[0] != 1, body, (n, 0))[1]

        numbers = [torch.tensor(n) for n in (3, 27, 1)]
        self.check(collatz, *[(n,) for n in numbers])
        self.check(vmap(collatz), (torch.arange(1, 5),), (torch.tensor([27, 1, 2, 9]),))

    def test_scan(self):
        def f(w, xs):
            step = lambda h, x: (torch.tanh(h["h"] * w + x), {"y": h["h"]})  # noqa: E731
            carry = lambda h, x: ({"h": step(h, x)[0]}, step(h, x)[1])  # noqa: E731
            last, ys = torchlift.scan(carry, {"h": 0.0}, xs, reverse=True)
            return last, ys

        inputs = [(data(1)[0], data(5)), (data(1)[0], -data(5))]
        assert "scan" in self.check(f, *inputs).code()
        self.check(vmap(f, (None, 0)), (data(1)[0], data(3, 5)), (data(1)[0], -data(3, 5)))
        self.check(grad(lambda w, xs: f(w, xs)[1]["y"].sum()), *inputs)

    @pytest.mark.parametrize(
        "name, f",
        [
            ("cond", lambda x: torchlift.cond(x.sum() > 0, torch.sin, lambda x: x + 1, x)),
            ("while_loop", vmap(lambda a: newton(a * a + 1))),
            ("scan", lambda x: torchlift.scan(lambda h, x: (h + x, h * x), 0.0, x)),
        ],
    )
    def test_as_operators_of_torch_in_fx_graphs(self, name, f):
        x = data(4).abs()
        module = make_fx(f)(x)
        targets = [node.target for node in module.graph.nodes]
        assert getattr(torch.ops.higher_order, name) in targets
        compiled = torchlift.jit(f, backend="inductor")
        for given in (x, -x):
            assert_close(module(given), f(given))
            assert_close(compiled(given), f(given))
        assert compiled.cache_info().misses == 1
        with pytest.raises(UnsupportedError, match=f"'ts' has no form of {name}"):
            torchlift.jit(f, backend="ts")(x)

    def test_implicit_derivatives_loop_in_the_graph(self):
        def f(a):
            return torchlift.fixed_point(lambda x, a: (x + a / x) / 2, torch.ones_like(a), a)

        inputs = [(torch.tensor(v, dtype=torch.float64),) for v in (2.0, 30.0)]
        traced = trace(grad(f))(*inputs[0])
        for (a,) in inputs:
            assert_close(traced(a), 0.5 / a.sqrt(), rtol=1e-5, atol=1e-6)

    def test_saved(self, tmp_path):
        some = torch.tensor([4.0, 9.0, 1.0], dtype=torch.float64)
        torchlift.save(vmap(newton), tmp_path / "newton.tlc", some)
        loaded = torchlift.load(tmp_path / "newton.tlc")
        many = torch.tensor([1e6, 2.0, 1e-3], dtype=torch.float64)
        assert_close(loaded(many), many.sqrt())

    @pytest.mark.parametrize(
        "f, message",
        [
            (grad(newton), "custom_root"),
            (lambda x: torchlift.cond(x > 0, lambda x: x.mul_(2), lambda x: x, x), "from outside of it"),
            (lambda x: torchlift.while_loop(lambda x: x, lambda x: x, x), "bool tensor without dims"),
            (lambda x: torchlift.cond(x > 0, lambda x: x, lambda x: x[None], x), "but true_fn"),
        ],
    )
    def test_errors(self, f, message):
        with pytest.raises((TransformError, UnsupportedError), match=message):
            trace(f)(torch.tensor(2.0, dtype=torch.float64))

    @pytest.mark.parametrize(
        "f",
        [
            lambda x: torchlift.cond(x.sum() > 0, torch.sin, lambda x: x.view(-1).cos().view(x.shape), x),
            vmap(lambda row: newton(row.square().sum() + 1)),
            vmap(grad(lambda row: torchlift.cond(row.sum() > 0, torch.sin, torch.exp, row).sum())),
            lambda x: torchlift.scan(lambda h, row: (h + row, h * row), torch.zeros(2, dtype=x.dtype), x),
        ],
    )
    def test_dynamic_dims(self, f, tmp_path):
        x = data(4, 2)
        torchlift.save(f, tmp_path / "any.tlc", x, dynamic={0: {0: "n"}})
        traced = trace(f, dynamic={0: {0: "n"}})(x)
        loaded = torchlift.load(tmp_path / "any.tlc")
        jitted = torchlift.jit(f, dynamic={0: {0: "n"}})
        for n in (2, 3, 7):
            for given in (data(n, 2), -data(n, 2).abs()):
                for program in (traced, loaded, jitted):
                    assert_close(program(given), f(given))
        assert jitted.cache_info().misses == 1


# --- modules ---------------------------------------------------------------------------------------


class TestModules:
    @pytest.mark.parametrize(
        "model, shape",
        [
            (nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), (2, 2, 6, 6)),
            (nn.BatchNorm1d(3).eval(), (5, 3)),
            (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU()), (5, 3)),
            (nn.Dropout(0.5).eval(), (5, 3)),
            (nn.GRU(3, 4, batch_first=True), (2, 5, 3)),
            (nn.LSTM(3, 4, num_layers=2), (5, 2, 3)),
            (nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), (2, 5, 8)),
            (nn.Embedding(7, 3), None),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
    )
    def test_forward_and_gradient(self, model, shape):
        model = model.double()
        x = torch.randint(7, (5,)) if shape is None else data(*shape)
        again = (torch.randint(7, (5,)),) if shape is None else None
        check(model, x, again=again)
        state = dict(model.named_parameters())

        def total(state, x):
            out = torchlift.functional_call(model, state, (x,))
            return (out[0] if isinstance(out, tuple) else out).square().sum()

        if state:
            state = {name: p.detach() for name, p in state.items()}
            check(grad(total), state, x, again=(torchlift._pytree.tree_map(fresh, state), x))

    def test_attention(self):
        model = nn.MultiheadAttention(8, 2, batch_first=True).double()
        check(lambda x: model(x, x, x)[0], data(2, 5, 8))

    def test_batch_norm_in_training(self):
        ours, theirs = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()

        def f(state, x):
            return torchlift.functional_call(ours, state, (x,))

        state = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
        state = {name: t.detach().clone() for name, t in state.items()}
        traced = trace(f)(state, data(6, 3))
        for _ in range(2):
            x = data(6, 3)
            assert_close(traced(state, x), theirs(x).detach())
        assert_close(state["running_mean"], theirs.running_mean)
        assert_close(state["num_batches_tracked"], theirs.num_batches_tracked)

    def test_dropout_in_training(self):
        model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5)).double()
        x = data(4, 3)
        traced = trace(model)(x)
        torch.manual_seed(3)
        expected = model(x)
        torch.manual_seed(3)
        assert_close(traced(x), expected.detach(), check_stride=False)


# --- what cannot be traced -------------------------------------------------------------------------


class TestErrors:
    @pytest.mark.parametrize(
        "f, message",
        [
            (lambda x: x * x.sum().item(), "a number was asked for"),
            (lambda x: x if x.sum() > 0 else -x, "torch.where or torchlift.cond"),
            (lambda x: x * float(x[0]), "a number was asked for"),
            (lambda x: x[: int(x[0])], "a number was asked for"),
            (lambda x: x.clone().resize_(2), "Make a new tensor instead"),
            (lambda x: torch.bernoulli(x.sigmoid(), generator=torch.Generator()), "default generator"),
            (lambda x: torch.eye(3).to_sparse() * x, "Only strided tensors can be traced"),
        ],
    )
    def test_names_the_line_and_the_fix(self, f, message):
        with pytest.raises(UnsupportedError, match=message) as caught:
            trace(f)(data(3))
        assert "[trace]" in str(caught.value)
        assert "test_trace.py:" in str(caught.value) and "lambda" in str(caught.value)

    def test_the_line_is_the_innermost_of_the_user(self):
        def inner(x):
            return x.sum().item()  # this one

        def outer(x):
            return inner(x) + 1

        with pytest.raises(UnsupportedError, match=r"in inner: return x.sum\(\).item\(\)  # this"):
            trace(vmap(grad(lambda x: x.sum() * outer(x))))(data(2, 3))
        with pytest.raises(UnsupportedError, match=r"\[make_fx\].*in inner"):
            raise_joined(lambda: make_fx(outer)(data(3)))

    def test_nothing_is_left_open(self):
        with pytest.raises(ZeroDivisionError):
            trace(lambda x: x / (1 // 0))(data(3))
        assert torchlift._C.open_levels() == 0

    def test_a_tensor_of_a_level_around(self):
        def f(y):
            return trace(lambda x: x + y)(torch.ones(3, dtype=y.dtype))(y)

        with pytest.raises(UnsupportedError, match="Pass the tensor to the function as an argument"):
            vmap(f)(data(2, 3))

    def test_sparse_inputs(self):
        with pytest.raises(UnsupportedError, match="Only strided tensors can be inputs"):
            trace(lambda x: x * 2)(data(3, 3).to_sparse())


def raise_joined(run):
    """One line of the error, for a pattern across lines."""
    try:
        run()
    except UnsupportedError as error:
        raise UnsupportedError(str(error).replace("\n", " ")) from None


# --- make_fx ---------------------------------------------------------------------------------------


class TestMakeFx:
    def test_the_example_of_functorchs_readme(self):
        def f(x):
            return torch.sin(x).sum()

        x = torch.randn(100)
        module = make_fx(grad(f))(x)
        assert targets(module) == [
            "aten.sin.default",
            "aten.sum.default",
            "aten.cos.default",
            "aten.mul.Tensor",
        ]
        assert_close(module(x), x.cos())
        assert [n.name for n in module.graph.nodes if n.op == "placeholder"] == ["x_1"]

    @pytest.mark.parametrize("name", ["grad", "vmap(grad)", "hessian", "jvp"])
    def test_called_as_the_function(self, name):
        f = COMPOSITIONS[name]
        args = (params(), data(4, 3))
        module = make_fx(f)(*args)
        assert_close(module(*args), f(*args))
        others = torch.utils._pytree.tree_map(fresh, args)
        assert_close(module(*others), f(*others))
        module.graph.lint()

    def test_numbers_among_the_arguments(self):
        module = make_fx(lambda a, x, n: [x * n + a[0], n])((data(3), 2), data(3), 4)
        a, x = data(3), data(3)
        assert_close(module((a, 2), x, 4), [x * 4 + a, 4])

    def test_constants_and_parameters_are_attributes(self):
        captured = data(3)
        module = make_fx(lambda x: x * captured)(data(3))
        assert [n.target for n in module.graph.nodes if n.op == "get_attr"] == ["_tensor_constant0"]
        model = nn.Linear(3, 2)
        module = make_fx(model)(torch.zeros(3))
        assert any(n.target.startswith("_param_constant") for n in module.graph.nodes if n.op == "get_attr")

    def test_results_that_are_lists(self):
        check(lambda x: (torch.var_mean(x, 0), x.split(2), torch.linalg.qr(x)), data(4, 3))

    def test_decompositions(self):
        table = torch._decomp.get_decompositions([torch.ops.aten.silu, torch.ops.aten.silu_backward])
        f = grad(lambda x: nn.functional.silu(x).sum())
        x = data(3)
        module = make_fx(f, decomposition_table=table)(x)
        assert not any("silu" in target for target in targets(module))
        assert_close(module(x), f(x))

    def test_the_same_operators_as_torchs(self):
        from torch.fx.experimental.proxy_tensor import make_fx as theirs

        x = data(3)
        for f in (torch.sin, lambda x: (x.exp() * 2 + x).sum(), lambda x: x.view(3, 1) @ x.view(1, 3)):
            assert targets(make_fx(f)(x)) == targets(theirs(f)(x))

    def test_other_modes_are_refused(self):
        with pytest.raises(UnsupportedError, match="tracing_mode='symbolic' is not supported"):
            make_fx(torch.sin, tracing_mode="symbolic")


# --- where operators come from --------------------------------------------------------------------


def line_of(text):
    """The number of the line of this file that has the text as its comment."""
    with open(__file__) as file:
        return next(i for i, line in enumerate(file, 1) if line.rstrip().endswith("# " + text))


def square_of_sine(x):
    y = x.sin()  # the sine
    return (y * y).sum()  # the square


class TestSources:
    def test_each_operator_knows_its_line(self):
        traced = torchlift.trace(square_of_sine)(torch.ones(3))
        sine, square = (
            f"{__file__}:{line_of(text)}, in square_of_sine" for text in ("the sine", "the square")
        )
        assert traced.graph.sources() == [sine, square, square]
        assert traced.code(sources=True).splitlines()[1:4] == [
            f"    # {sine}",
            "    sin = aten.sin(x)  # f32[3]",
            f"    # {square}",
        ]
        assert __file__ not in traced.code() and str(traced) == traced.code()

    def test_lines_outlive_the_passes(self):
        def written(x):
            y = x.clone()
            y.add_(1)  # the addition
            return y * 1 * 2

        graph = torchlift.trace(written)(torch.ones(3)).optimized().graph()
        assert any(f":{line_of('the addition')}, in written" in source for source in graph.sources())

    def test_of_derivatives_it_is_the_line_that_asks_for_them(self):
        def derivative(x):
            return torchlift.vmap(torchlift.grad(square_of_sine))(x)  # the gradient

        traced = torchlift.trace(derivative)(torch.ones(2, 3))
        asked = f"{__file__}:{line_of('the gradient')}, in derivative"
        assert {source.rpartition(" ")[2] for source in traced.graph.sources()} == {
            "square_of_sine",
            "derivative",
        }
        assert asked in traced.graph.sources()

    def test_fx_nodes_have_them(self):
        module = torchlift.make_fx(square_of_sine)(torch.ones(3))
        sine = next(node for node in module.graph.nodes if node.target is torch.ops.aten.sin.default)
        assert f'line {line_of("the sine")}, in square_of_sine' in sine.stack_trace
        assert "y = x.sin()" in module.print_readable(print_output=False)

    def test_files_do_not_tell_of_the_machine_they_were_made_on(self, tmp_path):
        torchlift.save(square_of_sine, tmp_path / "f.tlc", torch.ones(3))
        assert __file__.encode() not in (tmp_path / "f.tlc").read_bytes()


# --- operators that the operator database met ---------------------------------------------------------


def replayed(f, *args):
    """Of f traced, after all passes, and of f itself: results, and what is written into the arguments."""
    copies = [a.clone() for a in args]
    expected = f(*copies)
    traced = torchlift.trace(f)(*args)
    again = [a.clone() for a in args]
    torch.testing.assert_close(traced.rebuild(traced.optimized().run(again)), expected)
    for a, b in zip(again, copies):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("f", [
    lambda x: torch.rot90(x, 1, [0, 1]),
    torchlift.grad(lambda x: (torch.rot90(x, 3, [0, 1]) * x.mT).sum()),
    torchlift.grad(lambda x: torch.quantile(x, 0.3, dim=0, keepdim=True).sum()),
    torchlift.grad(lambda x: torch.stft(x.flatten(), 8, return_complex=True, window=torch.ones(8)).abs().sum()),
    torchlift.grad(lambda x: sum(t.sum() for t in torch.aminmax(x[0, 0], dim=0, keepdim=True))),
    torchlift.vmap(lambda row: row.data.mul_(2) + row),
])  # fmt: skip
def test_views_in_place_and_numbers_along_dim_0(f):
    replayed(f, torch.randn(4, 5))


def test_batch_norms_in_training_under_vmap():
    def norm(x, mean, var):
        return F.batch_norm(x, mean, var, training=True), mean + 0, var + 0

    def loss(x, mean, var, weight):
        return F.batch_norm(x, mean, var, weight, training=True).pow(3).sum()

    x, mean, var = torch.randn(3, 6, 5), torch.zeros(3, 5), torch.ones(3, 5)
    replayed(torchlift.vmap(norm), x, mean, var)
    replayed(torchlift.vmap(torchlift.grad(loss, argnums=(0, 3))), x, mean, var, torch.rand(3, 5))
    replayed(lambda *a: torchlift.grad(lambda x: torchlift.vmap(norm)(x, *a[1:])[0].pow(3).sum())(a[0]), x, mean, var)
    images = torch.randn(3, 2, 5, 4)
    replayed(torchlift.vmap(lambda x, m, v: F.instance_norm(x, m, v, use_input_stats=True)), images, mean, var)


@pytest.mark.parametrize("transform", [lambda f: f, lambda f: grad(lambda x: f(x).sin().sum())])
def test_batch_norms_that_write_statistics_which_the_function_makes(transform):
    def f(x):
        mean, var = torch.zeros(5, dtype=x.dtype), torch.ones(5, dtype=x.dtype)
        y = F.batch_norm(x, mean, var, training=True).pow(3)
        y = y * F.batch_norm(x.sin(), mean[:], var, training=True)
        return y * mean + var

    traced = check(transform(f), data(6, 5))
    for _ in range(2):
        x = data(6, 5)
        assert_close(traced(x), transform(f)(x))


def test_buffers_of_a_traced_call_are_those_of_its_inputs():
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    params = dict(model.named_parameters())

    def step(x):
        return torchlift.functional_call(model, params, (x,), mutate_buffers="return")

    traced = trace(vmap(step))(torch.randn(2, 4, 3))
    others = torch.randn(2, 4, 3)
    expected = vmap(step)(others)
    assert expected[1]["1.running_mean"].shape == (2, 5)
    assert_close(traced(others), expected)
    assert_close(traced.rebuild(traced.optimized().run([others])), expected)


def test_checks_of_values_are_those_of_the_run_that_is_traced():
    def nll(mean, target, var):
        return F.gaussian_nll_loss(mean, target, var)

    def log_prob(loc, scale, x):
        return torch.distributions.Normal(loc, scale, validate_args=True).log_prob(x).sum()

    x, y, scale = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) + 0.5
    for f, args in ((nll, (x, y, scale)), (log_prob, (x, scale, y))):
        replayed(f, *args)
        replayed(vmap(f), *args)
        replayed(vmap(grad(f)), *args)
        replayed(grad(lambda *a, f=f: vmap(f)(*a).sum()), *args)
    with pytest.raises(ValueError, match="negative"):
        trace(vmap(nll))(x, y, scale - 1)
    with pytest.raises(ValueError, match="scale"):
        trace(log_prob)(x, scale - 1, y)
    trace(nll)(x, y, scale)(x, y, scale - 1)  # The graph does not ask again.


@pytest.mark.parametrize("f, least", [
    (lambda x: x * x.shape[0], 0),
    (lambda x: x.sum(0) / x.shape[0], 0),
    (lambda x: (x * (1.0 / x.shape[0])).sum(), 1),
    (lambda x: x - (x.shape[0] - 1) / 2, 0),
])  # fmt: skip
def test_numbers_that_depend_on_a_dynamic_dim_as_operands(f, least, tmp_path):
    path = str(tmp_path / "f.tlc")
    torchlift.save(f, path, torch.randn(5, 3), dynamic={0: {0: "n"}})
    traced = trace(f, dynamic={0: {0: "n"}})(torch.randn(5, 3))
    for size in (least, 1, 7):
        x = torch.randn(size, 3)
        for run in (traced, torchlift.load(path), lambda x: traced.rebuild(traced.optimized().run([x]))):
            assert_close(run(x), f(x), equal_nan=True)
    if least > 0:
        with pytest.raises(TransformError, match="size 0"):
            traced(torch.randn(0, 3))


def test_a_number_of_the_other_sign_is_another_constant(tmp_path):
    f, x = lambda x, zero: x / zero, torch.ones(2)
    traced = trace(f)(x, 0.0)
    assert traced(x, 0.0).equal(f(x, 0.0))
    with pytest.raises(TransformError, match=r"got .* where the function was traced with 0.0"):
        traced(x, -0.0)
    torchlift.save(f, tmp_path / "f.tlc", x, 0.0)
    loaded = torchlift.load(tmp_path / "f.tlc")
    assert loaded(x, 0.0).equal(f(x, 0.0))
    with pytest.raises(TransformError):
        loaded(x, -0.0)
    assert trace(f)(x, float("nan"))(x, float("nan")).isnan().all()
