"""Bad input: what the errors say. Each names the call, the argument, what was got and needed, the fix."""

import re

import pytest
import torch

import torchlift
from torchlift import TransformError, UnsupportedError, grad, vjp, vmap


def loss(x, y):
    return (x * y).sum()


def never_called(*args, **kwargs):
    raise AssertionError("arguments must be checked before the function runs")


def fails(error, *texts):
    """The message holds each of the texts, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(t) for t in texts))


X, Y = torch.ones(8, 3), torch.ones(8, 5)


class TestInDims:
    def test_classes(self):
        assert issubclass(TransformError, ValueError)
        assert issubclass(UnsupportedError, RuntimeError)

    def test_out_of_range(self):
        with fails(
            TransformError,
            "vmap(loss, in_dims=(0, 3))(x, y): argument 1 (y) has shape [8, 5] with 2 dims, so "
            "in_dims must lie in [-2, 1], got 3.",
        ):
            vmap(loss, in_dims=(0, 3))(X, Y)
        with fails(TransformError, "argument 0 (x)", "[-2, 1], got -3"):
            vmap(loss, in_dims=-3)(X, Y)

    def test_no_dims_at_all(self):
        with fails(TransformError, "argument 0 (x) has shape [] with 0 dims", "in_dims=None"):
            vmap(loss)(torch.tensor(1.0), Y)
        with fails(TransformError, "argument 'y'", "in_dims={'y': None}"):
            vmap(loss, in_dims={"x": 0})(X, y=torch.tensor(1.0))

    def test_path_in_a_tree(self):
        def predict(params, x):
            never_called()

        with fails(
            TransformError, "vmap(predict, in_dims=({'w': 2}, 0))(params, x)",
            "argument 0 (params['w']) has shape [3, 5] with 2 dims", "got 2",
        ):
            vmap(predict, in_dims=({"w": 2}, 0))({"w": torch.ones(3, 5)}, X)

    def test_wrong_structure(self):
        with fails(TransformError, "in_dims has 3 entries, but there are 2 positional arguments"):
            vmap(loss, in_dims=(0, 0, 0))(X, Y)
        with fails(
            TransformError, "argument 0 (x) is a dict with keys ['a']", "in_dims has (0, 0) for it"
        ):
            vmap(loss, in_dims=((0, 0), 0))({"a": X}, Y)
        with fails(TransformError, "argument 0 (x) is a tensor of shape [8, 3]", "(0, 0)"):
            vmap(loss, in_dims=((0, 0), 0))(X, Y)
        with fails(TransformError, "in_dims must be an int, None, a tuple", "got str"):
            vmap(loss, in_dims="0")(X, Y)

    def test_dict_of_unknown_names(self):
        with fails(
            TransformError, "in_dims names 'z', which is no parameter of loss", "'x', 'y'", "in_dims=({...},)"
        ):
            vmap(loss, in_dims={"z": 0})(X, Y)

    def test_all_none(self):
        with fails(TransformError, "vmap(loss, in_dims=None)(x, y): in_dims is None for every", "axis_size"):
            vmap(loss, in_dims=None)(X, Y)
        with fails(TransformError, "in_dims is None for every tensor", "axis_size=n"):
            vmap(loss, in_dims=(None, None))(X, Y)

    def test_no_tensor(self):
        with fails(TransformError, "no tensor among the arguments", "axis_size=n"):
            vmap(loss)(1, 2)
        with fails(TransformError, "no tensor among the arguments"):
            vmap(never_called)()

    def test_int_for_a_value_that_is_no_tensor(self):
        with fails(TransformError, "argument 1 (y) is 2.0 (of type float), which has no dim 0", "None"):
            vmap(loss, in_dims=(0, 0))(X, 2.0)

    def test_inconsistent_sizes(self):
        with fails(
            TransformError, "vmap(loss)(x, y): the mapped dims must have one size, got 8 and 7",
            "argument 0 (x) has shape [8, 3], that is size 8 along dim 0",
            "argument 1 (y) has shape [7, 5], that is size 7 along dim 0", "None",
        ):
            vmap(loss)(X, torch.ones(7, 5))

    def test_axis_size_that_disagrees(self):
        with fails(TransformError, "axis_size=7", "argument 0 (x)", "size 8 along dim 0"):
            vmap(loss, axis_size=7)(X, Y)

    def test_before_the_function_runs(self):
        for in_dims in (3, (0, 3), (0,), None, ((0,), 0)):
            with pytest.raises(TransformError):
                vmap(never_called, in_dims=in_dims)(X, Y)

    def test_options(self):
        with fails(TransformError, "randomness must be", "got 'sometimes'"):
            vmap(loss, randomness="sometimes")
        with fails(TransformError, "chunk_size must be None or an int of at least 1, got 0"):
            vmap(loss, chunk_size=0)
        with fails(TypeError, "must be a function, got 3"):
            vmap(3)


class TestOutputs:
    def test_out_dims_of_another_structure(self):
        with fails(TransformError, "out_dims=(0, 0)", "the output is a tuple of 3", "out_dims has (0, 0)"):
            vmap(lambda x: (x, x, x), out_dims=(0, 0))(X)
        with fails(TransformError, "the output is a tensor of shape [3]", "out_dims has {'a': 0}"):
            vmap(lambda x: x, out_dims={"a": 0})(X)

    def test_out_dims_out_of_range(self):
        with fails(
            TransformError, "the output['a'] has shape [3] for one example", "[-2, 1], got 2"
        ):
            vmap(lambda x: {"a": x}, out_dims=2)(X)

    def test_out_dims_none_for_a_batched_output(self):
        with fails(TransformError, "the output[1] differs between examples", "cannot be None"):
            vmap(lambda x: (x, x), out_dims=(0, None))(X)

    def test_outputs_that_are_no_tensors(self):
        with fails(TransformError, "the output[1] is 3 (of type int)", "must return tensors"):
            vmap(lambda x: (x, 3))(X)
        with fails(TransformError, "returned None", "return statement"):
            vmap(lambda x: None)(X)


class TestGrad:
    def test_loss_with_dims(self):
        for call in (lambda: grad(torch.sin)(torch.ones(3)), lambda: vmap(grad(torch.sin))(X)):
            with fails(TransformError, "grad(sin)", "tensor of shape [3]", "without dims", ".sum()"):
                call()

    def test_loss_that_is_no_tensor(self):
        with fails(TransformError, "grad(<lambda>)", "returned 3.0 (of type float)"):
            grad(lambda x: 3.0)(torch.ones(3))
        with fails(TransformError, "a tuple of 2", "has_aux=True"):
            grad(lambda x: (x.sum(), x))(torch.ones(3))
        with fails(TransformError, "must return a pair (output, aux)"):
            grad(lambda x: x.sum(), has_aux=True)(torch.ones(3))

    def test_loss_of_an_integer_dtype(self):
        with fails(TransformError, "dtype torch.int64", "real and floating"):
            grad(lambda x: torch.tensor(3))(torch.ones(3))

    def test_integer_argument(self):
        with fails(
            TransformError, "grad(never_called)(args[0])",
            "dtype torch.int64 and shape [3]", "floating or complex", ".float()",
        ):
            grad(never_called)(torch.arange(3))
        with fails(TransformError, "argument 0 (x['n']) has dtype torch.int64"):
            grad(loss)({"w": X, "n": torch.tensor(1)}, Y)

    def test_no_tensor(self):
        with fails(TransformError, "argument 0 (x) is 3.0 (of type float)", "torch.as_tensor"):
            grad(loss)(3.0, Y)
        with fails(TransformError, "holds no tensor"):
            grad(never_called)({})

    def test_argnums(self):
        with fails(TransformError, "argnums=2 asks for argument 2, but there are 2"):
            grad(loss, argnums=2)(X, Y)
        with fails(TransformError, "argnums='z' names 'z'"):
            grad(loss, argnums="z")(X, Y)
        with fails(TransformError, "argnums=(0, 'v')", "has no part 'v'"):
            grad(loss, argnums=(0, "v"))({"w": X}, Y)
        with fails(TransformError, "argnums is empty"):
            grad(loss, argnums=())
        with fails(TransformError, "argnums must be a position", "got 1.5"):
            grad(loss, argnums=1.5)


class TestVjp:
    def test_primals(self):
        with fails(TransformError, "there are no primals"):
            vjp(loss)
        with fails(TransformError, "vjp(loss, x, y): argument 1 (y) has dtype torch.int64"):
            vjp(loss, X, torch.arange(3))

    def test_outputs(self):
        with fails(TransformError, "vjp(<lambda>): the output[1] is 'a'", "has_aux=True"):
            vjp(lambda x: (x, "a"), X)

    def test_structure_of_cotangents(self):
        _, pull = vjp(lambda x: {"a": x, "b": x}, X)
        with fails(
            TransformError, "vjp_fn of <lambda>: the cotangents have structure *",
            "but the output has structure {'a': *, 'b': *}",
        ):
            pull(X)
        with fails(TransformError, "structure {'a': *}"):
            pull({"a": X})

    def test_shape_and_dtype_of_cotangents(self):
        _, pull = vjp(torch.sin, X)
        with fails(TransformError, "the cotangent has shape [3]", "shape [8, 3] and dtype torch.float32"):
            pull(torch.ones(3))
        with fails(TransformError, "dtype torch.float64", "Convert it with .to(torch.float32)"):
            pull(X.double())
        with fails(TransformError, "the cotangent is 1.0 (of type float)"):
            pull(1.0)
        _, pull = vjp(lambda x: [x, (x,)], X)
        with fails(TransformError, "the cotangent[1][0] has shape [8]"):
            pull([X, (torch.ones(8),)])


class TestLiftedTensors:
    @pytest.mark.parametrize(
        "f",
        (
            lambda x: x.sum().item(),
            lambda x: float(x.sum()),
            lambda x: int(x.sum()),
            lambda x: bool(x.sum()),
            lambda x: x if x.sum() > 0 else -x,
            lambda x: x.sum().tolist(),
            lambda x: x.tolist(),
            lambda x: x.data_ptr(),
            lambda x: x.numpy(),
        ),
        ids=("item", "float", "int", "bool", "if", "tolist0", "tolist", "data_ptr", "numpy"),
    )
    def test_values_cannot_be_read(self, f):
        with fails(UnsupportedError, "[vmap]"):
            vmap(f)(X)

    def test_a_tensor_that_escaped(self):
        escaped = []
        vmap(lambda x: escaped.append(x) or x)(X)
        with fails(RuntimeError, "vmap level 1 (size 8)", "escaped"):
            escaped[0] + 1
        with fails(UnsupportedError, "escaped"):
            vmap(lambda x: x + escaped[0])(X)
        with fails(UnsupportedError, "escaped"):
            vmap(torch.sin)(escaped[0])

    def test_an_escaped_tensor_still_prints(self):
        escaped = []
        vmap(lambda x: escaped.append(x) or x)(X)
        assert "vmap level 1 (ended)" in repr(escaped[0])
        assert "ENDED" in torchlift.dump_tensor(escaped[0])

    def test_batched_write_into_an_unbatched_tensor(self):
        out = torch.zeros(3)

        def f(x):
            out.add_(x)
            return x

        with fails(UnsupportedError, "add_", "shape [3]", "no batch dimension", "zeros_like"):
            vmap(f)(X)
        assert torch.equal(out, torch.zeros(3))

    def test_errors_of_torch_stay_what_they_are(self):
        with pytest.raises(RuntimeError) as caught:
            vmap(lambda x: x.reshape(7, 7))(X)
        assert type(caught.value) is RuntimeError
        with pytest.raises(IndexError):
            vmap(lambda x: x.select(5, 0))(X)

    def test_traceback_leads_to_the_user_code(self):
        def culprit(x):
            return x.sum().item()

        with pytest.raises(UnsupportedError) as caught:
            vmap(culprit)(X)
        assert any(entry.name == "culprit" for entry in caught.traceback)


class TestExceptionsInside:
    def test_three_deep_and_everything_works_afterwards(self):
        class Mine(Exception):
            pass

        def f(x):
            raise Mine("from the middle")

        for transform in (
            lambda f: vmap(grad(vmap(f))),
            lambda f: vmap(vmap(vmap(f))),
            lambda f: grad(vmap(grad(f))),
            lambda f: vmap(vmap(f, in_dims={"x": 0}), chunk_size=1),
        ):
            with pytest.raises(Mine, match="from the middle"):
                transform(f)(torch.ones(2, 2, 2, 2))
            assert torchlift._C.open_levels() == 0
            assert torch.is_grad_enabled()
            torch.testing.assert_close(
                vmap(grad(torch.sin))(torch.zeros(3)), torch.ones(3)
            )

    def test_in_backward(self):
        class Bad(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                return x.clone()

            @staticmethod
            def backward(ctx, g):
                raise KeyError("in backward")

        for f in (grad(lambda x: Bad.apply(x).sum()), vmap(grad(lambda x: Bad.apply(x).sum()))):
            with pytest.raises(KeyError, match="in backward"):
                f(X)
        torch.testing.assert_close(grad(lambda x: x.sum())(X), torch.ones_like(X))

    def test_keyboard_interrupt_passes_through(self):
        def f(x):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            vmap(grad(f))(X)


def test_inside_torch_func_is_refused():
    with fails(RuntimeError, "torch.func"):
        torch.func.vmap(lambda x: vmap(torch.sin)(x))(X)
    with fails(RuntimeError, "torch.func"):
        torch.func.grad(lambda x: grad(torch.sum)(x).sum())(X)
