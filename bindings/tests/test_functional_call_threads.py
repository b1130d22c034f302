"""functional_call while other threads use the module: they see the module as it is.

Each test computes its results one after the other first, and wants the same numbers, bit for bit, from threads
that take turns every few bytecodes.
"""

import copy
import pickle
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from torchlift import functional_call, grad, vmap

REPEATS = 60


@pytest.fixture(autouse=True)
def eager_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def run_all(*works, repeats=REPEATS):
    """Calls each work in a thread of its own, again and again; the first error of any is the test's."""
    errors = []
    start = threading.Barrier(len(works))

    def repeat(work):
        start.wait(timeout=60)
        try:
            for _ in range(repeats):
                if errors:
                    return
                work()
        except BaseException as error:  # noqa: BLE001: raised again below
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def tensors_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    values = result.values() if isinstance(result, dict) else result
    return [tensor for value in values for tensor in tensors_of(value)]


def same(got, want):
    got, want = tensors_of(got), tensors_of(want)
    return len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want))


def always(call, want=None):
    """A work that calls, and wants what a call alone gave."""
    want = call() if want is None else want

    def work():
        assert same(call(), want), "a thread saw another one's tensors"

    return work


def state_of(model):
    return {name: torch.randn_like(p) for name, p in model.named_parameters()}


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def reads(model):
    """A work that looks at the module in all the ways there are, and wants to see its own tensors."""
    own = dict(model.named_parameters())
    state = model.state_dict(keep_vars=True)

    def work():
        found = dict(model.named_parameters())
        assert list(found) == list(own) and all(found[name] is own[name] for name in own)
        assert all(a is b for a, b in zip(model.parameters(), own.values()))
        now = model.state_dict(keep_vars=True)
        assert list(now) == list(state) and all(now[name] is state[name] for name in state)
        for name, tensor in own.items():
            path, _, last = name.rpartition(".")
            module = model.get_submodule(path)
            assert getattr(module, last) is tensor and module._parameters[last] is tensor
            assert last in module._parameters and last in vars(module)["_parameters"].keys()

    return work


class Shared(nn.Module):
    """Two parents of one child are two of these."""

    def __init__(self, child):
        super().__init__()
        self.child, self.head = child, nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.child(x).tanh())


class TestThreads:
    def test_direct_calls_see_the_modules_own(self):
        model, x = net(), torch.randn(5, 3)
        states = [state_of(model) for _ in range(2)]
        calls = [always(lambda s=s: functional_call(model, s, x)) for s in states]
        run_all(*calls, always(lambda: model(x)), reads(model), repeats=200)
        assert all(type(m._parameters) is dict for m in model.modules())

    def test_parents_that_share_a_child(self):
        child, x = nn.Linear(3, 4), torch.randn(5, 3)
        one, two = Shared(child), Shared(child)
        a, b = state_of(one), state_of(two)
        run_all(
            always(lambda: functional_call(one, a, x)),
            always(lambda: functional_call(two, b, x)),
            always(lambda: two(x)),
            always(lambda: child(x)),
            reads(one),
        )

    def test_calls_do_not_wait_for_each_other(self):
        model = Meeting(threading.Barrier(2))
        states = [{"w": torch.tensor(float(i))} for i in range(2)]
        got = [None, None]

        def call(i):
            got[i] = functional_call(model, states[i], ())

        threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == [(0.0, 0.0), (1.0, 1.0)]

    def test_nested_calls(self):
        inner, x = nn.Linear(3, 3), torch.randn(3)
        states = [state_of(inner) for _ in range(3)]

        class Nest(nn.Module):
            def __init__(self, state):
                super().__init__()
                self.layer, self.state = inner, state

            def forward(self, v):
                first = self.layer(v)
                second = functional_call(self.layer, self.state, first)
                third = functional_call(self.layer, {"bias": self.state["bias"]}, second)
                return torch.stack([first, second, third, self.layer(v)])

        works = []
        for i in range(3):
            outer = {f"layer.{name}": value for name, value in states[i - 1].items()}
            w, b = outer["layer.weight"], outer["layer.bias"]
            u, c = states[i].values()
            first = nn.functional.linear(x, w, b)
            second = nn.functional.linear(first, u, c)
            want = torch.stack([first, second, nn.functional.linear(second, w, c), first])
            works.append(always(lambda m=Nest(states[i]), o=outer: functional_call(m, o, x), want))
        run_all(*works, always(lambda: inner(x)), reads(inner))

    def test_exceptions(self):
        model, x = net(), torch.randn(5, 3)
        state = state_of(model)

        def failing():
            with pytest.raises(RuntimeError):
                functional_call(model, state, torch.randn(5, 7))
            with pytest.raises(Exception, match="no parameter or buffer"):
                functional_call(model, {**state, "nobody": x}, x)

        run_all(failing, always(lambda: functional_call(model, state, x)), always(lambda: model(x)), reads(model))
        assert all(type(m._parameters) is dict for m in model.modules())

    def test_transforms(self):
        model, x, y = net(), torch.randn(5, 3), torch.randn(5, 2)
        states = [state_of(model) for _ in range(3)]
        stacked = {name: torch.stack([s[name] for s in states]) for name in states[0]}
        loss = lambda p: (functional_call(model, p, x) - y).square().mean()  # noqa: E731
        run_all(
            always(lambda: vmap(lambda p: functional_call(model, p, x))(stacked)),
            always(lambda: grad(loss)(states[0])),
            always(lambda: vmap(grad(loss))(stacked)),
            always(lambda: torch.autograd.grad((model(x) - y).square().mean(), list(model.parameters()))),
            reads(model),
        )

    def test_training_the_module_meanwhile(self):
        """Another thread writes into the module's own tensors, and puts new ones there."""
        model, x = net(), torch.randn(5, 3)
        given = state_of(model)
        finals = iter(range(REPEATS))

        def train():
            value = float(next(finals))
            with torch.no_grad():
                model[0].weight.fill_(value)
            model[2].bias = nn.Parameter(torch.full((2,), value))
            assert torch.equal(model[2].bias, torch.full((2,), value))

        run_all(always(lambda: functional_call(model, given, x)), train)
        assert torch.equal(model[2].bias, torch.full((2,), REPEATS - 1.0))
        assert torch.equal(model[0].weight, torch.full((4, 3), REPEATS - 1.0))

    def test_buffers(self):
        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("steps", torch.zeros(()))
                self.register_buffer("seen", torch.zeros(()))

            def forward(self, x):
                self.steps = self.steps + 1
                self.seen.add_(x.sum())
                return self.steps * x

        model, x = Counter(), torch.randn(3)

        def work(first):
            state = {"steps": torch.tensor(first), "seen": torch.zeros(())}

            def step():
                before, seen = state["steps"], state["seen"].clone()
                assert torch.equal(functional_call(model, state, x), (before + 1) * x)
                assert state["steps"] == before + 1
                assert torch.equal(state["seen"], seen + x.sum())

            return step

        def own():
            assert model.steps == 0 and model.seen == 0

        run_all(work(10.0), work(1000.0), own)

    def test_batch_norm_in_training(self):
        model, x = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(8, 3)
        states = [{k: v.clone() for k, v in model.state_dict().items()} for _ in range(2)]
        own = {k: v.clone() for k, v in model.state_dict().items()}

        def returned(i):
            return functional_call(model, states[i], x + i, mutate_buffers="return")

        run_all(always(lambda: returned(0)), always(lambda: returned(1)))
        assert same(model.state_dict(), own)


class Meeting(nn.Module):
    """All threads are inside at the same time."""

    def __init__(self, barrier):
        super().__init__()
        self.w, self.barrier = nn.Parameter(torch.tensor(-1.0)), barrier

    def forward(self):
        first = self.w.item()
        self.barrier.wait(timeout=60)
        second = self.w.item()
        self.barrier.wait(timeout=60)
        return first, second


def with_pruning():
    model = nn.Linear(3, 4)
    prune.random_unstructured(model, "weight", amount=0.4)
    return model


DERIVED = {
    "RNN": (lambda: nn.RNN(3, 4), (5, 2, 3)),
    "GRU": (lambda: nn.GRU(3, 4, num_layers=2), (5, 2, 3)),
    "LSTM": (lambda: nn.LSTM(3, 4, bidirectional=True), (5, 2, 3)),
    "LSTM with projections": (lambda: nn.LSTM(3, 4, proj_size=2), (5, 2, 3)),
    "RNNCell": (lambda: nn.RNNCell(3, 4), (2, 3)),
    "GRUCell": (lambda: nn.GRUCell(3, 4), (2, 3)),
    "LSTMCell": (lambda: nn.LSTMCell(3, 4), (2, 3)),
    "weight_norm": (lambda: weight_norm(nn.Linear(3, 4)), (2, 3)),
    "spectral_norm": (lambda: spectral_norm(nn.Linear(3, 4)).eval(), (2, 3)),
    "pruned": (with_pruning, (2, 3)),
    "weight_norm of a GRU": (lambda: weight_norm(nn.GRU(3, 4), "weight_hh_l0"), (5, 2, 3)),
    "parametrizations.weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 4)), (2, 3)),
    "parametrizations.orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(3, 4)), (2, 3)),
}


@pytest.mark.filterwarnings("ignore")
class TestDerivedTensors:
    """Modules that compute tensors from their parameters and keep them."""

    @pytest.mark.parametrize("name", DERIVED)
    def test_threads(self, name):
        make, shape = DERIVED[name]
        model, x = make(), torch.randn(*shape)
        model(x)
        own_class = type(model)
        states = [state_of(model) for _ in range(2)]
        stacked = {key: torch.stack([s[key] for s in states]) for key in states[0]}
        attributes = {k: v for k, v in vars(model).items() if k in ("weight", "_flat_weights")}
        with torch.no_grad():
            run_all(
                always(lambda: functional_call(model, states[0], x)),
                always(lambda: functional_call(model, states[1], x)),
                always(lambda: vmap(lambda s: functional_call(model, s, x))(stacked)),
                always(lambda: model(x)),
                repeats=30,
            )
        assert type(model) is own_class
        for key, value in attributes.items():
            if isinstance(value, list):
                assert type(vars(model)[key]) is list
            assert same(vars(model)[key], value)

    def test_results_are_those_of_a_module_with_the_tensors(self):
        for name, (make, shape) in DERIVED.items():
            model, other, x = make(), make(), torch.randn(*shape)
            other.load_state_dict(model.state_dict())
            state = state_of(model)
            other.load_state_dict(state, strict=False)
            got, want = tensors_of(functional_call(model, state, x)), tensors_of(other(x))
            for g, w in zip(got, want):
                torch.testing.assert_close(g, w, msg=name)

    def test_a_recurrent_module_that_is_tied_to_another(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.GRU(3, 3), nn.GRU(3, 3)
                self.b.weight_hh_l0 = self.a.weight_hh_l0

            def forward(self, x):
                return self.b(self.a(x)[0])[0]

        model, x, w = Tied(), torch.randn(5, 2, 3), torch.randn(9, 3)
        want = model(x)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.a.weight_hh_l0.copy_(w)
        assert torch.equal(functional_call(model, {"a.weight_hh_l0": w}, x), other(x))
        own = [p for _, p in model.b.named_parameters()]
        assert all(a is b for a, b in zip(model.b._flat_weights, own))
        assert torch.equal(model(x), want)

    def test_copies_of_an_instances_dict(self):
        """As torch.nn.DataParallel makes replicas."""

        class Replicated(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.GRU(3, 4)

            def forward(self, x):
                replica = self.layer._replicate_for_data_parallel()
                for name, p in self.layer._parameters.items():
                    setattr(replica, name, p.clone())
                state = {k: v for k, v in self.layer.named_parameters()}
                return self.layer(x)[0], functional_call(copy.copy(self.layer), state, x)[0]

        model, x = Replicated(), torch.randn(5, 2, 3)
        state = state_of(model)
        with torch.no_grad():
            a, b = functional_call(model, state, x)
            assert torch.equal(a, b)
            assert torch.equal(model.layer(x)[0], copy.deepcopy(model).layer(x)[0])

    def test_the_first_calls_of_a_class_come_at_once(self):
        for _ in range(100):

            class Scaled(nn.Module):
                def __init__(self):
                    super().__init__()
                    self.scale = torch.tensor(2.0)

                def forward(self, x):
                    return x * self.scale

            model, x = Scaled(), torch.randn(3)

            def work(value):
                def step():
                    state = {"scale": torch.tensor(value)}
                    assert torch.equal(functional_call(model, state, x), x * value)

                return step

            run_all(*(work(float(i)) for i in range(4)), repeats=1)
            assert type(model) is Scaled and model.scale == 2

    def test_plain_attributes(self):
        class Scaled(nn.Module):
            offset = None  # of the class, below that of the instance

            def __init__(self):
                super().__init__()
                self.scale = torch.tensor(2.0)
                self.offset = torch.tensor(0.5)

            def forward(self, x):
                before = self.scale
                self.scale = before + 1
                return x * before + self.offset

        model, x = Scaled(), torch.randn(3)

        def work(value):
            def step():
                state = {"scale": torch.tensor(value), "offset": torch.tensor(1.0)}
                assert torch.equal(functional_call(model, state, x), x * value + 1)
                assert state["scale"] == value + 1

            return step

        def own():
            assert model.scale == 2 and model.offset == 0.5

        run_all(work(5.0), work(7.0), own, repeats=200)
        assert type(model) is Scaled and vars(model)["scale"] == 2

    def test_a_plain_attribute_below_a_property_is_refused(self):
        class Odd(nn.Module):
            @property
            def scale(self):
                return self.__dict__["scale"]

        model = Odd()
        model.__dict__["scale"] = torch.tensor(2.0)
        with pytest.raises(RuntimeError, match="'scale' of Odd is a property of the class"):
            functional_call(model, {"scale": torch.tensor(1.0)}, ())

    def test_copies_meanwhile_are_of_the_modules_own(self):
        """Those that other threads make while the call goes on; docs/limits.md has those at its very ends."""
        model, x, copies = nn.GRU(3, 4), torch.randn(5, 2, 3), []
        want = model(x)

        def work():
            for make in (copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
                copies.append(make(model))

        class Copied(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = model

            def forward(self, x):
                thread = threading.Thread(target=work)
                thread.start()
                thread.join()
                return self.inner(x)

        with torch.no_grad():
            functional_call(Copied(), {f"inner.{k}": v for k, v in state_of(model).items()}, x)
        assert [type(other) for other in copies] == 3 * [nn.GRU]
        assert all(same(other(x), want) for other in copies)


class TestInsideOfACall:
    """What forward does to the module it does to what it sees."""

    def probe(self, forward, state=None):
        class Probe(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(2))
                self.v = nn.Parameter(torch.zeros(2))
                self.register_buffer("b", torch.zeros(2))

        Probe.forward = forward
        model = Probe()
        state = {"w": torch.ones(2), "b": torch.full((2,), 3.0)} if state is None else state
        return model, state, functional_call(model, state, ())

    def test_all_of_dicts_methods(self):
        given = torch.ones(2)

        def forward(m):
            p, plain = m._parameters, {"w": given, "v": v}
            assert isinstance(p, dict) and p == plain and plain == p and not p != plain
            assert list(p) == ["w", "v"] and len(p) == 2 and bool(p)
            assert dict(p) == plain and {**p} == plain and p.copy() == plain and type(p.copy()) is dict
            assert list(p.keys()) == ["w", "v"] and list(p.values())[0] is given
            assert list(p.items())[0] == ("w", given) and list(reversed(p)) == ["v", "w"]
            assert p.get("w") is given and p.get("x") is None and p.get("x", 3) == 3
            assert (p | {"x": 1})["x"] == 1 and ({"x": 1} | p)["w"] is given and repr(p) == repr(plain)
            assert "w" in p and "x" not in p and 3 not in p and p.setdefault("w", None) is given
            assert copy.copy(p) == plain and torch.equal(copy.deepcopy(p)["w"], given)
            assert torch.equal(pickle.loads(pickle.dumps(p))["w"], given)
            with pytest.raises(KeyError, match="x"):
                p["x"]
            with pytest.raises(KeyError, match="x"):
                del p["x"]
            with pytest.raises(KeyError, match="x"):
                p.pop("x")
            with pytest.raises(TypeError):
                hash(p)
            assert p.pop("w") is given and "w" not in p and list(p) == ["v"] and p.pop("w", 4) == 4
            with pytest.raises(KeyError, match="w"):
                del p["w"]
            p.update(w=given)
            p |= {"w": given * 2}
            assert torch.equal(m.w, given * 2)
            assert p.popitem()[0] == "v" and p.setdefault("v", v) is v
            p["w"] = given

        class Probe(nn.Module):
            def __init__(self):
                super().__init__()
                self.w, self.v = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))

        Probe.forward = forward
        model = Probe()
        v, own = model.v, model.w
        functional_call(model, {"w": given}, ())
        assert type(model._parameters) is dict and model._parameters == {"w": own, "v": v}

    def test_what_lists_tensors(self):
        def forward(m):
            assert dict(m.named_parameters()) == {"w": state["w"], "v": m.v}
            assert [id(p) for p in m.parameters()] == [id(state["w"]), id(m.v)]
            assert list(m.state_dict()) == ["w", "v", "b"] and torch.equal(m.state_dict()["b"], state["b"])
            assert dict(m.named_buffers())["b"] is state["b"] and "w" in dir(m)

        state = {"w": torch.ones(2), "b": torch.full((2,), 3.0)}
        self.probe(forward, state)

    def test_register_and_delete(self):
        def forward(m):
            m.register_buffer("new", m.w + 1)
            m.register_parameter("more", nn.Parameter(m.b + 1))
            del m.w, m.b
            assert not hasattr(m, "w") and "b" not in m.state_dict()
            m.w = nn.Parameter(torch.full((2,), 7.0))
            m.v = None

        model, state, _ = self.probe(forward)
        assert torch.equal(model.new, torch.full((2,), 2.0)) and torch.equal(model.more, torch.full((2,), 4.0))
        assert torch.equal(model.w, torch.zeros(2)) and torch.equal(model.b, torch.zeros(2))
        assert torch.equal(state["w"], torch.full((2,), 7.0)) and torch.equal(state["b"], torch.full((2,), 3.0))
        assert model.v is None and isinstance(model.w, nn.Parameter)

    def test_buffers_of_outer_calls(self):
        """What an inner call does not replace is the outer one's, for writing too."""

        def forward(m):
            if m.w[0] == 1:
                functional_call(m, {"w": torch.full((2,), 2.0)}, ())
                assert m.b[0] == 4 and m.w[0] == 1
            else:
                m.b = m.b + 1

        model, state, _ = self.probe(forward)
        assert state["b"][0] == 4 and model.b[0] == 0

    def test_plain_attributes_that_forward_sets_stay(self):
        def forward(m):
            m.last = m.w * 2

        model, _, _ = self.probe(forward)
        assert torch.equal(model.last, torch.full((2,), 2.0))

    def test_checkpoint_and_autograd_function(self):
        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, v):
                ctx.save_for_backward(v)
                return v * v

            @staticmethod
            def backward(ctx, g):
                return 2 * g * ctx.saved_tensors[0]

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 3)

            def forward(self, x):
                y = checkpoint(lambda v: Square.apply(self.layer(v)), x, use_reentrant=False).sum()
                return torch.autograd.grad(y, x)[0]

        model, x = Model(), torch.randn(3, requires_grad=True)
        state = state_of(model)
        w, b = state["layer.weight"], state["layer.bias"]
        want = 2 * w.T @ (w @ x.detach() + b)
        torch.testing.assert_close(functional_call(model, state, x), want)
        run_all(always(lambda: functional_call(model, state, x)), always(lambda: model(x)), repeats=30)

    def test_threads_that_forward_starts_see_the_modules_own(self):
        class Starter(nn.Module):
            def __init__(self):
                super().__init__()
                self.w = nn.Parameter(torch.zeros(2))

            def forward(self):
                seen = []
                thread = threading.Thread(target=lambda: seen.append(self.w))
                thread.start()
                thread.join()
                return seen[0], self.w

        model, given = Starter(), torch.ones(2)
        seen, here = functional_call(model, {"w": given}, ())
        assert seen is model.w and here is given

    def test_threads_of_autograd_see_what_their_caller_sees(self):
        """libtorch hands the objects below to the threads of a device; here a thread takes them over by hand."""

        class Starter(nn.Module):
            def __init__(self):
                super().__init__()
                self.w, self.other = nn.Parameter(torch.zeros(2)), nn.Linear(1, 1, bias=False)

            def forward(self):
                key, seen = "functional_call", []
                taken = torch._C._get_obj_in_tls(key)

                def work(nested):
                    torch._C._stash_obj_in_tls(key, taken)
                    seen.append(self.w)
                    if nested:
                        functional_call(self.other, {"weight": torch.ones(1, 1)}, torch.ones(1))
                        functional_call(Call(lambda: work(False)), {}, ())
                        functional_call(self, {"w": inner}, (), {"n": 1})
                        seen.append(self.w)

                thread = threading.Thread(target=work, args=(True,))
                thread.start()
                thread.join()
                return seen

        class Call(nn.Module):
            def __init__(self, f):
                super().__init__()
                self.f = f

            def forward(self):
                return self.f()

        inner_seen = []
        inner, given = torch.full((2,), 2.0), torch.ones(2)
        outer_forward = Starter.forward
        Starter.forward = lambda m, n=0: inner_seen.append(m.w) if n else outer_forward(m)
        model = Starter()
        seen = functional_call(model, {"w": given}, ())
        assert len(seen) == 3 and all(w is given for w in seen) and inner_seen[0] is inner
        assert not torch._C._is_key_in_tls("functional_call")

    def test_compiled_modules(self):
        model, x = net().eval(), torch.randn(5, 3)
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            want = compiled(x)
            states = [state_of(model) for _ in range(2)]
            for state in states:
                named = {f"_orig_mod.{k}": v for k, v in state.items()}
                torch.testing.assert_close(functional_call(compiled, named, x), functional_call(model, state, x))
            assert torch.equal(compiled(x), want)
