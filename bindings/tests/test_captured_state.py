"""Tensors that a traced function captures and writes into: running statistics, counters, averages."""

import copy
import threading

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import torchlift
from torchlift import UnsupportedError, functional_call, grad, jit, make_fx, trace, vmap


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def buffers_of(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def parameters_of(module):
    return {name: parameter.detach() for name, parameter in module.named_parameters()}


# name: (module, shape of its argument)
NORMS = {
    "1d": (lambda: nn.BatchNorm1d(5), (6, 5)),
    "1d of sequences": (lambda: nn.BatchNorm1d(5, affine=False), (6, 5, 4)),
    "2d": (lambda: nn.BatchNorm2d(5, momentum=0.3), (6, 5, 4, 3)),
    "3d": (lambda: nn.BatchNorm3d(5), (2, 5, 4, 3, 2)),
    "instance 1d": (lambda: nn.InstanceNorm1d(5, track_running_stats=True), (6, 5, 4)),
    "instance 2d": (lambda: nn.InstanceNorm2d(5, affine=True, track_running_stats=True), (6, 5, 4, 3)),
    "network": (
        lambda: nn.Sequential(
            nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        ),
        (3, 5, 6, 6),
    ),
}


@pytest.fixture(params=NORMS)
def norm(request):
    make, shape = NORMS[request.param]
    module = make().double().train()
    return module, shape


def loss_of(module):
    def loss(params, x):
        return functional_call(module, params, (x,)).pow(3).sum()

    return loss


# --- modules ---------------------------------------------------------------------------------------


class TestNorms:
    def steps(self, module, shape, fast, slow, expected, count=3):
        for _ in range(count):
            x = data(*shape)
            assert_close(fast(x), slow(x))
            assert_close(buffers_of(module), buffers_of(expected))

    def test_jit_of_a_gradient(self, norm):
        module, shape = norm
        expected = copy.deepcopy(module)
        params = parameters_of(module)
        argnums = (0, 1) if params else 1
        step, slow = jit(grad(loss_of(module), argnums)), grad(loss_of(expected), argnums)
        self.steps(module, shape, lambda x: step(params, x), lambda x: slow(params, x), expected)
        assert step.cache_info().misses == 1
        for part in module.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                assert part.num_batches_tracked == 3

    def test_jit_of_a_function(self, norm):
        module, shape = norm
        module.requires_grad_(False)
        expected = copy.deepcopy(module)
        f = jit(lambda x: module(x).sin())
        self.steps(module, shape, f, lambda x: expected(x).sin(), expected)

    def test_jit_of_a_module(self, norm):
        module, shape = norm
        module.requires_grad_(False)
        expected = copy.deepcopy(module)
        self.steps(module, shape, jit(module), expected, expected)

    def test_trace(self, norm):
        module, shape = norm
        module.requires_grad_(False)
        expected = copy.deepcopy(module)
        traced = trace(module)(data(*shape))
        assert_close(buffers_of(module), buffers_of(expected))
        self.steps(module, shape, traced, expected, expected)
        optimized = traced.optimized()
        self.steps(module, shape, lambda x: traced.rebuild(optimized.run([x])), expected, expected)

    def test_trace_of_shapes_alone(self, norm):
        module, shape = norm
        module.requires_grad_(False)
        expected = copy.deepcopy(module)
        traced = trace(module)(torchlift.ShapeDtype(shape, torch.float64))
        assert_close(buffers_of(module), buffers_of(expected))
        self.steps(module, shape, traced, expected, expected)

    def test_make_fx(self, norm):
        module, shape = norm
        module.requires_grad_(False)
        expected = copy.deepcopy(module)
        made = make_fx(module)(data(*shape))
        assert_close(buffers_of(module), buffers_of(expected))
        self.steps(module, shape, made, expected, expected)

    def test_functionalize(self, norm):
        module, shape = norm
        module.requires_grad_(False)
        expected = copy.deepcopy(module)
        self.steps(module, shape, torchlift.functionalize(module), expected, expected)

    @pytest.mark.parametrize("backend", ["inductor", lambda module, inputs: module], ids=["inductor", "fx"])
    def test_backends(self, backend):
        module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double()
        expected = copy.deepcopy(module)
        params = parameters_of(module)
        step = jit(grad(loss_of(module)), backend=backend)
        self.steps(
            module, (6, 5), lambda x: step(params, x), lambda x: grad(loss_of(expected))(params, x), expected
        )

    def test_files(self, norm, tmp_path):
        module, shape = norm
        module.requires_grad_(False)
        module(data(*shape))
        before = copy.deepcopy(module)
        path = tmp_path / "norm.tlc"
        torchlift.save(module, path, data(*shape))
        assert_close(buffers_of(module), buffers_of(before))
        for _ in range(2):  # each with state of its own, as it was when it was saved
            loaded, expected = torchlift.load(path), copy.deepcopy(before)
            for _ in range(3):
                x = data(*shape)
                module(x)
                assert_close(loaded(x), expected(x))
        assert_close(torchlift.load(path)(x), before(x))

    def test_files_with_machine_code(self, tmp_path):
        module = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).double().requires_grad_(False)
        before = copy.deepcopy(module)
        path = tmp_path / "norm.tlc"

        def f(x):
            y = module(x)
            return y, module[1].running_mean * 2, module[1].num_batches_tracked + 0

        torchlift.save(f, path, data(6, 5), backend="inductor")
        assert_close(buffers_of(module), buffers_of(before))
        loaded = torchlift.load(path, allow_native_code=True)
        assert loaded.backend == "inductor"
        for _ in range(3):
            x = data(6, 5)
            y = before(x)
            assert_close(loaded(x), (y, before[1].running_mean * 2, before[1].num_batches_tracked))

    def test_another_shape_goes_on(self):
        module = nn.BatchNorm1d(5).double().requires_grad_(False)
        expected = copy.deepcopy(module)
        f = jit(module.forward)
        for rows in (4, 7, 4, 7, 4):
            x = data(rows, 5)
            assert_close(f(x), expected(x))
            assert_close(buffers_of(module), buffers_of(expected))
        assert f.cache_info().misses == 2

    def test_dynamic_dims(self):
        module = nn.BatchNorm1d(5).double().requires_grad_(False)
        expected = copy.deepcopy(module)
        f = jit(lambda x: module(x), dynamic={"x": {0: "batch"}})
        for rows in (4, 7, 5):
            x = data(rows, 5)
            assert_close(f(x), expected(x))
            assert_close(buffers_of(module), buffers_of(expected))
        assert f.cache_info().misses == 1

    def test_eval_mode_writes_nothing(self):
        module = nn.BatchNorm1d(5).double().requires_grad_(False).eval()
        traced = trace(module)(data(4, 5))
        before = buffers_of(module)
        traced(data(4, 5))
        assert_close(buffers_of(module), before)
        module.running_mean.fill_(3)
        x = data(4, 5)
        assert_close(traced(x), module(x))

    def test_numbers_of_state_are_an_error(self):
        module = nn.BatchNorm1d(5, momentum=None).double().requires_grad_(False)
        for f in (jit(lambda x: module(x)), trace(module), make_fx(module)):
            with pytest.raises(UnsupportedError, match="momentum=None"):
                f(data(4, 5))
        assert_close(buffers_of(module), buffers_of(nn.BatchNorm1d(5).double()))

    def test_examples_with_statistics_of_their_own_are_an_error(self):
        module = nn.BatchNorm1d(5).double().requires_grad_(False)
        before = buffers_of(module)
        with pytest.raises(UnsupportedError):
            jit(vmap(lambda x: module(x)))(data(2, 4, 5))
        assert_close(buffers_of(module), before)


# --- functions -------------------------------------------------------------------------------------


class Average:
    """A moving average, and how often it was asked for."""

    def __init__(self):
        self.ema = torch.ones(3, dtype=torch.float64)
        self.calls = torch.zeros((), dtype=torch.int64)

    def __call__(self, x):
        scale = self.ema * 2  # of captured tensors alone
        away = x - self.ema
        self.ema.mul_(0.9).add_(0.1 * x.mean(0))
        self.calls.add_(1)
        return away * scale + self.ema / self.calls


def gradient_of(average):
    def loss(x):
        with torch.no_grad():
            average.ema.mul_(0.9).add_(0.1 * x.mean(0))
            average.calls += 1
        return (x * average.ema).sin().sum() * average.calls

    return grad(loss)


@pytest.mark.parametrize("make", [lambda average: average.__call__, gradient_of], ids=["values", "gradient"])
@pytest.mark.parametrize("run", [jit, lambda f: trace(f)(data(4, 3)), lambda f: make_fx(f)(data(4, 3))],
                         ids=["jit", "trace", "make_fx"])
def test_a_moving_average(make, run):
    ours, theirs = Average(), Average()
    fast, slow = run(make(ours)), make(theirs)
    assert ours.calls == 0
    for step in range(4):
        x = data(4, 3)
        assert_close(fast(x), slow(x))
        assert_close(ours.ema, theirs.ema)
        assert ours.calls == step + 1


def test_make_fx_has_an_attribute_that_is_written():
    average = Average()
    module = make_fx(average)(data(4, 3))
    targets = [str(node.target) for node in module.graph.nodes]
    assert "aten.add_.Tensor" in targets and any(t.startswith("_tensor_constant") for t in targets)
    assert any(buffer is average.ema for buffer in module.buffers())


def test_what_is_changed_outside_is_seen():
    average = Average()
    f = jit(average)
    x = data(4, 3)
    f(x)
    average.ema.fill_(5)
    average.calls.zero_()
    expected = Average()
    expected.ema.fill_(5)
    assert_close(f(x), expected(x))


def test_state_that_is_returned_stays_the_tensor_it_is():
    ema = torch.zeros(3)

    def f(x):
        ema.add_(x)
        return ema, ema[1:]

    for fast in (jit(f), trace(f)(torch.ones(3))):
        whole, part = fast(torch.ones(3))
        assert whole is ema or whole.data_ptr() == ema.data_ptr()
        part.fill_(7)
        assert ema[2] == 7


def test_data_of_a_tensor():
    target, source = torch.zeros(3), nn.Linear(3, 1)

    def f(x):
        target.data.mul_(0.5).add_(source.weight.data[0], alpha=0.5)
        return x * target

    fast, x, expected = jit(f), torch.ones(3), torch.zeros(3)
    with torch.no_grad():
        for _ in range(3):
            expected = 0.5 * expected + 0.5 * source.weight[0]
            assert_close(fast(x), expected)


def test_an_argument_that_is_the_state():
    held = data(3)
    theirs = held.clone()

    def step(state, x):
        state.add_(1)
        return x * 2

    f = jit(lambda x: step(held, x))
    f(data(3))
    theirs.add_(1)
    for _ in range(2):
        assert_close(f(held), step(theirs, theirs))
        assert_close(held, theirs)
    compiled = jit(lambda x: step(held, x), backend=lambda module, inputs: module)
    with pytest.raises(UnsupportedError, match="a captured tensor is written into"):
        compiled(held)


def test_arrays_of_the_function_itself_are_no_state():
    numpy = pytest.importorskip("numpy")

    def f(x):
        table = torch.from_numpy(numpy.arange(3.0))
        table[0] = 5
        table += 1
        return x * table * int(table[0]), table

    traced = trace(f)(data(3))
    for _ in range(2):
        x = data(3)
        assert_close(traced(x), f(x))


def test_a_function_that_raises_leaves_the_state():
    average = Average()

    def f(x):
        average(x)
        raise ValueError("as it must")

    for run in (jit(f), trace(f), make_fx(f)):
        with pytest.raises(ValueError, match="as it must"):
            run(data(4, 3))
        assert average.calls == 0 and bool((average.ema == 1).all())


def test_the_random_numbers_of_a_trace_are_drawn_once():
    calls = torch.zeros(())

    def f(x):
        calls.add_(1)
        return x + torch.rand_like(x)

    x = torch.zeros(3)
    torch.manual_seed(0)
    f(x)
    expected = torch.rand(2)
    torch.manual_seed(0)
    traced = trace(f)(x)
    assert_close(torch.rand(2), expected)
    assert_close(traced(x, seed=0), traced(x, seed=0))


def test_tensors_that_require_gradients_are_an_error():
    weight = nn.Parameter(torch.ones(3))

    def f(x):
        with torch.no_grad():
            weight.mul_(0.5)
            weight.add_(x)
        return x.sin()

    with pytest.raises(UnsupportedError, match="requires a gradient"):
        trace(f)(torch.ones(3))
    assert_close(weight.detach(), torch.ones(3))


def test_branches_and_loops_do_not_write():
    calls = torch.zeros(())

    def f(x):
        def count(x):
            calls.add_(1)
            return x * 2

        return torchlift.cond(x.sum() > 0, count, lambda x: x, x)

    with pytest.raises(UnsupportedError, match="a branch or loop body writes in place"):
        trace(f)(torch.ones(3))
    assert calls == 0


def test_aot_function_refuses_it():
    from torchlift.compile import aot_function, nop

    average = Average()
    with pytest.raises(UnsupportedError, match="none of its arguments"):
        aot_function(average, nop)(data(4, 3))
    assert average.calls == 0


def test_threads():
    calls, total = torch.zeros((), dtype=torch.int64), torch.zeros(1000)

    def f(x):
        calls.add_(1)
        total.add_(x)
        return x.sin()

    x = torch.ones(1000)
    for count, run in enumerate((jit(f), trace(f)(x)), start=1):
        if count == 1:
            run(x)  # traced
            calls.zero_(), total.zero_()

        def work():
            for _ in range(100):
                run(x)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert calls == 400 * count
        assert_close(total, torch.full((1000,), 400.0 * count))


def test_loaded_programs_in_threads(tmp_path):
    calls = torch.zeros((), dtype=torch.int64)

    def f(x):
        calls.add_(1)
        return x * 0 + calls

    torchlift.save(f, tmp_path / "f.tlc", torch.ones(2))
    loaded = torchlift.load(tmp_path / "f.tlc")
    seen = []

    def work():
        for _ in range(50):
            seen.append(int(loaded(torch.ones(2))[0]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(seen) == list(range(1, 201)) and calls == 0


def test_functional_batch_norm_of_captured_statistics():
    mean, var = torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    theirs = mean.clone(), var.clone()
    f = jit(grad(lambda x: F.batch_norm(x, mean, var, training=True).pow(3).sum()))
    for _ in range(3):
        x = data(6, 5)
        expected = grad(lambda x: F.batch_norm(x, *theirs, training=True).pow(3).sum())(x)
        assert_close(f(x), expected)
        assert_close((mean, var), theirs)


@pytest.mark.parametrize("reads_first", [False, True])
def test_functionalize_inside_of_a_trace(reads_first):
    def step(ema, x):
        away = x - ema if reads_first else x
        ema.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return away * ema

    ours = torch.zeros(3, dtype=torch.float64)
    theirs = ours.clone()
    inner = torchlift.functionalize(lambda x: step(ours, x))
    for run in (jit(inner), trace(inner)(data(4, 3)), make_fx(inner)(data(4, 3))):
        for _ in range(2):
            x = data(4, 3)
            assert_close(run(x), step(theirs, x))
            assert_close(ours, theirs)


def test_transforms_of_programs_with_state():
    average, theirs = Average(), Average()
    traced = trace(average)(data(4, 3))
    before = average.ema.clone()
    with pytest.raises(UnsupportedError):
        vmap(traced)(data(2, 4, 3))
    average.ema.copy_(before), average.calls.zero_()

    def f(x):
        with torch.no_grad():
            average.calls.add_(1)
        return (x * average.calls).sin().sum()

    def g(x):
        theirs.calls.add_(1)
        return (x * theirs.calls).sin().sum()

    traced = trace(f)(data(4, 3))
    for _ in range(2):
        x = data(4, 3)
        assert_close(grad(traced)(x), grad(g)(x))


def test_factories_in_the_function_are_no_state():
    calls = torch.zeros((), dtype=torch.float64)

    def f(x):
        calls.add_(1)
        a = torch.tensor([1.0, 2, 3], dtype=torch.float64)
        a += x
        b = torch.zeros(3, dtype=torch.float64)
        b[1] = x[0]
        c = torch.empty_like(x).copy_(x)
        c.mul_(2)
        return a + b + c

    traced = trace(f)(data(3))
    assert len([c for _, c in traced.graph.constants() if c is calls]) == 1
    for _ in range(2):
        x = data(3)
        assert_close(traced(x), f(x))
    assert calls == 4


def test_jit_with_dynamic_dims():
    module, twin = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    jitted = torchlift.jit(lambda x: module(x).reshape(x.size(0) * 3), dynamic={"x": {0: "n"}})
    with torch.no_grad():
        for size in (4, 6, 5):
            x = torch.randn(size, 3)
            torch.testing.assert_close(jitted(x), twin(x).reshape(-1))
    torch.testing.assert_close(dict(module.named_buffers()), dict(twin.named_buffers()))
    assert jitted.cache_info().misses == 1


def test_a_call_that_a_backend_refuses_leaves_the_state():
    state = torch.zeros(3)

    def chosen(x):
        state.add_(1)
        return x[x > 0].sum()

    jitted = torchlift.jit(chosen, backend=lambda module, inputs: module)
    jitted(torch.ones(3))
    with pytest.raises(torchlift.UnsupportedError, match="shares its memory"):
        jitted(state)
    torch.testing.assert_close(state, torch.ones(3))


def test_a_backend_that_fails_leaves_the_state():
    state = torch.zeros(3)
    fail = [False]

    def backend(module, inputs):
        def run(*args):
            if fail[0]:
                raise RuntimeError("no memory")
            return module(*args)

        return run

    def chosen(x):
        state.add_(1)
        return x[x > 0].sum()

    jitted = torchlift.jit(chosen, backend=backend)
    jitted(torch.ones(3))
    fail[0] = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            jitted(torch.ones(3))
    torch.testing.assert_close(state, torch.ones(3))


def test_the_state_as_the_first_argument():
    held = torch.zeros(3)

    def f(x):
        held.add_(1)
        return x + torch.rand_like(x)

    fast = jit(f)
    fast(held)
    for seed in range(2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        assert_close(fast(torch.zeros(3)), expected)
    buffer = torch.ones(3)
    traced = trace(lambda x: (buffer.add_(x), x * 2)[1])(buffer)
    assert_close(buffer, torch.ones(3))
    assert_close(traced(torch.ones(3)), torch.full((3,), 2.0))
    assert_close(buffer, torch.full((3,), 2.0))


def test_loops_that_begin_with_the_state():
    def scanned(s, xs):
        carry, ys = torchlift.scan(lambda c, x: (c * 0.5 + x, c.sin()), s, xs)
        s.copy_(carry)
        return ys

    def looped(s, xs):
        s.copy_(torchlift.while_loop(lambda c: c.sum() < xs.sum(), lambda c: c + 1, s))
        return s * xs

    for f in (scanned, looped):
        state, theirs = torch.zeros(3), torch.zeros(3)
        fast = jit(lambda xs: f(state, xs))
        for _ in range(3):
            xs = torch.rand(5, 3) * 4
            assert_close(fast(xs), f(theirs, xs))
            assert_close(state, theirs)


def test_two_tensors_of_one_array():
    numpy = pytest.importorskip("numpy")
    array = numpy.zeros(3)
    a, b = torch.from_numpy(array), torch.from_numpy(array)
    zeros = torch.zeros(3, dtype=torch.float64)
    fast = jit(lambda x: (a.add_(1), x + b)[1])
    for count in range(1, 4):
        assert_close(fast(zeros), torch.full_like(zeros, count))
    fast = jit(lambda x: (a.add_(1), x * 2)[1])
    fast(zeros)
    a.zero_()
    assert_close(fast(b), torch.full_like(zeros, 2))
    overlapping = torch.from_numpy(array[1:])
    with pytest.raises(UnsupportedError, match="overlaps with that of another one"):
        trace(lambda x: (a.add_(1), x + overlapping)[1])(zeros[1:])


def test_views_of_the_state_that_autograd_keeps():
    table = torch.zeros(4, 3)
    row = table[1]
    fast = jit(lambda x: row.add_(x) * 2)
    one, w = torch.ones(3), torch.ones(3, requires_grad=True)
    fast(one)
    y = (w * row).sum()
    fast(one)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_an_operator_that_runs_the_program_again():
    state, calls = torch.zeros(3), []

    @torch.library.custom_op("torchlift_tests::again", mutates_args=())
    def again(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return fast(x) if len(calls) == 1 else x * 2

    def f(x):
        state.add_(1)
        return again(x)

    calls.append(1)
    fast = jit(f)
    fast(torch.ones(3))  # traced
    for _ in range(2):
        before = state.clone()
        calls.clear()
        with pytest.raises(UnsupportedError, match="runs the same program again"):
            fast(torch.ones(3))
        assert_close(state, before)
    assert_close(fast(torch.ones(3)), torch.full((3,), 2.0))
