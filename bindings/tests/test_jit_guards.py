"""The short way from a call of a jit function to its graph: what it must not mistake for the same call."""

from __future__ import annotations

import math
import threading

import pytest
import torch

import torchlift


def scaled(x, factor=2.0):
    return x * factor


def test_calls_of_one_signature_are_hits():
    f = torchlift.jit(scaled)
    x = torch.arange(3.0)
    for n in range(5):
        assert f(x).equal(2 * x)
        info = f.cache_info()
        assert (info.misses, info.hits, info.size) == (1, n, 1)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(4),
        torch.ones(3, dtype=torch.float64),
        torch.ones(6)[::2],
        torch.ones(3, 1),
        torch.ones(()),
        torch.ones(3, device="meta"),
    ],
    ids=["shape", "dtype", "strides", "dims", "number", "device"],
)
def test_another_tensor_is_traced(other):
    f = torchlift.jit(scaled)
    for _ in range(3):
        f(torch.ones(3))
    expected = scaled(other)
    got = f(other)
    assert (got.shape, got.dtype, got.device) == (expected.shape, expected.dtype, expected.device)
    assert f.cache_info().misses == 2


@pytest.mark.parametrize(
    "a, b",
    [
        (1, 1.0),
        (1, True),
        (0.0, -0.0),
        (complex(0.0, 1.0), complex(-0.0, 1.0)),
        ("a", "b"),
        (None, 0),
        ((1.0,), [1.0]),
        ({"a": 1.0}, {"b": 1.0}),
        ({"a": 1.0}, {"a": 1.0, "b": 2.0}),
        ((1.0, 2.0), (1.0,)),
        (torch.ones(3), 1.0),
        (1.0, torch.ones(3)),
    ],
)
def test_other_values_and_structures_are_traced(a, b):
    f = torchlift.jit(lambda x, extra: (x + 1, extra))
    x = torch.zeros(3)
    for extra in (a, a, b, b, a):
        _, got = f(x, extra)
        assert type(got) is type(extra) and repr(got) == repr(extra)
    assert f.cache_info().misses == 2 and f.cache_info().hits == 3


def test_minus_zero_is_not_zero():
    f = torchlift.jit(lambda x, zero: x / zero)
    x = torch.ones(2)
    assert f(x, 0.0).equal(torch.full((2,), math.inf))
    assert f(x, -0.0).equal(torch.full((2,), -math.inf))
    assert f(x, 0.0).equal(torch.full((2,), math.inf))


def test_nan_is_the_same_number():
    f = torchlift.jit(lambda x, number: x + number)
    for _ in range(3):
        assert f(torch.ones(2), float("nan")).isnan().all()
    assert f.cache_info().misses == 1


def test_keys_of_a_dict_in_another_order():
    f = torchlift.jit(lambda d: d["a"] - d["b"])
    a, b = torch.ones(2), torch.full((2,), 3.0)
    for _ in range(2):
        assert f({"a": a, "b": b}).equal(a - b)
        assert f({"b": b, "a": a}).equal(a - b)


def test_one_tensor_twice():
    f = torchlift.jit(lambda x, y: x - 2 * y)
    x, y = torch.ones(2), torch.full((2,), 3.0)
    for _ in range(2):
        assert f(x, x).equal(-x)
        assert f(x, y).equal(x - 2 * y)
        assert f(y, x).equal(y - 2 * x)


def test_what_a_guard_does_not_see_goes_the_long_way():
    f = torchlift.jit(lambda x: x.sin())
    x = torch.ones(2)
    for _ in range(2):
        f(x)
    tracked = torch.ones(2, requires_grad=True)
    assert f(tracked).requires_grad
    with torch.no_grad():
        assert not f(tracked).requires_grad
    assert torchlift.vmap(f)(torch.ones(3, 2)).equal(torch.ones(3, 2).sin())
    assert torchlift.grad(lambda t: f(t).sum())(x).equal(x.cos())
    assert torchlift.jvp(f, (x,), (x,))[1].equal(x.cos())
    with torch.autocast("cpu"):
        assert torchlift.jit(lambda a: a @ a)(torch.ones(2, 2)).dtype == torch.bfloat16


def test_autocast_switched_on_later():
    f = torchlift.jit(lambda a: a @ a)
    a = torch.ones(2, 2)
    for _ in range(2):
        assert f(a).dtype == torch.float32
        with torch.autocast("cpu"):
            assert f(a).dtype == torch.bfloat16


def test_grad_mode_switched():
    f = torchlift.jit(lambda x: torch.tensor(float(torch.is_grad_enabled())) + x)
    x = torch.zeros(())
    for _ in range(3):
        assert f(x) == 1
        with torch.no_grad():
            assert f(x) == 0


def test_numbers_that_a_graph_assumes():
    """One graph has a guard, which steps aside where a number is another one; several have none."""
    kept = lambda m: m.nonzero().sum() + m.sum()
    f = torchlift.jit(kept)
    a, b = torch.tensor([True, False, True]), torch.tensor([False, False, True])
    for _ in range(4):
        assert f(a) == kept(a)
    assert (f.cache_info().hits, f.cache_info().misses) == (3, 1)
    for m in (b, a, b, b, ~b, a):
        assert f(m) == kept(m)
    assert (f.cache_info().hits, f.cache_info().misses) == (8, 2)


def test_graphs_used_by_guards_stay_in_the_cache():
    f = torchlift.jit(scaled, cache_size=2)
    a, b, c = torch.ones(1), torch.ones(2), torch.ones(3)
    f(a)
    f(b)
    for _ in range(3):
        f(a)  # used last, by its guard
    f(c)  # drops b
    misses = f.cache_info().misses
    f(a)
    assert f.cache_info().misses == misses
    f(b)
    assert f.cache_info().misses == misses + 1
    assert f.cache_info().evicted == 2


def test_clear_forgets_guards():
    f = torchlift.jit(scaled)
    x = torch.ones(2)
    for _ in range(3):
        f(x)
    f.cache_clear()
    f(x)
    assert f.cache_info().misses == 2 and f.cache_info().hits == 2


def test_more_signatures_than_guards():
    f = torchlift.jit(scaled)
    xs = [torch.ones(n) for n in range(1, 12)]
    for _ in range(3):
        for x in xs:
            assert f(x).equal(2 * x)
    assert f.cache_info().misses == 11 and f.cache_info().hits == 22


def test_trees_of_arguments_and_results():
    f = torchlift.jit(lambda tree, n: {"out": [tree["w"] @ tree["x"][0], tree["x"][1] * n], "n": n})
    tree = {"w": torch.randn(2, 3), "x": (torch.randn(3), torch.randn(4))}
    for _ in range(3):
        got = f(tree, 3)
        assert got["n"] == 3 and got["out"][0].allclose(tree["w"] @ tree["x"][0])
        assert got["out"][1].equal(tree["x"][1] * 3)


def test_threads_share_guards():
    f = torchlift.jit(lambda x, y: (x * y).sum())
    wrong = []

    def work(seed):
        g = torch.Generator().manual_seed(seed)
        for n in range(200):
            x, y = torch.randn(1 + n % 3, generator=g), torch.randn(1 + n % 3, generator=g)
            if not f(x, y).allclose((x * y).sum()):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    info = f.cache_info()
    assert info.hits + info.misses == 800


# --- modules ---------------------------------------------------------------------------------------


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(3, 3)
        self.second = torch.nn.Linear(3, 3, bias=False)
        self.norm = torch.nn.BatchNorm1d(3)
        self.drop = torch.nn.Dropout(0.5)
        self.register_buffer("shift", torch.ones(3))
        self.register_buffer("nothing", None)

    def forward(self, x):
        x = self.drop(self.norm(self.second(self.first(x).sin()))) + self.shift
        return x if self.nothing is None else x + self.nothing


def frozen(module):
    return module.eval().requires_grad_(False)


def test_a_module_is_seen_as_it_is_now():
    model = frozen(Net())
    f, x = torchlift.jit(model), torch.randn(4, 3)

    def check(misses):
        for _ in range(2):
            torch.testing.assert_close(f(x), model(x))
        assert f.cache_info().misses == misses

    check(1)
    model.first.weight.add_(1)  # another value of the same tensor
    check(1)
    model.first.weight = torch.nn.Parameter(torch.randn(3, 3), requires_grad=False)  # another tensor
    check(1)
    model.shift = torch.randn(3)
    check(1)
    model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()})
    check(1)
    model.nothing = torch.ones(3)
    check(2)
    model.nothing = None
    check(2)
    model.second = torch.nn.Linear(3, 3, bias=True).requires_grad_(False)
    check(3)
    model.shift = torch.ones(1)
    check(4)
    model.double()
    x = x.double()
    check(5)


def test_parts_of_a_module_in_training():
    model = frozen(Net())
    f, x = torchlift.jit(model), torch.randn(4, 3)
    for _ in range(2):
        assert f(x).equal(f(x))
    model.drop.train()
    assert not f(x).equal(f(x))
    model.drop.eval()
    assert f(x).equal(f(x))


def test_a_module_that_is_trained_goes_the_long_way():
    model = Net().eval()
    f, x = torchlift.jit(model), torch.randn(4, 3)
    with torch.no_grad():
        for _ in range(2):
            assert not f(x).requires_grad
    assert f(x).requires_grad
    frozen(model)
    assert not f(x).requires_grad and not f(x).requires_grad
    model.second.weight.requires_grad_(True)
    assert f(x).requires_grad


def test_tied_weights_that_are_parted():
    model = frozen(Net())
    model.second.weight = model.first.weight
    f, x = torchlift.jit(model), torch.randn(4, 3)
    for _ in range(3):
        torch.testing.assert_close(f(x), model(x))
    model.second.weight = torch.nn.Parameter(torch.randn(3, 3), requires_grad=False)
    for _ in range(3):
        torch.testing.assert_close(f(x), model(x))


def test_a_submodule_that_is_replaced_or_shared():
    model = frozen(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)))
    f, x = torchlift.jit(model), torch.randn(4, 3)
    for _ in range(3):
        torch.testing.assert_close(f(x), model(x))
    model[2] = torch.nn.Linear(3, 5).requires_grad_(False)
    for _ in range(3):
        torch.testing.assert_close(f(x), model(x))
    model[2] = model[0]
    for _ in range(3):
        torch.testing.assert_close(f(x), model(x))
    model.append(torch.nn.Tanh())
    for _ in range(3):
        torch.testing.assert_close(f(x), model(x))


def test_after_a_functional_call_of_the_module():
    model = frozen(Net())
    f, x = torchlift.jit(model), torch.randn(4, 3)
    expected = f(x)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    for _ in range(2):
        assert not torchlift.functional_call(model, state, (x,)).equal(expected)
        assert f(x).equal(expected)
