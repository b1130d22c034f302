"""check_nan: what it names, and what it leaves alone."""

import inspect
import math
import threading

import pytest
import torch

import torchlift
from torchlift import (
    NanError,
    check_nan,
    checkpoint,
    cond,
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    vjp,
    vmap,
)

DOUBLE = torch.float64


def vector(*values):
    return torch.tensor(values, dtype=DOUBLE)


def found(func, *args, **options):
    with pytest.raises(NanError) as caught:
        check_nan(func, **options)(*args)
    return str(caught.value)


def line_of(func, offset):
    return f"{__file__}:{inspect.getsourcelines(func)[1] + offset}, in {func.__name__}"


def sum_of_log(x):
    return x.log().sum()


def root_times_zero(x):
    y = x.sqrt()
    return (y * 0).sum()


def test_the_result_and_the_name_are_those_of_the_function():
    x = vector(1, 2)
    safe = check_nan(sum_of_log)
    assert safe.__name__ == "sum_of_log"
    torch.testing.assert_close(safe(x=x), x.log().sum())
    torch.testing.assert_close(check_nan(vmap(grad(sum_of_log)))(x), 1 / x)
    torch.testing.assert_close(check_nan(hessian(sum_of_log))(x), torch.diag(-1 / x**2))


def test_the_whole_text():
    assert found(sum_of_log, vector(1, -1)) == (
        "[check_nan] aten::log returned NaN, and no argument of it has any.\n"
        "  arguments: Double [2]\n"
        "  result: Double [2], 1 of 2 elements, the first at [1]\n"
        "  transforms: none\n"
        "  pass: forward\n"
        f"  source: {line_of(sum_of_log, 1)}"
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda f: check_nan(vmap(grad(f))),
        lambda f: vmap(check_nan(grad(f))),
        lambda f: vmap(grad(check_nan(f))),
    ],
)
def test_outside_between_and_inside(wrap):
    with pytest.raises(NanError) as caught:
        wrap(sum_of_log)(vector(1, 2, -1, 4))
    text = str(caught.value)
    assert "row 2 of vmap level 1 (size 4)" in text
    assert "transforms: reverse mode inside vmap level 1 (size 4)" in text
    assert line_of(sum_of_log, 1) in text


def test_a_backward_pass_names_the_node_and_the_line_of_the_forward():
    text = found(vmap(grad(root_times_zero)), vector(1, 0))
    assert "pass: backward, in the formula of SqrtBackward0" in text
    assert "row 1 of vmap level 1 (size 2)" in text
    assert line_of(root_times_zero, 1) in text

    def torch_backward(x):
        x = x.clone().requires_grad_()
        root_times_zero(x).backward()
        return x.grad

    assert line_of(root_times_zero, 1) in found(torch_backward, vector(0))


def test_the_lines_of_nested_checks_are_shared():
    def f(x):
        return check_nan(root_times_zero)(x)

    assert line_of(root_times_zero, 1) in found(grad(f), vector(0))


def test_second_derivatives_and_forward_mode():
    text = found(hessian(root_times_zero), vector(1, 0, 2))  # forward over reverse
    assert "aten::sqrt (its derivative in forward mode)" in text
    assert "transforms: reverse mode inside jacfwd level 1 (size 3)" in text
    text = found(hessian(root_times_zero), vector(1, 0))  # Taylor mode
    assert "aten::sqrt returned NaN" in text and "transforms: hessian level 1" in text
    text = found(lambda x: jvp(root_times_zero, (x,), (torch.zeros_like(x),)), vector(0))
    assert "aten::sqrt (its derivative in forward mode)" in text
    assert line_of(root_times_zero, 1) in text
    twice = found(lambda x: jvp(lambda y: jvp(sum_of_log, (y,), (y,))[1], (x,), (x,)), vector(-1))
    assert "transforms: jvp level 1 inside forward mode" in twice
    assert "aten::log" in found(jacfwd(sum_of_log), vector(-1))


def test_code_of_torch_is_not_the_source():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LogSoftmax(-1))
    params = {name: torch.full_like(p, -math.inf) for name, p in model.named_parameters()}

    def predict(x):
        return functional_call(model, params, (x,))

    text = found(predict, torch.ones(2))
    assert line_of(predict, 1) in text


def test_norm_at_zero_has_a_derivative():
    zero = torch.zeros(2, 3, dtype=DOUBLE)
    torch.testing.assert_close(check_nan(vmap(grad(torch.linalg.norm)))(zero), zero)
    torch.testing.assert_close(check_nan(grad(lambda x: x.norm()))(zero), zero)


def test_constants_and_uninitialized_memory():
    def f(x):
        a = torch.tensor([math.nan, 1.0], dtype=DOUBLE)
        b = torch.full((2,), math.nan, dtype=DOUBLE)
        c = x.clone()
        c[0] = math.nan
        d = torch.empty(2, dtype=DOUBLE)
        e = torch.where(x > 0, x, math.nan) + torch.masked_fill(x, x > 0, math.nan)
        return a + b + c + d + e + x * math.nan + float("nan")

    x = vector(1, -2)
    assert check_nan(f)(x).isnan().all()
    assert check_nan(vmap(f))(torch.stack([x, x])).isnan().all()
    assert check_nan(torch.log)(vector(math.nan, -1)).isnan().all()


def test_an_example_with_nans_hides_no_other():
    text = found(vmap(torch.log), vector(math.nan, 1, -1))
    assert "row 2 of vmap level 1 (size 3)" in text and "also in" not in text


def test_rows_of_chunks_and_branches():
    x = torch.ones(10, dtype=DOUBLE)
    x[7] = -1
    text = found(vmap(torch.log, chunk_size=4), x)
    assert "row 7 of vmap level 1 (size 4), whose chunk starts at row 4" in text
    branches = vmap(lambda t: cond(t < 0, lambda s: s.log(), lambda s: s, t))
    assert "row 7 of vmap level 1 (size 10)" in found(branches, x)


def test_infinities():
    assert check_nan(torch.log)(vector(0)).isinf()
    text = found(vmap(torch.log), vector(1, 0), inf=True)
    assert "aten::log returned NaN or infinity" in text and "row 1 of" in text
    masked = check_nan(lambda x: x.masked_fill(x > 0, -math.inf).softmax(0), inf=True)
    torch.testing.assert_close(masked(vector(1, 0)), vector(0, 1))


def test_autograd_functions_and_checkpoints():
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 2

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, g):
            (x,) = ctx.saved_tensors
            return g * (x - 5).log()

    text = found(vmap(grad(lambda x: Bad.apply(x))), vector(9, 1))
    assert "aten::log" in text and "row 1 of vmap level 1 (size 2)" in text
    assert "pass: backward, in the formula of" in text
    text = found(grad(lambda x: checkpoint(root_times_zero, x)), vector(0))
    assert "SqrtBackward0" in text


class Interrupt(BaseException):
    pass


def test_errors_of_the_function():
    def fails(x, error):
        x.log()
        raise error

    text = found(fails, vector(-1), ValueError("later"))
    assert "aten::log" in text and "then the function raised: ValueError('later')" in text
    with pytest.raises(ValueError, match="later"):
        check_nan(fails)(vector(1), ValueError("later"))
    with pytest.raises(Interrupt):
        check_nan(fails)(vector(-1), Interrupt())
    # Nobody looks any more.
    assert vector(-1).log().isnan()


def test_nested_checks():
    def forgives(x):
        try:
            return check_nan(torch.log)(x)
        except NanError:
            return x

    torch.testing.assert_close(check_nan(forgives)(vector(-1)), vector(-1))
    assert "aten::sqrt" in found(lambda x: forgives(x).sqrt(), vector(-1))


def test_with_the_profiler_of_torch():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        assert "aten::log" in found(vmap(grad(sum_of_log)), vector(1, -1))
    assert any(event.key == "aten::log" for event in profile.key_averages())


def test_threads():
    texts = {}

    def work(i):
        x = torch.ones(4, dtype=DOUBLE)
        for _ in range(20):
            check_nan(vmap(grad(sum_of_log)))(x)
        x[i] = -1
        texts[i] = found(vmap(grad(sum_of_log)), x)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    assert vector(-1).log().isnan()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert f"row {i} of vmap level 1 (size 4)" in texts[i]
        assert line_of(sum_of_log, 1) in texts[i]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_engine_s_threads():
    x = torch.tensor([1.0, 0.0], device="cuda")
    text = found(vmap(grad(root_times_zero)), x)
    assert "SqrtBackward0" in text and "row 1 of vmap" in text
    assert line_of(root_times_zero, 1) in text


class TestAnomalyMode:
    """torch.autograd.set_detect_anomaly, which asks each gradient for NaNs."""

    @pytest.mark.parametrize("wrong", [False, True])
    def test_looks_at_all_examples(self, wrong):
        x = torch.tensor([1.0, -1.0 if wrong else 2.0, 3.0])
        f = lambda x: (x.sqrt() * (x > 0)).sum()  # noqa: E731
        programs = [
            lambda: vmap(grad(f))(x),
            lambda: vmap(vmap(grad(f)))(x[None]),
            lambda: vmap(lambda x: vjp(f, x)[1](torch.tensor(1.0)))(x),
            lambda: vmap(jacrev(f))(x),
            lambda: jacrev(lambda x: vmap(f)(x))(x),
        ]
        with torch.autograd.set_detect_anomaly(True):
            for program in programs:
                if wrong:
                    with pytest.raises(RuntimeError, match="returned nan values"):
                        program()
                else:
                    program()
        assert torchlift._C.open_levels() == 0
