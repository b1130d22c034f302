"""vmap against a Python loop and torch.stack."""

import functools
import itertools

import pytest
import torch

import torchlift
from torchlift import vmap


def loop(f, in_dims, out_dim, *args):
    """The oracle: f once an example, stacked along out_dim."""
    size = next(a.shape[d] for a, d in zip(args, in_dims) if d is not None)
    results = [
        f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims)))
        for i in range(size)
    ]
    return torch.stack(results, out_dim)


def two_args(x, y):
    return torch.tanh(x) * y.sum() + x.sum(0)


@pytest.mark.parametrize(
    "x_dim,y_dim",
    list(itertools.product((0, 1, 2, -1, -3, None), (0, 1, -2, None)))[:-1],  # not None and None
)
@pytest.mark.parametrize("out_dim", (0, 1, 2, -1, -3))
def test_all_dims_agree_with_loop(x_dim, y_dim, out_dim):
    size = 5
    x_shape, y_shape = [3, 7], [2]
    if x_dim is not None:
        x_shape.insert(x_dim % 3, size)
    if y_dim is not None:
        y_shape.insert(y_dim % 2, size)
    x, y = torch.randn(x_shape), torch.randn(y_shape)
    got = vmap(two_args, in_dims=(x_dim, y_dim), out_dims=out_dim)(x, y)
    torch.testing.assert_close(got, loop(two_args, (x_dim, y_dim), out_dim, x, y))


def test_defaults_map_dim_0_of_everything():
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    torch.testing.assert_close(vmap(torch.dot)(x, y), (x * y).sum(1))


def test_oracle_sees_a_wrong_out_dim():
    x = torch.randn(4, 3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            vmap(torch.sin, out_dims=1)(x), loop(torch.sin, (0,), 0, x)
        )


@pytest.mark.parametrize("depth", (1, 2, 3, 4))
def test_nests_to_any_depth(depth):
    shape = (2, 3, 4, 5)[:depth]
    x, y = torch.randn(*shape, 6), torch.randn(6)
    f = lambda a, b: (a.sin() * b).sum()  # noqa: E731
    for _ in range(depth):
        f = vmap(f, in_dims=(0, None))
    torch.testing.assert_close(f(x, y), (x.sin() * y).sum(-1))


def test_outer_product_by_nesting():
    x, y = torch.randn(3), torch.randn(4)
    got = vmap(vmap(torch.mul, in_dims=(None, 0)), in_dims=(0, None))(x, y)
    torch.testing.assert_close(got, torch.outer(x, y))


def test_inner_and_outer_dims_are_not_mixed():
    x = torch.randn(2, 3, 4)
    got = vmap(vmap(lambda a: a * 2 + a.sum(), in_dims=1, out_dims=1), in_dims=-1, out_dims=1)(x)
    want = torch.stack(
        [
            torch.stack([x[:, j, k] * 2 + x[:, j, k].sum() for j in range(3)], 1)
            for k in range(4)
        ],
        1,
    )
    torch.testing.assert_close(got, want)


class TestTrees:
    def test_dict_argument_and_output(self):
        params = {"w": torch.randn(4, 3), "b": torch.randn(4)}
        got = vmap(lambda p: {"z": p["w"] + p["b"], "a": p["b"]})(params)
        assert list(got) == ["z", "a"]
        torch.testing.assert_close(got["z"], params["w"] + params["b"][:, None])

    def test_in_dims_as_prefix_and_as_full_tree(self):
        params = {"w": torch.randn(3, 4), "b": [torch.randn(4), torch.randn(2)]}
        f = lambda p, x: p["w"] * p["b"][0] + p["b"][1].sum() + x  # noqa: E731
        x = torch.randn(4)
        got = vmap(f, in_dims=({"w": 1, "b": [0, None]}, 0))(params, x)
        want = torch.stack(
            [
                f({"w": params["w"][:, i], "b": [params["b"][0][i], params["b"][1]]}, x[i])
                for i in range(4)
            ]
        )
        torch.testing.assert_close(got, want)

    def test_out_dims_as_tree_prefix(self):
        x = torch.randn(4, 3)
        a, (b, c) = vmap(lambda v: (v, (v * 2, v + 1)), out_dims=(1, 0))(x)
        assert a.shape == (3, 4) and b.shape == (4, 3) and c.shape == (4, 3)
        out = vmap(lambda v: {"k": v, "m": v.sum()}, out_dims={"k": -1, "m": 0})(x)
        assert out["k"].shape == (3, 4) and out["m"].shape == (4,)

    def test_out_dims_none_for_what_all_share(self):
        x, w = torch.randn(4, 3), torch.randn(2)
        y, shared = vmap(lambda v: (v * 2, w * 3), out_dims=(0, None))(x)
        torch.testing.assert_close(shared, w * 3)
        assert y.shape == (4, 3)

    def test_out_dims_tuple_of_one_for_a_tensor(self):
        assert vmap(torch.sin, out_dims=(1,))(torch.randn(4, 3)).shape == (3, 4)

    def test_unmapped_output_is_expanded(self):
        got = vmap(lambda v: torch.ones(2))(torch.randn(4, 3))
        torch.testing.assert_close(got, torch.ones(4, 2))

    def test_none_leaves_in_an_argument(self):
        got = vmap(lambda p: p[0] * 2 if p[1] is None else p[1])((torch.ones(3), None))
        torch.testing.assert_close(got, torch.full((3,), 2.0))


class TestScalars:
    def test_non_tensors_under_one_int_are_passed_as_they_are(self):
        got = vmap(lambda x, k, name: x * k if name == "a" else x)(torch.ones(3), 2.5, "a")
        torch.testing.assert_close(got, torch.full((3,), 2.5))

    def test_other_objects_are_passed_as_they_are(self):
        dtype = torch.float64
        assert vmap(lambda x, d: x.to(d))(torch.ones(3), dtype).dtype == dtype


class TestKeywords:
    @pytest.mark.parametrize("in_dims", [0, (0,)])
    def test_keywords_are_shared_as_in_torch_func(self, in_dims):
        x, s = torch.randn(3, 3), torch.randn(3)
        f = lambda x, s, t: x * s + t["t"]  # noqa: E731
        given = {"s": s, "t": {"t": torch.tensor(2.0)}}
        got = vmap(f, in_dims=in_dims)(x, **given)
        torch.testing.assert_close(got, torch.func.vmap(f, in_dims=in_dims)(x, **given))
        torch.testing.assert_close(got, x * s + 2)
        torch.testing.assert_close(vmap(f, in_dims=in_dims, chunk_size=2)(x, **given), got)

    def test_keywords_that_a_dict_names_are_mapped(self):
        x, s = torch.randn(4, 3), torch.randn(2, 4)
        got = vmap(lambda x, s: x * s.sum(), in_dims={"s": 1})(x, s=s)
        torch.testing.assert_close(got, x * s.sum(0)[:, None])

    def test_keywords_alone(self):
        with pytest.raises(torchlift.TransformError, match=r"share keyword arguments .* in_dims=\{'x': 0\}"):
            vmap(lambda x: x)(x=torch.ones(3))
        torch.testing.assert_close(vmap(lambda x: x, in_dims={"x": 0})(x=torch.ones(3)), torch.ones(3))

    def test_non_tensor_keywords(self):
        got = vmap(lambda x, dim: x.sum(dim))(torch.ones(4, 3), dim=0)
        torch.testing.assert_close(got, torch.full((4,), 3.0))

    def test_a_dict_names_parameters(self):
        x, w = torch.randn(3, 4), torch.randn(3)
        f = lambda x, w, *, scale=1.0: x * w * scale  # noqa: E731
        named = {"x": 1, "w": None}
        torch.testing.assert_close(vmap(f, in_dims=named)(x, w), x.T * w)
        torch.testing.assert_close(vmap(f, in_dims=named)(x, w=w), x.T * w)
        got = vmap(f, in_dims={"x": 1, "w": None, "scale": None})(x, w, scale=torch.tensor(2.0))
        torch.testing.assert_close(got, x.T * w * 2)

    def test_a_dict_may_hold_structures(self):
        f = lambda params, x: params["w"] * x  # noqa: E731
        got = vmap(f, in_dims={"params": {"w": None}})({"w": torch.ones(2)}, torch.ones(3, 2))
        assert got.shape == (3, 2)

    def test_parameters_left_out_are_mapped_over_dim_0(self):
        got = vmap(lambda x, y: x * y, in_dims={"x": None})(torch.ones(2), torch.ones(5, 2))
        assert got.shape == (5, 2)

    def test_names_taken_by_var_keywords(self):
        f = lambda x, **kw: x * kw["w"]  # noqa: E731
        got = vmap(f, in_dims={"w": None})(torch.ones(3, 2), w=torch.ones(2))
        assert got.shape == (3, 2)


class TestAxisSize:
    def test_without_mapped_inputs(self):
        torch.testing.assert_close(vmap(lambda: torch.ones(2), axis_size=3)(), torch.ones(3, 2))
        got = vmap(lambda x: x * 2, in_dims=None, axis_size=3)(torch.ones(2))
        torch.testing.assert_close(got, torch.full((3, 2), 2.0))

    def test_with_mapped_inputs_it_must_agree(self):
        assert vmap(torch.sin, axis_size=3)(torch.ones(3, 2)).shape == (3, 2)

    @pytest.mark.parametrize("size", (0, 1))
    def test_zero_and_one_examples(self, size):
        x = torch.randn(size, 3)
        torch.testing.assert_close(vmap(lambda v: v.sin() * 2)(x), x.sin() * 2)
        torch.testing.assert_close(vmap(lambda v: (v * v).sum())(x), (x * x).sum(1))
        nested = vmap(vmap(torch.cos))(torch.randn(2, size, 3))
        assert nested.shape == (2, size, 3)


class TestChunks:
    @pytest.mark.parametrize("chunk", (1, 2, 3, 7, 8, 100))
    def test_equal_to_unchunked(self, chunk):
        x, y = torch.randn(7, 3), torch.randn(3, 7)
        f = lambda a, b: {"s": a.sin() * b, "t": (a * b).sum()}  # noqa: E731
        kwargs = dict(in_dims=(0, 1), out_dims={"s": 1, "t": 0})
        got, want = vmap(f, chunk_size=chunk, **kwargs)(x, y), vmap(f, **kwargs)(x, y)
        assert torch.equal(got["s"], want["s"]) and torch.equal(got["t"], want["t"])

    def test_outputs_that_all_share(self):
        got = vmap(lambda x: (x, torch.ones(2)), out_dims=(0, None), chunk_size=2)(torch.ones(5))
        assert got[0].shape == (5,) and got[1].shape == (2,)

    @pytest.mark.parametrize("chunk", (2, 5))
    def test_structures_are_looked_at_in_every_chunk(self, chunk):
        calls = []

        def changing(outputs):
            calls.clear()

            def f(x):
                calls.append(x)
                return outputs[min(len(calls), len(outputs)) - 1](x)

            return lambda **options: vmap(f, chunk_size=chunk, **options)(torch.arange(5.0))

        pair = lambda x: {"a": x.sin(), "b": (x, x * 2)}  # noqa: E731
        got = changing([pair])(out_dims={"a": 0, "b": (0, -1)})
        assert got["b"][1].equal(torch.arange(5.0) * 2) and list(got) == ["a", "b"]
        if chunk == 5:
            return
        with pytest.raises(ValueError, match=r"one chunk returned 1 tensors, an earlier one 3"):
            changing([pair, torch.sin])()
        with pytest.raises(ValueError, match=r"the output\['b'\]\[1\] is 3 \(of type int\)"):
            changing([pair, lambda x: {"a": x, "b": (x, 3)}])()
        with pytest.raises(ValueError, match=r"the output\['a'\] differs between examples"):
            changing([lambda x: {"a": torch.ones(2)}, lambda x: {"a": x}])(out_dims=None)
        with pytest.raises(ValueError, match=r"out_dims has \{'a': 0\} for it"):
            changing([lambda x: {"a": x}, lambda x: [x]])(out_dims={"a": 0})

    def test_one_chunk_is_no_chunk(self):
        x = torch.randn(5, 3)
        assert vmap(torch.sin, chunk_size=5)(x).equal(x.sin())
        w = torch.randn(3, requires_grad=True)
        assert vmap(torch.mul, in_dims=(0, None), chunk_size=8)(x, w).grad_fn is not None
        assert vmap(lambda s: x[0] * s, in_dims=None, axis_size=3, chunk_size=2)(2).shape == (3, 3)

    def test_under_grad(self):
        x = torch.randn(5, 3)
        f = lambda w: vmap(lambda v: (v * w).sin().sum(), chunk_size=2)(x).sum()  # noqa: E731
        w = torch.randn(3)
        torch.testing.assert_close(torchlift.grad(f)(w), ((x * w).cos() * x).sum(0))


class TestAsFunction:
    def test_decorator(self):
        @vmap
        def f(x):
            """Doubles."""
            return x * 2

        assert f.__name__ == "f" and f.__doc__ == "Doubles."
        torch.testing.assert_close(f(torch.ones(3)), torch.full((3,), 2.0))

    def test_partial(self):
        @functools.partial(vmap, in_dims=1, out_dims=1)
        def f(x):
            return x * 2

        assert f(torch.ones(2, 3)).shape == (2, 3)
        assert vmap(functools.partial(torch.mul, torch.tensor(2.0)))(torch.ones(3)).shape == (3,)

    def test_callable_objects_and_modules(self):
        model = torch.nn.Linear(3, 2)
        x = torch.randn(4, 3)
        torch.testing.assert_close(vmap(model)(x), model(x))

    def test_recursive_use(self):
        def power(x, n):
            return x if n == 1 else vmap(lambda v: power(v, n - 1) * v)(x)

        x = torch.rand(3, 2, 2)
        torch.testing.assert_close(power(x, 3), x**3)


class TestGradOutside:
    def test_autograd_through_vmap(self):
        x, w = torch.randn(4, 3), torch.randn(3, requires_grad=True)
        vmap(lambda v: (v * w).sin().sum())(x).sum().backward()
        torch.testing.assert_close(w.grad, ((x * w.detach()).cos() * x).sum(0))

    def test_inputs_that_require_grad(self):
        x = torch.randn(4, 3, requires_grad=True)
        (got,) = torch.autograd.grad(vmap(lambda v: v.sin().sum())(x).sum(), x)
        torch.testing.assert_close(got, x.detach().cos())

    def test_no_grad_inside(self):
        x = torch.randn(4, 3, requires_grad=True)

        def f(v):
            with torch.no_grad():
                scale = v.sum()
            return (v * scale).sum()

        (got,) = torch.autograd.grad(vmap(f)(x).sum(), x)
        torch.testing.assert_close(got, x.detach().sum(1, keepdim=True).expand(4, 3))

    def test_no_grad_outside(self):
        x = torch.randn(4, 3, requires_grad=True)
        with torch.no_grad():
            assert not vmap(torch.sin)(x).requires_grad

    def test_inference_mode(self):
        with torch.inference_mode():
            x = torch.randn(4, 3)
            torch.testing.assert_close(vmap(lambda v: v.sin() + 1)(x), x.sin() + 1)


class TestViewsAndWrites:
    def test_a_view_is_a_view(self):
        def f(x):
            y = x.clone()
            y[0].mul_(10)
            return y

        x = torch.randn(4, 3)
        want = x.clone()
        want[:, 0] *= 10
        torch.testing.assert_close(vmap(f)(x), want)

    def test_in_place_on_an_argument_reaches_the_caller(self):
        x = torch.ones(4, 3)
        vmap(lambda v: v.add_(1))(x)
        torch.testing.assert_close(x, torch.full((4, 3), 2.0))


class TestRandomness:
    def test_different_and_same(self):
        x = torch.zeros(50, 3)
        different = vmap(lambda v: v + torch.rand(3), randomness="different")(x)
        assert len({tuple(row.tolist()) for row in different}) == 50
        same = vmap(lambda v: v + torch.rand(3), randomness="same")(x)
        assert all(torch.equal(row, same[0]) for row in same)

    def test_same_in_chunks(self):
        x = torch.zeros(5, 3)
        same = vmap(lambda v: v + torch.rand(3), randomness="same", chunk_size=2)(x)
        assert all(torch.equal(row, same[0]) for row in same)

    def test_error(self):
        with pytest.raises(RuntimeError, match="random"):
            vmap(lambda v: v + torch.rand(3))(torch.zeros(5, 3))
