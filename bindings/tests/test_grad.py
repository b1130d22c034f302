"""grad, value_and_grad and vjp against plain autograd, and nested with vmap."""

import pytest
import torch

import torchlift
from torchlift import grad, grad_and_value, value_and_grad, vjp, vmap


def f(x):
    return (x.sin() * x).sum()


def df(x):
    return x.cos() * x + x.sin()


def ddf(x):
    return 2 * x.cos() - x * x.sin()


class TestArgnums:
    def test_int_negative_and_tuple(self):
        x, y = torch.randn(3), torch.randn(3)
        g = lambda a, b: (a * b.sin()).sum()  # noqa: E731
        torch.testing.assert_close(grad(g)(x, y), y.sin())
        torch.testing.assert_close(grad(g, argnums=-1)(x, y), x * y.cos())
        one = grad(g, argnums=(1,))(x, y)
        assert isinstance(one, tuple) and len(one) == 1
        both = grad(g, argnums=(1, 0))(x, y)
        torch.testing.assert_close(both, (x * y.cos(), y.sin()))

    def test_gradients_have_the_structure_of_the_argument(self):
        params = {"w": torch.randn(3), "b": [torch.randn(3), (torch.randn(3),)]}
        g = lambda p: (p["w"] * p["b"][0] + p["b"][1][0] * 2).sum()  # noqa: E731
        got = grad(g)(params)
        assert list(got) == ["w", "b"] and isinstance(got["b"][1], tuple)
        torch.testing.assert_close(got["w"], params["b"][0])
        torch.testing.assert_close(got["b"][1][0], torch.full((3,), 2.0))

    def test_paths_and_names(self):
        params = {"w": torch.randn(3), "b": torch.randn(3)}
        x = torch.randn(3)
        g = lambda params, x, *, scale: (params["w"] * x * scale + params["b"]).sum()  # noqa: E731
        scale = torch.tensor(2.0)
        torch.testing.assert_close(grad(g, argnums=(0, "w"))(params, x, scale=scale), 2 * x)
        torch.testing.assert_close(grad(g, argnums=("params", "w"))(params, x, scale=scale), 2 * x)
        torch.testing.assert_close(
            grad(g, argnums="scale")(params, x, scale=scale), (params["w"] * x).sum()
        )
        several = grad(g, argnums=[(0, "b"), 1, "scale"])(params, x, scale=scale)
        torch.testing.assert_close(several[0], torch.ones(3))
        torch.testing.assert_close(several[1], 2 * params["w"])
        assert len(several) == 3

    def test_path_of_ints_in_a_tuple(self):
        got = grad(lambda p: (p[0] * p[1]).sum(), argnums=((0, 1),))([torch.ones(2), torch.ones(2)])
        torch.testing.assert_close(got, (torch.ones(2),))

    def test_other_leaves_may_be_anything(self):
        g = lambda p: p["w"] * p["n"]  # noqa: E731
        got = grad(g, argnums=(0, "w"))({"w": torch.tensor(3.0), "n": 4})
        torch.testing.assert_close(got, torch.tensor(4.0))

    def test_keywords_are_passed(self):
        got = grad(lambda x, k: x * k)(torch.tensor(2.0), k=3.0)
        torch.testing.assert_close(got, torch.tensor(3.0))

    def test_same_tensor_twice(self):
        x = torch.tensor(3.0)
        assert grad(torch.mul, argnums=(0, 1))(x, x) == (x, x)


class TestReturns:
    def test_orders_match_torch_func(self):
        x = torch.randn(3)
        aux_f = lambda x: (f(x), {"twice": x * 2, "n": 3})  # noqa: E731
        assert torch.equal(grad(f)(x), torch.func.grad(f)(x))
        ours, theirs = grad_and_value(f)(x), torch.func.grad_and_value(f)(x)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        value, g = value_and_grad(f)(x)
        assert torch.equal(value, theirs[1]) and torch.equal(g, theirs[0])
        g, aux = grad(aux_f, has_aux=True)(x)
        torch.testing.assert_close(aux["twice"], x * 2)
        assert aux["n"] == 3
        g, (value, aux) = grad_and_value(aux_f, has_aux=True)(x)
        torch.testing.assert_close(value, f(x))
        (value, aux), g = value_and_grad(aux_f, has_aux=True)(x)
        torch.testing.assert_close(g, df(x))

    def test_nothing_is_tracked_afterwards(self):
        x = torch.randn(3)
        value, g = value_and_grad(f)(x)
        _, aux = grad(lambda x: (f(x), x * 2), has_aux=True)(x)
        assert not (value.requires_grad or g.requires_grad or aux.requires_grad)
        assert not x.requires_grad and x.grad is None

    def test_unused_argument_gives_zeros(self):
        got = grad(lambda x, y: y.sum(), argnums=(0, 1))(torch.ones(2), torch.ones(3))
        torch.testing.assert_close(got, (torch.zeros(2), torch.ones(3)))

    def test_complex_and_double(self):
        x = torch.randn(3, dtype=torch.float64)
        torch.testing.assert_close(grad(f)(x), df(x))
        z = torch.randn(3, dtype=torch.complex64)
        torch.testing.assert_close(grad(lambda z: z.abs().square().sum())(z), 2 * z)


class TestNesting:
    def test_higher_orders(self):
        x = torch.tensor(0.7, dtype=torch.float64)
        torch.testing.assert_close(grad(grad(f))(x), ddf(x))
        torch.testing.assert_close(grad(grad(grad(torch.sin)))(x), -x.cos())

    def test_vmap_of_grads(self):
        x = torch.randn(5, dtype=torch.float64)
        torch.testing.assert_close(vmap(grad(f))(x), df(x))
        torch.testing.assert_close(vmap(grad(grad(f)))(x), ddf(x))

    def test_grad_of_vmap_of_grad(self):
        x = torch.randn(5, 3, dtype=torch.float64)
        w = torch.randn(3, dtype=torch.float64)
        inner = lambda w, v: (v * w).sin().sum()  # noqa: E731
        penalty = lambda w: vmap(grad(inner), in_dims=(None, 0))(w, x).square().sum()  # noqa: E731

        def plain(w):
            total = 0
            for v in x:
                (g,) = torch.autograd.grad(inner(w, v), w, create_graph=True)
                total = total + g.square().sum()
            return torch.autograd.grad(total, w)[0]

        torch.testing.assert_close(grad(penalty)(w), plain(w.clone().requires_grad_()))

    def test_vmap_grad_vmap(self):
        x = torch.randn(4, 5, 3, dtype=torch.float64)
        w = torch.randn(3, dtype=torch.float64)
        g = lambda w, rows: vmap(lambda v: (v * w).sin().sum())(rows).sum()  # noqa: E731
        got = vmap(grad(g), in_dims=(None, 0))(w, x)
        torch.testing.assert_close(got, ((x * w).cos() * x).sum(1))

    def test_outer_requires_grad_weights(self):
        x = torch.randn(4, 3, dtype=torch.float64)
        w = torch.randn(3, dtype=torch.float64, requires_grad=True)
        per_sample = vmap(grad(lambda v: (v * w).sin().sum()))(x)
        per_sample.square().sum().backward()
        w2 = w.detach().clone().requires_grad_()
        ((x * w2).cos() * w2).square().sum().backward()
        torch.testing.assert_close(w.grad, w2.grad)

    def test_argument_that_requires_grad(self):
        x = torch.randn(3, dtype=torch.float64, requires_grad=True)
        (got,) = torch.autograd.grad(grad(f)(x).sum(), x)
        torch.testing.assert_close(got, ddf(x.detach()))


class TestAutogradInside:
    def test_no_grad_inside(self):
        def g(x):
            with torch.no_grad():
                c = x**2
            return (x - c).sum()

        x = torch.randn(3)
        torch.testing.assert_close(grad(g)(x), torch.ones(3))
        torch.testing.assert_close(grad(g)(x), torch.func.grad(g)(x))
        torch.testing.assert_close(vmap(grad(g))(x), torch.ones(3))

    def test_no_grad_outside(self):
        x = torch.randn(3, requires_grad=True)
        with torch.no_grad():
            got = grad(f)(x)
            again = vmap(grad(f))(x)
        assert not got.requires_grad and not again.requires_grad
        torch.testing.assert_close(got, df(x.detach()))
        torch.testing.assert_close(again, df(x.detach()))

    def test_requires_grad_detach_and_autograd_grad_inside(self):
        def g(x):
            y = x.detach().requires_grad_()
            (inner,) = torch.autograd.grad((y**3).sum(), y)
            return (inner * x).sum()

        x = torch.randn(4)
        torch.testing.assert_close(grad(g)(x), 3 * x**2)
        torch.testing.assert_close(vmap(grad(g))(x), 3 * x**2)

    @pytest.mark.parametrize("create_graph", (False, True))
    def test_autograd_grad_inside_vmap_is_as_in_a_loop(self, create_graph):
        def g(v):
            v = v * 1 if v.requires_grad else v.requires_grad_()
            (inner,) = torch.autograd.grad((v**3).sum(), v, create_graph=create_graph)
            return (inner * v).sum()

        x = torch.randn(4, 3, dtype=torch.float64)
        outer = x.clone().requires_grad_()
        (got,) = torch.autograd.grad(vmap(g)(outer).sum(), outer)
        looped = x.clone().requires_grad_()
        (want,) = torch.autograd.grad(sum(g(v) for v in looped), looped)
        torch.testing.assert_close(got, want)

    def test_given_cotangents_and_backward_inside_vmap(self):
        def g(v, c):
            y = v.detach().requires_grad_()
            y.sin().backward(c)
            (again,) = torch.autograd.grad(y.sin(), y, torch.ones(3, dtype=v.dtype))
            return y.grad + again

        x, c = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
        torch.testing.assert_close(vmap(g)(x, c), (c + 1) * x.cos())

    def test_backward_hooks_inside(self):
        seen = []

        def g(x):
            y = x.sin()
            y.register_hook(lambda c: seen.append(c.shape))
            return y.sum()

        grad(g)(torch.ones(3))
        vmap(grad(g))(torch.ones(5, 3))
        assert seen == [torch.Size([3])] * 2

    def test_checkpoint_inside(self):
        from torch.utils.checkpoint import checkpoint

        g = lambda x: checkpoint(lambda v: v.sin() * v, x, use_reentrant=False).sum()  # noqa: E731
        x = torch.randn(3)
        torch.testing.assert_close(grad(g)(x), df(x))


def _sin_of_a_part(x):
    y = x.clone()
    y[1:].sin_()
    return y


def _row_of_a_view(x):
    y = x.clone()
    y.view(2, 2)[0].mul_(3)
    return y * y


def _column(x):
    y = torch.outer(x, x)
    y[:, 1] = x.exp()
    return y


def _twice(x):
    y = 2 * x
    y[:2].mul_(x[2:])
    y[1:3].exp_()
    return y.sum() * x


class TestWritesIntoViews:
    @pytest.mark.parametrize("function", [_sin_of_a_part, _row_of_a_view, _column, _twice])
    def test_against_a_loop(self, function):
        xs = torch.randn(3, 4, dtype=torch.float64)
        loss = lambda x: function(x).sum()  # noqa: E731
        inner = grad(loss)
        leaves = [x.clone().requires_grad_() for x in xs]
        firsts = [torch.autograd.grad(loss(x), x, create_graph=True)[0] for x in leaves]
        seconds = [torch.autograd.grad(g.sin().sum(), x)[0] for g, x in zip(firsts, leaves)]
        torch.testing.assert_close(vmap(inner)(xs), torch.stack(firsts).detach())
        torch.testing.assert_close(grad(lambda z: vmap(loss)(z).sum())(xs), torch.stack(firsts).detach())
        nested = vmap(grad(lambda x: inner(x).sin().sum()))(xs)
        torch.testing.assert_close(nested, torch.stack(seconds))
        around = grad(lambda z: vmap(inner)(z).sin().sum())(xs)
        torch.testing.assert_close(around, torch.stack(seconds))

    def test_nested_vmap(self):
        xs = torch.randn(2, 3, 4, dtype=torch.float64)
        inner = vmap(grad(lambda x: _sin_of_a_part(x).sum()))
        torch.testing.assert_close(vmap(inner)(xs), torch.stack([inner(x) for x in xs]))


class TestVjp:
    def test_matches_torch_func(self):
        x, y = torch.randn(3), torch.randn(3)
        out, pull = vjp(torch.mul, x, y)
        torch.testing.assert_close(out, x * y)
        c = torch.randn(3)
        torch.testing.assert_close(pull(c), torch.func.vjp(torch.mul, x, y)[1](c))
        one = vjp(torch.sin, x)[1](c)
        assert isinstance(one, tuple) and len(one) == 1
        torch.testing.assert_close(one[0], c * x.cos())

    def test_trees_and_aux(self):
        p = {"w": torch.randn(3), "b": torch.randn(3)}
        g = lambda p: ({"y": p["w"] * p["b"], "z": [p["b"] * 2]}, {"aux": p["w"], "k": 1})  # noqa: E731
        out, pull, aux = vjp(g, p, has_aux=True)
        assert aux["k"] == 1 and not aux["aux"].requires_grad
        (got,) = pull({"y": torch.ones(3), "z": [torch.ones(3)]})
        torch.testing.assert_close(got, {"w": p["b"], "b": p["w"] + 2})

    def test_called_many_times_and_after_its_scope(self):
        def make():
            return vjp(lambda x: x.sin(), torch.arange(3.0))[1]

        pull = make()
        first = pull(torch.ones(3))[0]
        torch.testing.assert_close(first, torch.arange(3.0).cos())
        torch.testing.assert_close(pull(2 * torch.ones(3))[0], 2 * first)

    def test_vmapped_cotangents_give_the_jacobian(self):
        x = torch.randn(3, dtype=torch.float64)
        _, pull = vjp(torch.sin, x)
        (jacobian,) = vmap(pull)(torch.eye(3, dtype=torch.float64))
        torch.testing.assert_close(jacobian, torch.diag(x.cos()))

    def test_under_vmap_and_grad(self):
        x = torch.randn(5, 3, dtype=torch.float64)
        got = vmap(lambda v: vjp(torch.sin, v)[1](torch.ones_like(v))[0])(x)
        torch.testing.assert_close(got, x.cos())
        g = lambda v: vjp(torch.sin, v)[1](torch.ones_like(v))[0].sum()  # noqa: E731
        torch.testing.assert_close(grad(g)(x[0]), -x[0].sin())

    def test_no_primal_is_used(self):
        (got,) = vjp(lambda x: torch.ones(2), torch.ones(3))[1](torch.ones(2))
        torch.testing.assert_close(got, torch.zeros(3))


def test_grads_of_a_model_against_torch_func():
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3)
    ).double()
    params = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.randn(6, 4, dtype=torch.float64)
    y = torch.randint(3, (6,))

    def loss(params, v, t):
        out = torchlift.functional_call(model, params, (v.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(out, t.unsqueeze(0))

    def their_loss(params, v, t):
        out = torch.func.functional_call(model, params, (v.unsqueeze(0),))
        return torch.nn.functional.cross_entropy(out, t.unsqueeze(0))

    got = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, y)
    want = torch.func.vmap(torch.func.grad(their_loss), in_dims=(None, 0, 0))(params, x, y)
    assert list(got) == list(want)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


@pytest.mark.parametrize("transform", (grad, value_and_grad, grad_and_value))
def test_decorates(transform):
    @transform
    def g(x):
        """A cube."""
        return x**3

    assert g.__name__ == "g" and g.__doc__ == "A cube."
    assert torch.is_tensor(torch.utils._pytree.tree_leaves(g(torch.tensor(2.0)))[0])
