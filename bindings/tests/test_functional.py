"""functional_call and stack_module_state."""

import re
import threading

import pytest
import torch
from torch import nn

import torchlift
from torchlift import TransformError, functional_call, grad, stack_module_state, vmap


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def state_of(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


class TestFunctionalCall:
    def test_agrees_with_torch(self):
        model, x = net(), torch.randn(5, 3)
        params = state_of(model)
        own = [p.detach().clone() for p in model.parameters()]
        torch.testing.assert_close(
            functional_call(model, params, (x,)), torch.func.functional_call(model, params, (x,))
        )
        assert all(torch.equal(a, b) for a, b in zip(own, model.parameters()))
        assert all(isinstance(p, nn.Parameter) for p in model.parameters())

    def test_forms_of_arguments(self):
        model, x = net(), torch.randn(5, 3)
        params = state_of(model)
        want = functional_call(model, params, (x,))
        torch.testing.assert_close(functional_call(model, params, x), want)
        torch.testing.assert_close(functional_call(model, params, None, {"input": x}), want)
        halves = tuple({k: v} for k, v in params.items())
        torch.testing.assert_close(functional_call(model, halves, x), want)

    def test_partial_state(self):
        model, x = nn.Linear(3, 2), torch.randn(3)
        got = functional_call(model, {"bias": torch.zeros(2)}, x)
        torch.testing.assert_close(got, model.weight @ x)
        torch.testing.assert_close(functional_call(model, {}, x), model(x))

    def test_restored_after_an_exception(self):
        model = net()
        own = list(model.parameters())
        with pytest.raises(RuntimeError):
            functional_call(model, state_of(model), torch.randn(5, 7))
        assert all(a is b for a, b in zip(own, model.parameters()))

    def test_buffers(self):
        model = nn.BatchNorm1d(3)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        before = model.running_mean.clone()
        functional_call(model, state, torch.randn(10, 3) + 5)
        assert torch.equal(model.running_mean, before)
        assert not torch.equal(state["running_mean"], before)

        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("n", torch.zeros(()))

            def forward(self, x):
                self.n = self.n + 1
                return x * self.n

        counter, state = Counter(), {"n": torch.tensor(4.0)}
        torch.testing.assert_close(functional_call(counter, state, torch.tensor(1.0)), torch.tensor(5.0))
        assert state["n"] == 5 and counter.n == 0

    def test_tied_weights(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a = nn.Linear(2, 2, bias=False)
                self.b = nn.Linear(2, 2, bias=False)
                self.b.weight = self.a.weight

            def forward(self, x):
                return self.b(self.a(x))

        model, x, w = Tied(), torch.randn(2), torch.randn(2, 2)
        for name in ("a.weight", "b.weight"):
            torch.testing.assert_close(functional_call(model, {name: w}, x), w @ w @ x)
        got = functional_call(model, {"a.weight": w}, x, tie_weights=False)
        torch.testing.assert_close(got, model.b.weight @ w @ x)
        both = functional_call(model, {"a.weight": w, "b.weight": w}, x)
        torch.testing.assert_close(both, w @ w @ x)
        with pytest.raises(ValueError, match="a.weight and b.weight, which are one tensor"):
            functional_call(model, {"a.weight": w, "b.weight": w * 2}, x)

    def test_shared_submodules(self):
        layer = nn.Linear(2, 2, bias=False)
        model, x, w = nn.Sequential(layer, layer), torch.randn(2), torch.randn(2, 2)
        torch.testing.assert_close(functional_call(model, {"0.weight": w}, x), w @ w @ x)

    def test_strict(self):
        model, x = nn.Linear(3, 2), torch.randn(3)
        with pytest.raises(TransformError, match=r"missing names \['bias'\], unexpected names \['c'\]"):
            functional_call(model, {"weight": torch.ones(2, 3), "c": x}, x, strict=True)
        functional_call(model, state_of(model), x, strict=True)

    def test_unknown_names(self):
        model, x = net(), torch.randn(5, 3)
        for name in ("0.wieght", "weight", "7.weight", "0.weight.data", ""):
            with pytest.raises(TransformError, match=f"Sequential has no parameter or buffer '{name}'"):
                functional_call(model, {name: torch.zeros(4, 3)}, x)

    def test_errors_name_tensors_unlike_the_modules(self):
        model, x = net(), torch.randn(5, 3)
        cases = [
            (torch.zeros(2, 4, 3), r"'0.weight' is a tensor of shape \[4, 3\], torch.float32"),
            (torch.zeros(4, 3).double(), r"given was one of shape \[4, 3\], torch.float64"),
        ]
        for value, text in cases:
            with pytest.raises(RuntimeError) as caught:
                functional_call(model, {"0.weight": value}, x)
            said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
            assert re.search(text, said), said

    def test_recurrent_modules_keep_their_own_weights(self):
        model, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
        before = list(model._flat_weights)
        states = [{k: torch.randn_like(p) for k, p in model.named_parameters()} for _ in range(2)]
        stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}
        vmap(lambda s: functional_call(model, s, x)[0])(stacked)
        assert all(a is b for a, b in zip(before, model._flat_weights))
        with pytest.raises(RuntimeError):
            functional_call(model, states[0], torch.randn(5, 2, 7))
        assert all(a is b for a, b in zip(before, model._flat_weights))

    def test_bad_states(self):
        model, x = nn.Linear(3, 2), torch.randn(3)
        with pytest.raises(TransformError, match="'bias' is in more than one"):
            functional_call(model, ({"bias": x}, {"bias": x}), x)
        with pytest.raises(TypeError, match="'bias' must be a tensor or None, got int"):
            functional_call(model, {"bias": 3}, x)
        with pytest.raises(TransformError, match="expected a dict"):
            functional_call(model, 3, x)

    def test_grad_and_vmap(self):
        model, x = net(), torch.randn(5, 3)
        params = state_of(model)
        loss = lambda p, v: functional_call(model, p, v).square().sum()  # noqa: E731
        got = vmap(grad(loss), in_dims=(None, 0))(params, x)
        for i in range(5):
            leaf = {k: v.clone().requires_grad_() for k, v in params.items()}
            want = torch.autograd.grad(loss(leaf, x[i]), list(leaf.values()))
            for g, w in zip(got.values(), want):
                torch.testing.assert_close(g[i], w)

    def test_scripted_modules_are_refused_as_by_torch(self):
        model, x = torch.jit.script(nn.Linear(3, 2)), torch.randn(3)
        with pytest.raises(RuntimeError, match="Jitted"):
            functional_call(model, {"bias": torch.zeros(2)}, x)

    def test_one_module_in_several_threads(self):
        model, x = net(), torch.randn(3)
        states = [state_of(model) for _ in range(4)]
        wants = [functional_call(model, s, x) for s in states]
        wrong = []

        def work(state, want):
            for _ in range(50):
                if not torch.equal(functional_call(model, state, x), want):
                    wrong.append(state)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(states, wants)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    def test_nested_calls_of_one_module(self):
        model, x = nn.Linear(2, 2, bias=False), torch.randn(2)
        outer, inner = torch.randn(2, 2), torch.randn(2, 2)

        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = model

            def forward(self, v):
                return functional_call(self.layer, {"weight": inner}, self.layer(v))

        got = functional_call(Twice(), {"layer.weight": outer}, x)
        torch.testing.assert_close(got, inner @ (outer @ x))


class TestStackModuleState:
    def test_ensemble(self):
        models, x = [net() for _ in range(4)], torch.randn(3)
        params, buffers = stack_module_state(models)
        assert buffers == {} and all(p.requires_grad and p.is_leaf for p in params.values())
        f = lambda p, b, v: functional_call(models[0], (p, b), v)  # noqa: E731
        got = vmap(f, in_dims=(0, 0, None))(params, buffers, x)
        torch.testing.assert_close(got, torch.stack([m(x) for m in models]))

    def test_matches_torch(self):
        models = [nn.BatchNorm1d(3) for _ in range(2)]
        for ours, theirs in zip(stack_module_state(models), torch.func.stack_module_state(models)):
            assert list(ours) == list(theirs)
            assert all(torch.equal(ours[k], theirs[k]) for k in ours)

    def test_errors(self):
        with pytest.raises(TransformError, match="at least one model"):
            stack_module_state([])
        with pytest.raises(TransformError, match="one class, got Linear, Tanh"):
            stack_module_state([nn.Linear(1, 1), nn.Tanh()])
        with pytest.raises(TransformError, match="'weight' has shapes"):
            stack_module_state([nn.Linear(1, 1), nn.Linear(2, 1)])
        with pytest.raises(TransformError, match="training mode"):
            stack_module_state([nn.Linear(1, 1), nn.Linear(1, 1).eval()])
        with pytest.raises(TransformError, match="'weight' has dtypes"):
            stack_module_state([nn.Linear(1, 1), nn.Linear(1, 1).double()])
        more = nn.Linear(1, 1)
        more.register_parameter("extra", nn.Parameter(torch.ones(2)))
        for models in ([more, nn.Linear(1, 1)], [nn.Linear(1, 1), more]):
            with pytest.raises(TransformError, match="'extra' has shapes"):
                stack_module_state(models)


def test_torchlift_is_used_not_torch_func(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch.func was called")

    for name in ("vmap", "grad", "vjp", "functional_call", "stack_module_state"):
        monkeypatch.setattr(torch.func, name, refuse)
    model = net()
    torchlift.vmap(torchlift.grad(lambda v: functional_call(model, {}, v).sum()))(torch.randn(2, 3))
