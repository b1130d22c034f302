"""torch.autograd.Function inside transforms: the user's backward answers in every domain."""

import pytest
import torch

import torchlift
from torchlift import UnsupportedError, grad, vjp, vmap


class Cube(torch.autograd.Function):
    """x ** 3, with a backward that is told from the real one: 10 times it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 30 * x * x * g


class CubeSetup(torch.autograd.Function):
    """The same with setup_context, and its result saved too."""

    @staticmethod
    def forward(x):
        return x * x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    @staticmethod
    def backward(ctx, g):
        x, y = ctx.saved_tensors
        return 20 * x * x * g + 10 * y / x * g


class Scale(torch.autograd.Function):
    """Two tensors and a number in, two tensors and an index tensor out."""

    @staticmethod
    def forward(ctx, x, w, k):
        ctx.save_for_backward(x, w)
        ctx.k = k
        index = x.argmax()
        ctx.mark_non_differentiable(index)
        return x * w * k, x + w, index

    @staticmethod
    def backward(ctx, g1, g2, _):
        x, w = ctx.saved_tensors
        return 5 * (g1 * w * ctx.k + g2), 7 * (g1 * x * ctx.k + g2), None


F64 = torch.float64


@pytest.fixture(params=(Cube, CubeSetup), ids=("ctx", "setup_context"))
def cube(request):
    return request.param.apply


class TestCube:
    def test_plain_calls_are_unchanged(self, cube):
        x = torch.randn(3, dtype=F64, requires_grad=True)
        (g,) = torch.autograd.grad(cube(x).sum(), x)
        torch.testing.assert_close(g, 30 * x.detach() ** 2)

    def test_grad_and_vmap(self, cube):
        x = torch.randn(4, dtype=F64)
        torch.testing.assert_close(vmap(cube)(x), x**3)
        torch.testing.assert_close(grad(cube)(x[0]), 30 * x[0] ** 2)

    def test_vmap_of_grad(self, cube):
        x = torch.randn(4, dtype=F64)
        torch.testing.assert_close(vmap(grad(cube))(x), 30 * x**2)

    def test_vmap_of_grad_of_grad(self, cube):
        x = torch.randn(4, dtype=F64)
        torch.testing.assert_close(vmap(grad(grad(cube)))(x), self.plain_second(cube, x))

    @staticmethod
    def plain_second(cube, x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
        return torch.autograd.grad(g.sum(), x)[0]

    def test_grad_of_vmap(self, cube):
        x = torch.randn(4, dtype=F64)
        torch.testing.assert_close(grad(lambda x: vmap(cube)(x).sum())(x), 30 * x**2)

    def test_backward_through_vmap(self, cube):
        x = torch.randn(4, 3, dtype=F64, requires_grad=True)
        vmap(lambda v: cube(v).sum())(x).sum().backward()
        torch.testing.assert_close(x.grad, 30 * x.detach() ** 2)

    def test_grad_of_vmap_of_grad(self, cube):
        x = torch.randn(4, dtype=F64)
        got = grad(lambda x: vmap(grad(cube))(x).sum())(x)
        torch.testing.assert_close(got, self.plain_second(cube, x))

    def test_grad_of_grad_of_vmap(self, cube):
        x = torch.randn(4, dtype=F64)
        got = grad(lambda x: grad(lambda y: vmap(cube)(y).sum())(x).sum())(x)
        torch.testing.assert_close(got, self.plain_second(cube, x))

    def test_grad_of_vmap_of_vmap(self, cube):
        x = torch.randn(2, 4, dtype=F64)
        got = grad(lambda x: vmap(vmap(cube), in_dims=1)(x).sum())(x)
        torch.testing.assert_close(got, 30 * x**2)

    def test_vmap_of_grad_of_vmap(self, cube):
        x = torch.randn(2, 4, dtype=F64)
        got = vmap(grad(lambda x: vmap(cube)(x).sum()))(x)
        torch.testing.assert_close(got, 30 * x**2)

    def test_grad_of_vmap_of_grad_of_vmap(self, cube):
        x = torch.randn(2, 4, dtype=F64)
        inner = grad(lambda x: vmap(cube)(x).sum())
        got = grad(lambda x: vmap(inner)(x).sum())(x)
        torch.testing.assert_close(got, self.plain_second(cube, x))

    def test_third_order(self, cube):
        x = torch.randn(3, dtype=F64)
        got = grad(lambda x: grad(lambda y: vmap(grad(cube))(y).sum())(x).sum())(x)
        y = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(cube(y).sum(), y, create_graph=True)
        (g,) = torch.autograd.grad(g.sum(), y, create_graph=True)
        torch.testing.assert_close(got, torch.autograd.grad(g.sum(), y)[0])

    def test_under_outer_no_grad(self, cube):
        x = torch.randn(4, dtype=F64, requires_grad=True)
        with torch.no_grad():
            assert not vmap(cube)(x).requires_grad
            torch.testing.assert_close(vmap(grad(cube))(x), 30 * x**2)


class TestSeveralTensors:
    x = torch.randn(4, 3, dtype=F64)
    w = torch.randn(3, dtype=F64)

    def f(self, x, w):
        a, b, index = Scale.apply(x, w, 2.0)
        assert index.dtype == torch.int64
        return (a.sin() + b).sum()

    def plain(self, x, w):
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        return torch.autograd.grad(sum(self.f(v, w) for v in x), (x, w))

    @pytest.mark.parametrize("in_dims", ((0, None), (1, None)))
    def test_shared_weights_get_the_sum(self, in_dims):
        x = self.x if in_dims[0] == 0 else self.x.T.contiguous()
        total = lambda x, w: vmap(self.f, in_dims=in_dims)(x, w).sum()  # noqa: E731
        gx, gw = grad(total, argnums=(0, 1))(x, self.w)
        want_x, want_w = self.plain(self.x, self.w)
        torch.testing.assert_close(gx, want_x if in_dims[0] == 0 else want_x.T)
        torch.testing.assert_close(gw, want_w)

    def test_weights_that_f_closes_over(self):
        w = self.w.clone().requires_grad_()
        vmap(lambda v: self.f(v, w))(self.x).sum().backward()
        torch.testing.assert_close(w.grad, self.plain(self.x, self.w)[1])

    def test_only_weights_are_tracked_under_inner_grad(self):
        w = self.w.clone().requires_grad_()
        per_sample = vmap(grad(lambda v: self.f(v, w)))(self.x)
        per_sample.square().sum().backward()
        w2 = self.w.clone().requires_grad_()
        total = 0
        for v in self.x:
            v = v.clone().requires_grad_()
            (g,) = torch.autograd.grad(self.f(v, w2), v, create_graph=True)
            total = total + g.square().sum()
        total.backward()
        torch.testing.assert_close(w.grad, w2.grad)

    def test_all_arguments_shared(self):
        """An output that all examples share gets its cotangent once."""

        def total(w):
            y = vmap(lambda v: Cube.apply(w), out_dims=None)(self.x)
            return y.sum()

        torch.testing.assert_close(grad(total)(self.w), 30 * self.w**2)
        each = lambda w: vmap(lambda v: (Cube.apply(w) * v).sum())(self.x).sum()  # noqa: E731
        torch.testing.assert_close(grad(each)(self.w), 30 * self.w**2 * self.x.sum(0))

    def test_vjp(self):
        _, pull = vjp(lambda x: vmap(Cube.apply)(x), self.x)
        torch.testing.assert_close(pull(torch.ones_like(self.x))[0], 30 * self.x**2)


class TestHardCases:
    def test_identity_that_returns_its_argument(self):
        class Reverse(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x

            @staticmethod
            def backward(ctx, g):
                return -g

        x = torch.randn(4, dtype=F64)
        got = grad(lambda x: vmap(lambda v: Reverse.apply(v) * v)(x).sum())(x)
        torch.testing.assert_close(got, torch.zeros_like(x))

    def test_writing_into_an_argument_is_refused(self):
        class Double(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.mark_dirty(x)
                return x.mul_(2)

            @staticmethod
            def backward(ctx, g):
                return 2 * g

        with pytest.raises(UnsupportedError, match="Double.forward writes into its arguments"):
            grad(lambda x: vmap(lambda v: Double.apply(v * 1))(x).sum())(torch.ones(4))
        assert torchlift._C.open_levels() == 0

    def test_random_forward_is_replayed(self):
        class Noise(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                mask = (torch.rand_like(x) > 0.5).to(x.dtype)
                ctx.save_for_backward(mask)
                return x * mask

            @staticmethod
            def backward(ctx, g):
                return g * ctx.saved_tensors[0]

        x = torch.ones(64, dtype=F64, requires_grad=True)
        out = vmap(Noise.apply, randomness="different")(x)
        (g,) = torch.autograd.grad(out.sum(), x)
        torch.testing.assert_close(g, out.detach())
        assert 0 < g.sum() < 64

    def test_needs_input_grad(self):
        seen = []

        class Spy(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x, w):
                return x * w

            @staticmethod
            def backward(ctx, g):
                seen.append(ctx.needs_input_grad)
                return g * 2, g * 3

        x, w = torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)
        got = grad(lambda x: vmap(Spy.apply)(x, w).sum())(x)
        torch.testing.assert_close(got, torch.full_like(x, 2))
        assert seen == [(True, False)]

    def test_class_attributes_and_name(self):
        class Named(Cube):
            factor = 2

            @classmethod
            def helper(cls):
                return cls.factor

        x = torch.randn(4, dtype=F64)
        torch.testing.assert_close(grad(lambda x: vmap(Named.apply)(x).sum())(x), 30 * x**2)
        assert Named.helper() == 2
        y = torch.randn((), dtype=F64, requires_grad=True)
        assert type(Named.apply(y).grad_fn).__name__ == "NamedBackward"


def test_torch_compile_of_a_function_still_works():
    compiled = torch.compile(lambda x: Cube.apply(x).sum(), backend="eager")
    x = torch.randn(3, requires_grad=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 30 * x.detach() ** 2)


# --- tangents -----------------------------------------------------------------------------------


@torchlift.custom_jvp
def exponential(x, y):
    return x.exp() * y


@exponential.defjvp
def exponential_jvp(primals, tangents):
    """The rule uses the function itself, so that its own derivatives must be seen."""
    (x, y), (tx, ty) = primals, tangents
    z = exponential(x, y)
    return z, z * tx + exponential(x, torch.ones_like(y)) * ty


def plain_exponential(x, y):
    return x.exp() * y


TANGENTS = {
    "jvp of jvp": lambda f: lambda x: torchlift.jvp(
        lambda x: torchlift.jvp(lambda x: f(x, x.sin()), (x,), (x,))[1], (x,), (x,)
    ),
    "third": lambda f: torchlift.jacfwd(
        torchlift.jacfwd(torchlift.jacfwd(lambda x: f(x, x.sin()).sum()))
    ),
    "jvp of vmap": lambda f: lambda x: torchlift.jvp(
        torchlift.vmap(lambda r: f(r, r.sin())), (x,), (x,)
    ),
    "jacfwd of vmap": lambda f: torchlift.jacfwd(torchlift.vmap(lambda r: f(r, r.sin()))),
    "jvp of vmap with a shared argument": lambda f: lambda x: torchlift.jvp(
        lambda y: torchlift.vmap(lambda r: f(r, y))(x), (x[0],), (x[1],)
    ),
    "jvp of vmap of nothing batched": lambda f: lambda x: torchlift.jvp(
        lambda y: torchlift.vmap(lambda r: f(y, y) + r)(x), (x[0],), (x[1],)
    ),
    "jvp of vmap of vmap": lambda f: lambda x: torchlift.jvp(
        torchlift.vmap(torchlift.vmap(lambda r: f(r, r.sin()))), (x,), (x,)
    ),
    "jvp of jvp of vmap": lambda f: lambda x: torchlift.jvp(
        lambda x: torchlift.jvp(torchlift.vmap(lambda r: f(r, r.sin())), (x,), (x,))[1], (x,), (x,)
    ),
    "grad of jvp of vmap": lambda f: torchlift.grad(
        lambda x: torchlift.jvp(torchlift.vmap(lambda r: f(r, r.sin())), (x,), (x,))[1].sum()
    ),
    "jvp of grad of vmap": lambda f: lambda x: torchlift.jvp(
        torchlift.grad(lambda x: torchlift.vmap(lambda r: f(r, r.sin()))(x).sum()), (x,), (x,)
    ),
    "vmap of hessian": lambda f: torchlift.vmap(
        torchlift.hessian(lambda r: f(r, r.sin()).sum())
    ),
}


@pytest.mark.parametrize("name", TANGENTS)
def test_tangents_from_outside(name):
    transform = TANGENTS[name]
    for size in [3, 1]:
        x = torch.randn(size + 1, 2, dtype=torch.float64)
        if name == "third":
            x = x[0]
        torch.testing.assert_close(
            transform(exponential)(x), transform(plain_exponential)(x)
        )
