"""Traces of operators whose result has a shape that depends on numbers: a graph is right for the numbers of elements
that it was traced with, and raises for others; jit traces anew."""

import random

import pytest
import torch
from torch.testing import assert_close

import torchlift
import torchlift.compile
from torchlift import AssumptionError, ShapeDtype, UnsupportedError, grad, jit, make_fx, trace, vmap
from torchlift._jit import _MAX_GRAPHS_OF_NUMBERS

INF = float("inf")


class Runs:
    """All ways to run the graph of f: as it is traced, optimized, by fx, and from a file."""

    def __init__(self, f, args, tmp_path):
        path = str(tmp_path / "f.tlc")
        torchlift.save(f, path, *args)
        traced = trace(f)(*args)
        traced.graph.verify()
        self.ways = {
            "traced": traced,
            "optimized": lambda *a: traced.rebuild(traced.optimized().run(list(a))),
            "fx": make_fx(f)(*args),
            "loaded": torchlift.load(path),
        }

    def check(self, f, *args):
        expected = f(*args)
        for name, run in self.ways.items():
            assert_close(run(*args), expected, msg=lambda text, name=name: f"{name}: {text}")

    def raise_(self, message, *args):
        for name, run in self.ways.items():
            with pytest.raises(RuntimeError if name == "fx" else AssumptionError, match=message):
                run(*args)
                pytest.fail(f"{name}: no error")


def column(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def moved(x):
    """The same places are above and below zero, equal values stay equal."""
    return x * 2 + x.sign()


# f, arguments, other arguments with the same number of elements, arguments with another number, the name in the error
CASES = {
    "masked_select": (
        lambda x: torch.masked_select(x, x > 0).sin(),
        [column(1, -1, 2, 3, -4)],
        [column(-1, 1, -2, 3, 4)],
        [column(1, -1, -2, 3, -4)],
        "masked_select",
    ),
    "masked_select of broadcast tensors": (
        lambda x, mask: torch.masked_select(x[:, None], mask > 0) * 2,
        [column(1, 2, 3), column(1, -1)],
        [column(4, 5, 6), column(-1, 2)],
        [column(1, 2, 3), column(1, 1)],
        "masked_select",
    ),
    "mask": (
        lambda x: x[x > 0].cumsum(0),
        [column(1, -1, 2, 3, -4)],
        [column(-1, 1, -2, 3, 4)],
        [column(1, 1, 2, 3, -4)],
        "index",
    ),
    "mask of rows": (
        lambda x, m: x[m > 0] @ x.T,
        [torch.arange(12.0, dtype=torch.float64).view(4, 3), column(1, -1, 1, -1)],
        [torch.arange(12.0, dtype=torch.float64).view(4, 3) + 1, column(-1, -1, 1, 1)],
        [torch.arange(12.0, dtype=torch.float64).view(4, 3), column(1, -1, -1, -1)],
        "index",
    ),
    "mask of planes between others": (
        lambda x, m, i: x[:, m > 0, i.long()],
        [torch.arange(48.0, dtype=torch.float64).view(2, 2, 3, 4), column(*[[1, -1, 1], [-1, -1, 1]]), column(1)],
        [torch.arange(48.0, dtype=torch.float64).view(2, 2, 3, 4), column(*[[1, 1, 1], [-1, -1, -1]]), column(2)],
        [torch.arange(48.0, dtype=torch.float64).view(2, 2, 3, 4), column(*[[1, 1, 1], [-1, 1, -1]]), column(2)],
        "index",
    ),
    "mask of bytes": (
        lambda x, m: x[m.byte()] * 2,
        [column(1, 2, 3), column(0, 2, 5)],
        [column(1, 2, 4), column(1, 0, 7)],
        [column(1, 2, 3), column(0, 0, 7)],
        "index",
    ),
    "nothing": (
        lambda x: x[x > 9] + torch.masked_select(x, x > 9) + x[torch.nonzero(x > 9)[:, 0]],
        [column(1, 2, 3)],
        [column(-1, 2, -3)],
        [column(1, 2, 30)],
        "index",
    ),
    "nonzero": (
        lambda x: torch.nonzero(x),
        [column(*[[1, 0, 2], [0, 0, 3]])],
        [column(*[[0, 0, 2], [0, 1, 3]])],
        [column(*[[1, 1, 2], [0, 0, 3]])],
        "nonzero",
    ),
    "nonzero as a tuple": (
        lambda x: torch.nonzero(x, as_tuple=True),
        [column(*[[1, 0, 2], [0, 0, 3]])],
        [column(*[[0, 0, 2], [0, 1, 3]])],
        [column(*[[1, 1, 2], [0, 0, 3]])],
        "nonzero",
    ),
    "argwhere": (
        lambda x: torch.argwhere(x > 1),
        [column(1, 2, 3)],
        [column(4, 2, 1)],
        [column(1, 1, 3)],
        "nonzero",
    ),
    "where": (
        lambda x: torch.where(x > 1)[0] * 2,
        [column(1, 2, 3)],
        [column(4, 2, 1)],
        [column(1, 1, 3)],
        "nonzero",
    ),
    "unique": (
        lambda x: torch.unique(x),
        [column(3, 1, 2, 1, 3)],
        [column(5, 5, 2, 2, 1)],
        [column(5, 5, 2, 2, 2)],
        "_unique2",
    ),
    "unique with inverse and counts": (
        lambda x: torch.unique(x, return_inverse=True, return_counts=True),
        [column(*[[3, 1, 2], [1, 3, INF]])],
        [column(*[[7, 7, 7], [2, -INF, 0]])],
        [column(*[[7, 7, 7], [2, 2, 0]])],
        "_unique2",
    ),
    "unique with counts": (
        lambda x: torch.unique(x, sorted=False, return_counts=True),
        [column(3, 1, 2, 1, 3)],
        [column(5, 5, 2, 2, 1)],
        [column(5, 5, 2, 2, 2)],
        "_unique2",
    ),
    "unique of bools": (
        lambda x: torch.unique(x > 0, return_inverse=True),
        [column(3, -1, 2)],
        [column(-3, 1, 2)],
        [column(3, 1, 2)],
        "_unique2",
    ),
    "unique of rows": (
        lambda x: torch.unique(x, dim=0, return_inverse=True, return_counts=True),
        [column(*[[3, 1], [1, 2], [3, 1], [0, 5]])],
        [column(*[[3, 1], [3, 1], [1, 2], [0, 9]])],
        [column(*[[3, 1], [3, 1], [3, 1], [0, 9]])],
        "unique_dim",
    ),
    "unique of columns": (
        lambda x: torch.unique(x, dim=1),
        [column(*[[3, 1], [1, 2], [3, 1], [0, 5]])],
        [column(*[[3, 1], [3, 1], [1, 2], [0, 9]])],
        [column(*[[3, 3], [3, 3], [3, 3], [0, 0]])],
        "unique_dim",
    ),
    "unique_consecutive": (
        lambda x: torch.unique_consecutive(x, return_inverse=True, return_counts=True),
        [column(3, 3, 1, 3, 3)],
        [column(2, 4, 4, 4, 1)],
        [column(2, 4, 4, 4, 4)],
        "unique_consecutive",
    ),
    "unique_consecutive of rows": (
        lambda x: torch.unique_consecutive(x, return_inverse=True, return_counts=True, dim=0),
        [column(*[[3, 1], [3, 1], [0, 5]])],
        [column(*[[3, 1], [0, 1], [0, 1]])],
        [column(*[[3, 1], [0, 1], [1, 1]])],
        "unique_consecutive",
    ),
    "bincount": (
        lambda x: torch.bincount(x.long()),
        [column(1, 0, 3)],
        [column(3, 3, 2)],
        [column(3, 3, 4)],
        "bincount",
    ),
    "bincount with weights": (
        lambda x, w: torch.bincount(x.long(), w, minlength=3),
        [column(1, 0, 2), column(1, 2, 3)],
        [column(0, 0, 1), column(4, 2, 3)],
        [column(0, 0, 3), column(4, 2, 3)],
        "bincount",
    ),
    "one_hot": (
        lambda x: torch.nn.functional.one_hot(x.long()),
        [column(1, 0, 3)],
        [column(3, 3, 2)],
        [column(3, 3, 4)],
        "one_hot",
    ),
    "repeat_interleave": (
        lambda x, n: torch.repeat_interleave(x, n.long()),
        [column(1, 2, 3), column(1, 0, 3)],
        [column(4, 5, 6), column(2, 2, 0)],
        [column(4, 5, 6), column(2, 2, 1)],
        "repeat_interleave",
    ),
    "tensor_split": (
        lambda x, where: torch.tensor_split(x * 2, where.long()),
        [torch.arange(6.0), column(1, 4)],
        [torch.arange(6.0) + 1, column(1, 4)],
        [torch.arange(6.0), column(2, 4)],
        "tensor_split",
    ),
    "tensor_split into so many": (
        lambda x, n: torch.tensor_split(x * 2, n.sum().long()),
        [torch.arange(6.0), column(1, 2)],
        [torch.arange(6.0) + 1, column(2, 1)],
        [torch.arange(6.0), column(2, 2)],
        "tensor_split",
    ),
}


def same(a, b):
    assert_close(a, b)
    for x, y in zip(*(torch.utils._pytree.tree_leaves(each) for each in (a, b))):
        assert x.dtype == y.dtype
        assert all(n < 2 or i == j for n, i, j in zip(x.shape, x.stride(), y.stride()))


@pytest.mark.parametrize("name", CASES)
def test_graphs_are_for_as_many_elements(name, tmp_path):
    f, args, alike, others, op = CASES[name]
    runs = Runs(f, args, tmp_path)
    for given in (args, alike, args):
        runs.check(f, *given)
    same(trace(f)(*args)(*alike), f(*alike))
    runs.raise_(rf"{op}: .* was .* when the function was traced, and is .* in this run", *others)
    with pytest.raises(AssumptionError, match=r"torchlift\.jit traces the function anew"):
        trace(f)(*args)(*others)
    runs.check(f, *alike)
    with pytest.raises(UnsupportedError, match="the shape of its result depends on numbers|depends on numbers"):
        trace(f)(*[ShapeDtype(a.shape, a.dtype) for a in args])


@pytest.mark.parametrize("name", CASES)
def test_jit_has_a_graph_for_each_number(name):
    f, args, alike, others, op = CASES[name]
    jitted = jit(f)
    for given in (args, alike, others, args, others, alike, others):
        same(jitted(*given), f(*given))
    info = jitted.cache_info()
    assert (info.misses, info.hits, info.direct, info.size) == (2, 5, 0, 2)
    assert jitted.explain()[0] == "the first call"
    assert op in jitted.explain()[1] and "was" in jitted.explain()[1] and "in this run" in jitted.explain()[1]
    assert len(jitted.graphs()) == 2


# --- derivatives and vmap --------------------------------------------------------------------------


def weighted(f):
    def loss(*args):
        found = f(*args)
        return (found * (1 + torch.arange(found.numel(), dtype=found.dtype).view(found.shape))).sum()

    return loss


@pytest.mark.parametrize("name", [
    "masked_select", "masked_select of broadcast tensors", "mask", "mask of rows", "mask of bytes", "nothing",
    "repeat_interleave",
])  # fmt: skip
def test_gradients(name, tmp_path):
    f, args, alike, others, op = CASES[name]
    derivative = grad(weighted(f))
    runs = Runs(derivative, args, tmp_path)
    runs.check(derivative, *alike)
    runs.raise_(op, *others)
    jitted = jit(derivative)
    for given in (args, alike, others, args):
        leaf = given[0].clone().requires_grad_()
        assert_close(jitted(*given), torch.autograd.grad(weighted(f)(leaf, *given[1:]), leaf)[0])
    assert jitted.cache_info().misses == 2


def test_a_mask_that_all_examples_share(tmp_path):
    def f(x, mask):
        return x[mask > 0].sin()

    x, mask = torch.randn(3, 4, dtype=torch.float64), column(1, -1, 1, -1)
    derivative = grad(lambda x, mask: f(x, mask).sum())
    for g in (vmap(f, (0, None)), vmap(derivative, (0, None))):
        runs = Runs(g, [x, mask], tmp_path)
        runs.check(g, x + 1, mask.flip(0))
        runs.raise_("number of elements that", x, mask.abs())
        jitted = jit(g)
        for m in (mask, mask.abs(), mask.flip(0), -mask.abs()):
            assert_close(jitted(x, m), g(x, m))
        assert jitted.cache_info().misses == 3


@pytest.mark.parametrize("f", [
    lambda x: torch.bincount(x), lambda x: torch.nn.functional.one_hot(x),
    lambda x: torch.cat([part.sum()[None] for part in torch.tensor_split(x.float(), x)]),
])  # fmt: skip
def test_counts_that_all_examples_share(f, tmp_path):
    x, alike, others = torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 2], [1, 2]]), torch.tensor([[1, 3], [1, 3]])
    runs = Runs(vmap(f), [x], tmp_path)
    runs.check(vmap(f), alike)
    runs.raise_("was .* when the function was traced, and is", others)
    runs.raise_("was .* when the function was traced, and is", torch.tensor([[1, 2], [1, 3]]))
    nested = vmap(vmap(f))
    Runs(nested, [torch.stack([x, x])], tmp_path).check(nested, torch.stack([alike, alike]))
    jitted = jit(vmap(f))
    for each in (x, others, alike):
        assert_close(jitted(each), vmap(f)(each))
    with pytest.raises(UnsupportedError, match="differ"):
        jitted(torch.tensor([[1, 2], [1, 3]]))


def test_a_traced_function_under_vmap_and_in_a_trace():
    traced = trace(lambda x: x[x > 0])(column(1, -1, 2))
    again = trace(lambda x: traced(x) * 2)(column(1, -1, 2))
    assert_close(again(column(3, 4, -1)), column(6, 8))
    with pytest.raises(AssumptionError, match="was 2 .* is 3"):
        again(column(1, 2, 3))
    assert len(again.graph.answers()) == 1
    assert_close(vmap(traced)(torch.stack([column(1, -1, 2), column(-1, 5, 2)])), torch.tensor([[1, 2], [5, 2]]).double())
    with pytest.raises(AssumptionError, match="was 2"):
        vmap(traced)(torch.stack([column(1, -1, 2), column(1, 5, 2)]))
    assert_close(grad(lambda x: traced(x).prod())(column(3, -1, 2)), column(2, 0, 3))


@pytest.mark.parametrize("features", [3, 200_000])  # state of more than 1 MB is written in place
def test_a_run_that_fails_leaves_running_statistics(features):
    norm = torch.nn.BatchNorm1d(features, dtype=torch.float64)

    def f(x):
        y = norm(x)
        return y[x[:, 0] > 0].sum(1)

    def batch(*firsts):
        x = torch.rand(len(firsts), features, dtype=torch.float64)
        x[:, 0] = torch.tensor(firsts)
        return x

    traced = trace(f)(batch(1.0, -1.0, 2.0))
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    with pytest.raises(AssumptionError, match="was 2 .* is 3"):
        traced(batch(1.0, 1.0, 2.0))
    assert_close(norm.state_dict(), before)
    traced(batch(-1.0, 1.0, 2.0))
    assert norm.num_batches_tracked == before["num_batches_tracked"] + 1


def test_assumed_answers_have_a_graph_each():
    def f(x, w):
        return torch.cov(x, correction=3, fweights=w)

    x, few, many = torch.randn(3, 2), torch.tensor([1, 1]), torch.tensor([3, 2])
    jitted = jit(f)
    for w in (many, few, many, few, many):
        assert_close(jitted(x, w), f(x, w), equal_nan=True)
    assert jitted.cache_info().misses == 2
    assert "cov: the weights are of another kind" in jitted.explain()[1]


# --- what jit does with runs that fail -------------------------------------------------------------


def test_a_random_sequence_of_numbers():
    def f(x, y):
        chosen = x[x > 0]
        return chosen.sum() + y[y > chosen.numel()].cos().sum(), torch.unique(y).numel() * x

    jitted = jit(f)
    random.seed(0)
    for _ in range(99):
        x = column(*[random.choice([-1, 1]) for _ in range(4)])
        y = column(*[random.choice([1, 2, 3, 4]) for _ in range(4)])
        assert_close(jitted(x, y), f(x, y))
    info = jitted.cache_info()
    assert info.misses == _MAX_GRAPHS_OF_NUMBERS == info.size and info.hits > 0 and info.direct > 0
    assert info.hits + info.misses + info.direct == 99


def test_the_numbers_that_a_failed_run_finds_choose_the_next_graph():
    jitted = jit(lambda x: x[x > 0])
    for count in range(8):
        jitted(column(*[1] * count, *[-1] * (7 - count)))
    tried = []
    for program in jitted._cache.values():
        program.run = lambda tensors, run=program.run, program=program: (tried.append(program.answers), run(tensors))[1]
    jitted(column(*[1] * 3, *[-1] * 4))
    assert tried == [((7,),), ((3,),)]


def test_the_cache_is_bounded():
    jitted = jit(lambda x: x[x > 0], cache_size=2)
    for count in (1, 2, 3, 1, 3, 2, 2):
        x = column(*[1] * count, *[-1] * (4 - count))
        assert_close(jitted(x), x[x > 0])
    info = jitted.cache_info()
    assert info.size == 2 and info.evicted == info.misses - 2 == 3 and info.direct == 0
    jitted.cache_clear()
    jitted(column(1, -1, 1, 1))
    assert jitted.cache_info().size == 1


def test_arguments_are_not_half_written():
    def f(x, counts):
        x.add_(1)
        chosen = x[x > 0]
        counts.add_(chosen.numel())
        return chosen * 2

    jitted = jit(f)
    traced = trace(f)(column(1, -2, 3), column(0))
    for values in ((1, -2, 3), (1, 2, 3), (-5, -5, -5), (1, -2, 3), (4, 2, 3)):
        x, counts, y, others = column(*values), column(0), column(*values), column(0)
        assert_close((jitted(x, counts), x, counts), (f(y, others), y, others))
    assert jitted.cache_info().misses == 3
    x, counts = column(1, 2, 3), column(0)
    with pytest.raises(AssumptionError):
        traced(x, counts)
    assert x.tolist() == [1, 2, 3] and counts.tolist() == [0]


def test_failed_runs_draw_no_random_numbers():
    def f(x):
        noise = torch.randn_like(x)
        return x[x > 0] + torch.rand(()), noise

    jitted = jit(f)
    jitted(column(1, -1, 1))
    for values in ((1, 1, 1), (1, -1, 1), (-1, -1, -1), (1, 1, 1)):
        x = column(*values)
        torch.manual_seed(3)
        expected = f(x)
        after = torch.rand(3)
        torch.manual_seed(3)
        assert_close(jitted(x), expected)
        assert_close(torch.rand(3), after)
    assert jitted.cache_info().misses == 3


def test_a_mask_of_random_numbers():
    def f(x):
        return x[torch.rand_like(x) > 0.5] * 2

    jitted = jit(f)
    x = torch.randn(4)
    for seed in range(20):
        torch.manual_seed(seed)
        expected = f(x)
        torch.manual_seed(seed)
        assert_close(jitted(x), expected)


def test_a_number_that_changes_within_a_loop():
    def f(x):
        def step(i, total):
            return total + torch.bincount((x[:1] + i).long().clamp(max=5)).numel()

        return torchlift.fori_loop(0, x.sum().long() * 0 + 3, step, torch.zeros((), dtype=torch.int64))

    jitted = jit(f)
    for _ in range(3):
        assert jitted(column(1, 2)) == f(column(1, 2))
    info = jitted.cache_info()
    assert (info.misses, info.direct, info.size) == (0, 3, 0)
    with pytest.raises(AssumptionError, match="was 2 .* is 3"):
        trace(f)(column(1, 2))


def test_numbers_in_branches():
    def f(x):
        return torchlift.cond(x.sum() > 0, lambda x: x[x > 0].sum(), lambda x: torch.unique(x).prod(), x)

    traced = trace(f)(column(1, 2, -1))
    assert_close(traced(column(5, 5, -1)), column(10)[0])
    assert_close(traced(column(-5, -4, -1)), column(-20)[0])
    for x in (column(5, 5, 1), column(-5, -5, -5)):
        with pytest.raises(AssumptionError):
            traced(x)
    jitted = jit(f)
    for values in ((1, 2, -1), (5, 5, 1), (-5, -5, -5), (-1, -2, -3), (1, 2, -1), (5, 5, 1)):
        assert_close(jitted(column(*values)), f(column(*values)))
    assert jitted.cache_info().direct == 0


def test_a_shape_that_nobody_reads_but_the_number():
    def f(x):
        return x / x[x > 0].numel()

    traced = trace(f)(column(1, -1, 2))
    for run in (traced, lambda x: traced.rebuild(traced.optimized().run([x])), make_fx(f)(column(1, -1, 2))):
        assert_close(run(column(-1, 4, 2)), column(-0.5, 2, 1))
        with pytest.raises(RuntimeError, match="was 2 when the function was traced"):
            run(column(1, 4, 2))


def test_dynamic_dims_are_refused():
    with pytest.raises(UnsupportedError, match="dynamic dims"):
        trace(lambda x: x[x > 0], dynamic={0: {0: "n"}})(column(1, -1, 2))


def test_modules_and_loaded_files(tmp_path):
    class Positive(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.weight = torch.nn.Parameter(torch.ones(3))

        def forward(self, x):
            self.calls.add_(1)
            return (x * self.weight)[x > 0].sum()

    jitted = jit(Positive())
    with torch.no_grad():
        for i, values in enumerate(((1, -1, 1), (1, 1, 1), (-1, -1, 1), (1, 1, -1))):
            assert jitted(torch.tensor(values).float()) == sum(v for v in values if v > 0)
            assert jitted._func.calls == i + 1
    assert jitted.cache_info().misses == 3


@pytest.mark.parametrize("name", ["mask", "masked_select", "nonzero", "unique", "bincount", "one_hot", "tensor_split"])
def test_inductor(name):
    f, args, alike, others, _ = CASES[name]
    jitted = jit(f, backend="inductor")
    for given in (args, alike, others, args):
        assert_close(jitted(*given), f(*given))
    assert jitted.cache_info().misses == 2


@pytest.mark.parametrize("partition", ["default_partition", "min_cut_rematerialization_partition"])
def test_forward_and_backward_passes_check(partition):
    compile = torchlift.compile
    f = compile.aot_function(
        lambda x: x[x > 0].sin().sum(), compile.nop, partition_fn=getattr(compile, partition)
    )
    for values in ((1, -1, 2), (-1, 4, 2)):
        x = column(*values).requires_grad_()
        f(x).backward()
        assert_close(x.grad, torch.where(x > 0, x.cos(), 0).detach())
    with pytest.raises(RuntimeError, match="was 2 when the function was traced"):
        f(column(1, 2, 3).requires_grad_())


def test_a_check_that_depends_on_tangents():
    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x * 1

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, grad):
            return grad.abs() * grad[grad > 0].sum()

    # It is traced with cotangents of zeros, of which none is chosen.
    f = torchlift.compile.aot_function(lambda x: Backward.apply(x), torchlift.compile.nop)
    x = column(1, 2, 3).requires_grad_()
    f(x).backward(column(-1, -2, -1))
    assert_close(x.grad, column(0, 0, 0))
    with pytest.raises(RuntimeError, match="was 0 when the function was traced"):
        f(x).backward(column(1, -1, 2))


def test_torchscript_which_drops_checks_is_refused():
    with pytest.raises(UnsupportedError, match="TorchScript drops the check"):
        jit(lambda x: x[x > 0], backend="ts")(column(1, -1))
    table = torch._decomp.get_decompositions([torch.ops.aten.sin])
    for decompositions in (None, table):
        f = torchlift.compile.aot_function(
            lambda x: x[x > 0].sin(), torchlift.compile.ts_compile, decompositions=decompositions
        )
        with pytest.raises(UnsupportedError, match="TorchScript drops the check"):
            f(column(1, -1))
    with torchlift.compile.pythonkey_decompose(table), pytest.raises(UnsupportedError, match="TorchScript drops"):
        torchlift.compile.ts_compile(make_fx(lambda x: x[x > 0].sin())(column(1, -1)), [column(1, -1)])


def test_export_checks():
    module = torchlift.compile.export(lambda x: x[x > 0] * 2)(column(1, -1, 2)).module()
    assert_close(module(column(-1, 5, 6)), column(10, 12))
    with pytest.raises(RuntimeError, match="was 2 when the function was traced"):
        module(column(1, 5, 6))


def test_files_with_machine_code_check(tmp_path):
    path = str(tmp_path / "f.tlc")
    torchlift.save(lambda x: x[x > 0] * 2, path, column(1, -1, 2), backend="inductor")
    loaded = torchlift.load(path, allow_native_code=True)
    assert loaded.backend == "inductor"
    assert_close(loaded(column(-1, 5, 6)), column(10, 12))
    with pytest.raises(AssumptionError, match="was 2 when the function was traced, and is 3 in this run"):
        loaded(column(1, 5, 6))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_bins_beyond_the_dtype(dtype):
    largest = torch.iinfo(dtype).max
    x = torch.tensor([[largest, 3], [largest, 3]], dtype=dtype)
    expected = torch.stack([torch.bincount(row) for row in x])
    assert torch.equal(torchlift.vmap(torch.bincount)(x), expected)
    assert torch.equal(torchlift.jit(torch.bincount)(x[0]), expected[0])
    many = largest + 45
    mapped = torchlift.vmap(lambda row: torch.bincount(row, minlength=many))(x)
    assert torch.equal(mapped, torch.stack([torch.bincount(row, minlength=many) for row in x]))
