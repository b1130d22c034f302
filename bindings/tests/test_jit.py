"""torchlift.jit: values, the cache, what it tells of it; backends; modules, autograd, threads."""

import threading

import pytest
import torch
import torch.nn as nn
from torch.testing import assert_close

import torchlift
import torchlift.compile as tlc
from torchlift import TransformError, UnsupportedError, grad, jacrev, jit, vmap


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def per_sample(w, x):
    return vmap(grad(lambda w, x: (x @ w).sin().sum()), in_dims=(None, 0))(w, x)


class Counted:
    """A function that counts its calls."""

    def __init__(self, f):
        self.f, self.calls = f, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.f(*args, **kwargs)


# --- the cache -------------------------------------------------------------------------------------


class TestCache:
    def test_the_function_runs_once_a_signature(self):
        counted = Counted(per_sample)
        f = jit(counted)
        for _ in range(3):
            w, x = data(3, 2), data(5, 3)
            assert_close(f(w, x), per_sample(w, x))
        assert counted.calls == 1
        f(data(3, 2), data(6, 3))
        assert counted.calls == 2
        info = f.cache_info()
        assert (info.hits, info.misses, info.direct, info.evicted) == (2, 2, 0, 0)
        assert (info.size, info.max_size) == (2, 64)

    @pytest.mark.parametrize(
        "args, kwargs, reason",
        [
            ((torch.ones(4), 2), {}, "shape"),
            ((torch.ones(3).double(), 2), {}, "float64"),
            ((torch.ones(6)[::2], 2), {}, "strides"),
            ((torch.ones(3), 3), {}, "3; it was 2"),
            ((torch.ones(3), 2.0), {}, "2.0; it was 2"),
            ((torch.ones(3),), {"s": 2}, "structure"),
            (([torch.ones(3)], 2), {}, "structure"),
        ],
    )
    def test_what_is_traced_anew_and_why(self, args, kwargs, reason):
        f = jit(lambda x, s: torch.utils._pytree.tree_leaves(x)[0] * s)
        f(torch.ones(3), 2)
        f(torch.zeros(3), 2)
        assert f.cache_info().misses == 1
        f(*args, **kwargs)
        assert f.cache_info().misses == 2
        first, second = f.explain()
        assert first == "the first call"
        assert reason in second

    def test_modes_are_part_of_the_signature(self):
        f = jit(lambda x: x @ x)
        x = torch.randn(3, 3)
        plain = f(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert f(x).dtype == torch.bfloat16
            assert f(x).dtype == torch.bfloat16
        assert f(x).dtype == plain.dtype
        with torch.no_grad():
            f(x)
        assert f.cache_info().misses == 3
        assert "autocast" in f.explain()[1] and "autograd" in f.explain()[2]

    def test_autocast_is_not_applied_twice(self):
        def f(x):
            with torch.autocast("cpu", enabled=False):
                return x @ x

        x = torch.randn(3, 3)
        expected, g = x @ x, jit(f)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for _ in range(2):
                assert_close(g(x), expected)

    def test_eviction(self):
        counted = Counted(torch.sin)
        f = jit(counted, cache_size=2)
        for n in (1, 2, 1, 3, 1):  # 3 drives out 2
            f(data(n))
        assert counted.calls == 3
        f(data(2))
        assert counted.calls == 4
        info = f.cache_info()
        assert info.evicted == 2 and info.size == 2
        assert len(f.graphs()) == 2

    def test_cache_clear(self):
        f = jit(torch.sin)
        f(data(3))
        f.cache_clear()
        assert f.cache_info().size == 0
        f(data(3))
        assert f.cache_info().misses == 2
        assert "1 graphs" in repr(f)

    def test_threads(self):
        counted = Counted(per_sample)
        f = jit(counted)
        w, xs = data(3, 2), [data(n, 3) for n in (1, 2, 3, 4)]
        expected = [per_sample(w, x) for x in xs]
        failures = []

        def work(i):
            try:
                for _ in range(20):
                    assert_close(f(w, xs[i % 4]), expected[i % 4])
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert failures == []
        info = f.cache_info()
        assert info.size == 4 and info.hits + info.misses == 160

    def test_as_a_decorator(self):
        @jit(cache_size=3)
        def f(x):
            """Doubles."""
            return 2 * x

        assert f.__doc__ == "Doubles." and f.__name__ == "f"
        assert f.cache_info().max_size == 3
        assert_close(f(torch.ones(2)), torch.full((2,), 2.0))


# --- values ----------------------------------------------------------------------------------------


class TestValues:
    def test_pytrees_and_numbers(self):
        def f(tree, *, scale):
            return {"sum": [tree["a"] + tree["b"][0]], "n": 3, "s": "text", "none": None}, scale

        tree = {"a": data(3), "b": [data(3)]}
        for _ in range(2):
            out, scale = jit(f)(tree, scale=2)
            assert_close(out["sum"][0], tree["a"] + tree["b"][0])
            assert (out["n"], out["s"], out["none"], scale) == (3, "text", None, 2)

    def test_outputs_that_are_arguments(self):
        x = data(3, 4)
        f = jit(lambda x: (x, x.t(), x.exp()))
        for _ in range(2):
            same, view, _ = f(x)
            assert same.data_ptr() == x.data_ptr() and view.data_ptr() == x.data_ptr()

    @pytest.mark.parametrize("backend", ["eager", "ts", lambda module, inputs: module])
    def test_writes_into_arguments_are_seen(self, backend):
        def f(x, b):
            b[0].add_(x.sum())
            b.mul_(2)
            return b, b[1], x + b

        g = jit(f, backend=backend)
        x = data(3)
        ours, theirs = torch.ones(2, 3).double(), torch.ones(2, 3).double()
        for _ in range(3):
            out, expected = g(x, ours), f(x, theirs)
            assert_close(ours, theirs)
            for a, b in zip(out, expected, strict=True):
                assert_close(a, b)
            assert out[0].data_ptr() == ours.data_ptr()

    def test_the_first_call_draws_the_numbers_of_eager(self):
        f = jit(lambda x: nn.functional.dropout(x) + torch.randn(20))
        torch.manual_seed(0)
        expected = [nn.functional.dropout(torch.ones(20)) + torch.randn(20) for _ in range(2)]
        torch.manual_seed(0)
        assert_close([f(torch.ones(20)) for _ in range(2)], expected)

    def test_captured_tensors_are_seen_changed(self):
        captured = torch.ones(3)
        f = jit(lambda x: x + captured)
        f(torch.zeros(3))
        captured.add_(1)
        assert_close(f(torch.zeros(3)), torch.full((3,), 2.0))

    def test_inference_mode(self):
        f = jit(torch.sin)
        with torch.inference_mode():
            x = torch.ones(3)
            assert_close(f(x), x.sin())
            assert_close(f(x), x.sin())


# --- autograd and transforms -----------------------------------------------------------------------


class TestNesting:
    def test_tracked_arguments_run_the_function(self):
        x = data(3).requires_grad_()
        f = jit(torch.sin)
        f(x).sum().backward()
        assert_close(x.grad, x.detach().cos())
        assert f.cache_info().direct == 1
        with torch.no_grad():
            f(x)
        assert f.cache_info().misses == 1

    def test_captured_parameters_keep_their_gradients(self):
        w = data(3).requires_grad_()
        f = jit(lambda x: (w * x).sum())
        for _ in range(2):
            w.grad = None
            x = data(3)
            f(x).backward()
            assert_close(w.grad, x)
        with torch.no_grad():
            assert not f(data(3)).requires_grad

    def test_transforms_of_it(self):
        f = jit(lambda x: x.sin().sum())
        x = data(5, 3)
        assert_close(grad(f)(x[0]), x[0].cos())
        assert_close(vmap(grad(f))(x), x.cos())
        assert_close(torchlift.jvp(f, (x[0],), (x[1],))[1], (x[0].cos() * x[1]).sum())
        assert f.cache_info().misses == 0
        inside = jit(vmap(jacrev(jit(torch.sin))))
        assert_close(inside(x), torch.diag_embed(x.cos()))
        assert inside.cache_info().misses == 1

    def test_inside_of_trace(self):
        x = data(3)
        traced = torchlift.trace(jit(torch.sin))(x)
        assert [n[0] for n in traced.graph.nodes()] == ["aten::sin"]

    def test_a_custom_vjp_inside_a_gradient(self):
        @torchlift.custom_vjp
        def f(x):
            return x.sin()

        f.defvjp(lambda x: (x.sin(), None), lambda _, g: (7 * g,))
        assert_close(jit(grad(f))(torch.zeros(())), torch.tensor(7.0))
        assert_close(grad(jit(f))(torch.zeros(())), torch.tensor(7.0))


# --- modules ---------------------------------------------------------------------------------------


class TestModules:
    def test_parameters_are_inputs(self):
        model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
        f = jit(model)
        x = data(5, 3)
        with torch.no_grad():
            assert_close(f(x), model(x))
            for p in model.parameters():
                p.mul_(3)
            assert_close(f(x), model(x))
            assert f.cache_info().hits == 1
            model.load_state_dict({k: v.clone() * 2 for k, v in model.state_dict().items()})
            assert_close(f(x), model(x))

    def test_gradients_reach_the_parameters(self):
        model = nn.Linear(3, 2).double()
        jit(model)(data(5, 3)).sum().backward()
        assert_close(model.bias.grad, torch.full((2,), 5.0, dtype=torch.float64))

    def test_training_mode_and_buffers(self):
        ours, theirs = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
        f = jit(ours)
        with torch.no_grad():
            for _ in range(3):
                x = data(6, 3)
                assert_close(f(x), theirs(x))
            ours.eval(), theirs.eval()
            assert_close(f(x), theirs(x))
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            assert_close(a, b)
        assert "train() and eval()" in f.explain()[1]


# --- outputs that are constants --------------------------------------------------------------------


CAPTURED = torch.arange(6.0).reshape(2, 3)


def independent(p, x):
    return {
        "unused": grad(lambda p: (p["w"] * x).sum())(p)["unused"],
        "ones": torch.ones(3),
        "linear": grad(lambda x: x.sum())(x),
        "captured": CAPTURED,
        "view": CAPTURED.t()[1:],
        "x": x * 2,
    }


RUNS = {
    "jit": lambda f, args, tmp_path: jit(f),
    "trace": lambda f, args, tmp_path: torchlift.trace(f)(*args),
    "load": lambda f, args, tmp_path: (
        torchlift.save(f, tmp_path / "f.tlc", *args),
        torchlift.load(tmp_path / "f.tlc"),
    )[1],
    "make_fx": lambda f, args, tmp_path: torchlift.make_fx(f)(*args),
    "jit, backend": lambda f, args, tmp_path: jit(f, backend=tlc.nop),
    "aot_function": lambda f, args, tmp_path: tlc.aot_function(f, tlc.nop),
}


@pytest.mark.parametrize("way", RUNS)
def test_what_is_written_into_outputs_is_not_in_the_next_run(way, tmp_path):
    args = ({"w": torch.ones(3), "unused": torch.ones(2)}, torch.ones(3))
    expected = torch.utils._pytree.tree_map(torch.clone, independent(*args))
    f = RUNS[way](independent, args, tmp_path)
    for _ in range(3):
        got = f(*args)
        assert_close(got, expected)
        for value in got.values():
            if 0 not in value.stride():
                value.add_(100)
    assert_close(CAPTURED, torch.arange(6.0).reshape(2, 3))


def test_a_parameter_that_is_returned_is_differentiable():
    w = torch.ones(3, requires_grad=True)
    f = jit(lambda x: (w, x))
    f(torch.ones(3))
    f(torch.ones(3))[0].sum().backward()
    assert_close(w.grad, torch.ones(3))


# --- backends --------------------------------------------------------------------------------------


class TestBackends:
    def test_names(self):
        assert tlc.list_backends() == ["eager", "inductor", "ts"]
        with pytest.raises(TransformError, match=r"no backend 'tvm'. Use one of \['eager'"):
            jit(torch.sin, backend="tvm")

    def test_register_backend(self):
        seen = []

        def backend(module, inputs):
            seen.append((module, [tuple(t.shape) for t in inputs]))
            return module

        tlc.register_backend("mine", backend)
        try:
            f = jit(per_sample, backend="mine")
            w, x = data(3, 2), data(5, 3)
            assert_close(f(w, x), per_sample(w, x))
            f(w, x)
            assert len(seen) == 1 and seen[0][1] == [(3, 2), (5, 3)]
            assert isinstance(seen[0][0], torch.fx.GraphModule)
        finally:
            tlc.unregister_backend("mine")
        assert "mine" not in tlc.list_backends()

    def test_register_backend_errors(self):
        with pytest.raises(TransformError, match="'eager' is taken"):
            tlc.register_backend("eager", lambda m, i: m)
        with pytest.raises(TransformError, match="takes a name and a function"):
            tlc.register_backend("x", 3)
        with pytest.raises(TransformError, match="no backend of yours called 'ts'"):
            tlc.unregister_backend("ts")

    def test_ts(self):
        f = jit(per_sample, backend="ts")
        w, x = data(3, 2), data(5, 3)
        for _ in range(3):
            assert_close(f(w, x), per_sample(w, x))

    def test_compilers_of_aot_function_are_backends(self):
        x = data(3)
        assert_close(jit(torch.sin, backend=tlc.nop)(x), x.sin())

    def test_inductor(self):
        f = jit(per_sample, backend="inductor")
        w, x = data(3, 2), data(5, 3)
        for _ in range(2):
            assert_close(f(w, x), per_sample(w, x))
        assert f.cache_info().misses == 1

    def test_inductor_without_a_compiler(self, monkeypatch):
        import torch._inductor.compile_fx as compile_fx

        def refuse(*args, **kwargs):
            raise RuntimeError("No working C++ compiler found in [None]")

        monkeypatch.setattr(compile_fx, "compile_fx", refuse)
        with pytest.raises(UnsupportedError, match="It needs a C.. compiler"):
            jit(torch.sin, backend="inductor")(data(3))


# --- errors ----------------------------------------------------------------------------------------


class TestErrors:
    def test_wrong_use(self):
        with pytest.raises(TransformError, match="must be callable, got int"):
            jit(3)
        with pytest.raises(TransformError, match="cache_size must be at least 1, got 0"):
            jit(torch.sin, cache_size=0)
        with pytest.raises(TransformError, match="a set, which cannot be hashed"):
            jit(lambda x, s: x)(data(2), {1})

    def test_data_dependent_control_flow_names_the_line(self):
        def f(x):
            if x.sum() > 0:  # here
                return x
            return -x

        with pytest.raises(UnsupportedError, match=r"test_jit.py:\d+, in f: if x.sum\(\) > 0:"):
            jit(f)(data(3))

    def test_a_failed_trace_leaves_nothing_behind(self):
        f = jit(lambda x: x.sum().item())
        for _ in range(2):
            with pytest.raises(UnsupportedError):
                f(data(3))
        assert f.cache_info().size == 0 and torchlift._C.open_levels() == 0


class TestOthersLookOn:
    """Replays have kernels of their own, and drop numbers that nobody reads: not where others do."""

    X = torch.randn(3, generator=torch.Generator().manual_seed(0))

    def test_make_fx(self):
        from torch.fx.experimental.proxy_tensor import make_fx

        f = torchlift.jit(lambda x: torch.tanh(x) + 1)
        f(self.X)
        assert "aten.tanh" in make_fx(f)(self.X).code

    def test_torch_func(self):
        f = torchlift.jit(lambda x: torch.exp(x) + 1)
        f(self.X[0])
        torch.testing.assert_close(torch.func.vmap(f)(self.X), self.X.exp() + 1)

    def test_fake_tensors(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        f = torchlift.jit(lambda x: torch.exp(x) + 1)
        f(self.X)
        with FakeTensorMode() as mode:
            assert f(mode.from_tensor(self.X)).shape == (3,)

    def test_a_mode_that_reads_arguments(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        class Reads(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                for arg in args:
                    if isinstance(arg, torch.Tensor) and arg.is_floating_point():
                        arg.sum()
                return func(*args, **(kwargs or {}))

        def loss(x):
            pooled = torch.nn.functional.max_pool2d((x * 2).relu(), 2)
            return (pooled**2).sum()

        x = torch.randn(1, 1, 8, 8)
        f = torchlift.jit(torchlift.grad(loss))
        expected = f(x)
        with Reads():
            torch.testing.assert_close(f(x), expected)

    def test_a_tensor_of_zeros_without_memory(self):
        f = torchlift.jit(lambda x: torch.exp(x) + 1)
        torch.testing.assert_close(f(torch._efficientzerotensor(3)), torch.full((3,), 2.0))


def test_hessian_of_a_convolution_with_captured_weights():
    weight = torch.randn(4, 3, 1, 1, dtype=torch.float64)

    def energy(x):
        return (torch.nn.functional.gelu(torch.nn.functional.conv2d(x, weight)) ** 2).sum()

    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    hessian = torchlift.hessian(energy)
    torch.testing.assert_close(torchlift.jit(hessian)(x), hessian(x))


@pytest.mark.parametrize("view", [torch.Tensor.conj, lambda z: z.conj().imag, lambda z: z.conj()[1:]], ids=["conj", "imag", "part"])
def test_writes_into_conjugate_views(view):
    def f(x):
        z = torch.complex(x, x.sin())
        view(z).mul_(2)
        return z.real * z.imag

    x = torch.rand(2, 3, dtype=torch.float64)
    tangent = torchlift.vmap(lambda x: torchlift.jvp(f, (x,), (x,))[1])
    for g in (torchlift.vmap(f), torchlift.vmap(torchlift.jacrev(f)), tangent):
        assert_close(jit(g)(x), g(x))
    assert_close(jit(torchlift.jacrev(f))(x[0]), torchlift.jacrev(f)(x[0]))
