"""Traces of functions that look at numbers: each graph is run on numbers of other kinds than those it was traced with."""

import warnings

import pytest
import torch
from torch.testing import assert_close

import torchlift
from torchlift import ShapeDtype, UnsupportedError, grad, jit, make_fx, trace, vjp, vmap


def data(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def integers(high, *shape):
    return torch.randint(high, shape)


def clones(args):
    return [a.clone() for a in args]


class Runs:
    """All ways to run the graph of f: as it is traced, optimized, by fx, by shapes alone, and from a file."""

    def __init__(self, f, args, tmp_path, by_shapes=True):
        self.ways = self.ways_of(f, args, tmp_path, by_shapes)

    @staticmethod
    def ways_of(f, args, tmp_path, by_shapes=True):
        path = str(tmp_path / "f.tlc")
        torchlift.save(f, path, *args)
        traced = trace(f)(*args)
        traced.graph.verify()
        ways = {
            "traced": traced,
            "optimized": lambda *a: traced.rebuild(traced.optimized().run(list(a))),
            "fx": make_fx(f)(*args),
            "loaded": torchlift.load(path),
        }
        if by_shapes:
            ways["by shapes"] = trace(f)(*[ShapeDtype(a.shape, a.dtype) for a in args])
        return ways

    def check(self, f, *args):
        expected = f(*clones(args))
        for name, run in self.ways.items():
            assert_close(run(*clones(args)), expected, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")

    def raise_(self, message, *args):
        for name, run in self.ways.items():
            with pytest.raises((RuntimeError, IndexError), match=message):
                run(*clones(args))
                pytest.fail(f"{name}: no error")


# --- answers that a graph may not fix --------------------------------------------------------------


@pytest.mark.parametrize("f", [
    lambda x: x * 2 if torch.equal(x, x.abs()) else x,
    lambda x: x * 2 if torch.allclose(x, x.abs()) else x,
])  # fmt: skip
def test_answers_of_one_run_under_vmap_are_errors(f):
    x = torch.ones(2, 3)
    vmap(f)(x)
    for args in ((x,), (ShapeDtype(x.shape, x.dtype),)):
        with pytest.raises(UnsupportedError, match=r"depends on numbers that are computed from the inputs"):
            trace(vmap(f))(*args)


def test_checks_of_operators_are_part_of_the_graph(tmp_path):
    def f(x):
        return torch.nn.functional.one_hot(x, 4)

    x = integers(4, 3, 5)
    for g in (f, vmap(f)):
        runs = Runs(g, [x], tmp_path)
        runs.check(g, integers(4, 3, 5))
        runs.raise_("smaller than num_classes", x + 4)
        runs.raise_("non-negative", x - 4)

    def bins(x):
        return torch.bincount(x, minlength=4)

    runs = Runs(vmap(bins), [x], tmp_path)
    runs.check(vmap(bins), integers(4, 3, 5))
    runs.raise_("minlength", x + 4)

    def repeated(x, n):
        return torch.repeat_interleave(x, n, output_size=6)

    x, n = data(3, 3), torch.tensor([[1, 2, 3], [0, 6, 0], [2, 2, 2]])
    runs = Runs(vmap(repeated), [x, n], tmp_path)
    runs.check(vmap(repeated), data(3, 3), n.flip(0, 1))
    runs.raise_("another sum", x, n + 1)


# --- cov and istft, which look at their weights ----------------------------------------------------


def weights_of(kind):
    integers_ = torch.tensor([2, 1, 3, 4, 1])
    return {"fweights": [integers_], "aweights": [data(5).abs()], "both": [integers_, data(5).abs()]}[kind]


def cov(kind, correction=1):
    names = ["fweights", "aweights"] if kind == "both" else [kind]
    return lambda x, *w: torch.cov(x, correction=correction, **dict(zip(names, w)))


@pytest.mark.parametrize("kind", ["fweights", "aweights", "both"])
def test_cov_with_weights_that_are_arguments(kind, tmp_path):
    f, x = cov(kind), data(3, 5)
    by_x = grad(lambda *a: f(*a).sin().sum())
    for g in (f, by_x):
        runs = Runs(g, [x, *weights_of(kind)], tmp_path)
        runs.check(g, data(3, 5), *[w + 1 for w in weights_of(kind)])
        runs.raise_("weights", x, *[-w for w in weights_of(kind)])
        runs.raise_("weights", x, *[w * 0 for w in weights_of(kind)])
    batch = [data(4, 3, 5), *[torch.stack([w + i for i in range(4)]) for w in weights_of(kind)]]
    for g in (vmap(f), vmap(by_x)):
        runs = Runs(g, batch, tmp_path)
        runs.check(g, data(4, 3, 5), *[w + 2 for w in batch[1:]])
        runs.raise_("weights", batch[0], *[-w for w in batch[1:]])


def test_cov_whose_degrees_of_freedom_are_none(tmp_path):
    f, x, few, many = cov("fweights", correction=3), data(3, 2), torch.tensor([1, 1]), torch.tensor([3, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cov warns of them
        runs = Runs(f, [x, few], tmp_path, by_shapes=False)
        runs.check(f, data(3, 2), torch.tensor([2, 1]))
        runs.raise_("weights are of another kind", x, many)
    runs = Runs(f, [x, many], tmp_path)
    runs.check(f, data(3, 2), torch.tensor([4, 4]))
    runs.raise_("weights are of another kind", x, few)


def test_cov_raises_while_it_is_traced_as_it_does_eagerly():
    with pytest.raises(RuntimeError, match="aweights cannot be negative"):
        trace(cov("aweights"))(data(3, 5), -torch.ones(5))
    with pytest.raises(RuntimeError, match="aweights cannot be negative"):
        trace(vmap(cov("aweights")))(data(2, 3, 5), -torch.ones(2, 5))


def test_istft_with_a_window_that_is_an_argument(tmp_path):
    def f(x, window):
        return torch.istft(torch.view_as_complex(x), 8, 3, window=window)

    derivative = grad(lambda *a: f(*a).sin().sum(), argnums=(0, 1))
    x, window = data(5, 6, 2), data(8).abs() + 0.1
    for g in (f, derivative):
        runs = Runs(g, [x, window], tmp_path)
        runs.check(g, data(5, 6, 2), data(8).abs() + 0.1)
        runs.raise_("1e-11", x, window * 0)
    for g in (vmap(f), vmap(derivative)):
        runs = Runs(g, [data(3, 5, 6, 2), data(3, 8).abs() + 0.1], tmp_path)
        runs.check(g, data(3, 5, 6, 2), data(3, 8).abs() + 0.1)
        runs.raise_("1e-11", data(3, 5, 6, 2), torch.zeros(3, 8, dtype=torch.float64))
    for g, args in ((f, (x, window * 0)), (vmap(f), (x[None], window[None] * 0))):
        with pytest.raises(RuntimeError, match="1e-11"):
            trace(g)(*args)


# --- narrow, whose start is a tensor ---------------------------------------------------------------


def test_narrow_from_a_tensor(tmp_path):
    def f(x, start):
        return x.narrow(-1, start, 3) * 2

    derivative = grad(lambda x, start: f(x, start).sin().sum())
    x = data(4, 6)
    for g in (f, derivative):
        runs = Runs(g, [x, torch.tensor(1)], tmp_path)
        for start in (0, 3, -3, -6):
            runs.check(g, data(4, 6), torch.tensor(start))
        for start in (4, -7, -2):
            runs.raise_("out of range|out of .*bounds", x, torch.tensor(start))
    one = Runs(f, [x, torch.tensor(1, dtype=torch.int32)], tmp_path)
    one.check(f, x, torch.tensor(2, dtype=torch.int32))
    # In a graph each example may have its own.
    runs = Runs(vmap(f), [data(3, 6), torch.tensor([1, 1, 1])], tmp_path)
    runs.check(vmap(f), data(3, 6), torch.tensor([2, 2, 2]))
    x, starts = data(3, 6), torch.tensor([0, -3, 3])
    expected = torch.stack([f(*each) for each in zip(x, starts)])
    for run in runs.ways.values():
        assert_close(run(x, starts), expected)
    with pytest.raises(UnsupportedError, match="index_select"):
        vmap(f)(x, starts)
    with pytest.raises(RuntimeError, match="length"):
        trace(lambda x, start: x.narrow(0, start, 7))(x, torch.tensor(0))


def into_the_part(x, start):
    y = x.clone()
    y.narrow(0, start, 2).mul_(2)
    return y


def into_a_view_of_the_part(x, start):
    y = x.clone()
    y.narrow(0, start, 2)[0].zero_()
    return y


def into_the_whole(x, start):
    y = x.clone()
    part = y.narrow(0, start, 2)
    y.mul_(2)
    return part


def into_a_view_of_the_whole(x, start):
    y = x.clone()
    part = y.narrow(0, start, 2)
    y[1].mul_(2)
    return part


def into_the_argument(x, start):
    part = x.narrow(0, start, 2)
    x.mul_(2)
    return part


def into_what_the_function_makes(x, start):
    y = torch.zeros_like(x)
    part = y.narrow(0, start, 2)
    y.copy_(x)
    return part


def into_what_does_not_depend_on_the_inputs(x, start):
    y = torch.arange(6.0)
    part = y.narrow(0, start, 2)
    y.mul_(2)
    return part


@pytest.mark.parametrize("f", [
    into_the_part, into_a_view_of_the_part, into_the_whole, into_a_view_of_the_whole, into_the_argument,
    into_what_the_function_makes, into_what_does_not_depend_on_the_inputs,
])  # fmt: skip
def test_writes_that_a_view_would_show_are_errors(f):
    x, start = torch.randn(6, 2), torch.tensor(1)
    for g, args in (
        (f, (x, start)),
        (vmap(f, (1, None)), (x, start)),
        (vmap(f, (1, 0)), (x, torch.tensor([1, 1]))),
        (grad(lambda x, start: f(x * 1, start).sum()), (x, start)),
        (f, (ShapeDtype(x.shape, x.dtype), ShapeDtype((), torch.int64))),
    ):
        with pytest.raises(UnsupportedError, match=r"narrow: .*written to in place afterwards.*in into_"):
            trace(g)(*args)


def test_a_captured_tensor_that_is_written_to_after_a_part_was_taken():
    table = torch.randn(6)

    def f(start):
        part = table.narrow(0, start, 2)
        table.add_(1)
        return part

    mean, var = torch.zeros(3), torch.ones(3)

    def normalized(x, start):
        part = mean.narrow(0, start, 2)
        torch.nn.functional.batch_norm(x, mean, var, training=True)
        return part

    def made(x, start):
        mean = x.mean(0)
        part = mean.narrow(0, start, 2)
        torch.nn.functional.batch_norm(x, mean, torch.ones(3), training=True)
        return part

    args = [torch.randn(4, 3), torch.tensor(1)]
    for g, args in ((f, args[1:]), (normalized, args), (made, args)):
        with pytest.raises(UnsupportedError, match="written to in place afterwards"):
            trace(g)(*args)


def test_writes_before_a_part_is_taken(tmp_path):
    def f(x, start):
        y = x.clone()
        y[1].mul_(2)
        return y.narrow(0, start, 2) + y.narrow(0, start + 1, 2)

    runs = Runs(f, [data(6, 2), torch.tensor(0)], tmp_path)
    runs.check(f, data(6, 2), torch.tensor(3))
    jitted = jit(f)
    for start in (0, 1, 2):
        x = data(6, 2)
        assert_close(jitted(x, torch.tensor(start)), f(x, torch.tensor(start)))
    assert jitted.cache_info().hits == 2


def test_writes_after_the_part_was_read(tmp_path):
    def f(x, start):
        y = x.clone()
        total = y.narrow(0, start, 2).sum()
        y.mul_(2)
        total = total + vmap(lambda column: column.narrow(0, start, 1) * 3, 1)(y).sum()
        y.add_(total)
        return y.narrow(0, start, 1)

    runs = Runs(f, [data(6, 2), torch.tensor(0)], tmp_path)
    runs.check(f, data(6, 2), torch.tensor(3))


def test_narrow_in_branches_and_loops(tmp_path):
    def loop(x, n):
        step = lambda i, total: total + x.narrow(0, i, 1).sin()  # noqa: E731
        return torchlift.fori_loop(torch.zeros((), dtype=torch.int64), n, step, x[:1] * 0)

    def branch(x, i):
        y = x.clone()
        part = torchlift.cond(i > 2, lambda y: y.narrow(0, i, 1), lambda y: y.narrow(0, i + 1, 1) * 2, y)
        return part + 1

    for f in (loop, branch):
        runs = Runs(f, [data(6, 2), torch.tensor(1)], tmp_path)
        runs.check(f, data(6, 2), torch.tensor(4))


def test_narrow_in_inference_mode():
    with torch.inference_mode(), pytest.raises(UnsupportedError, match="inference"):
        trace(lambda x, start: x.narrow(0, start, 2))(torch.randn(4), torch.tensor(1))


# --- gradients of products -------------------------------------------------------------------------


def with_zeros(x, count):
    x = x.clone()
    x.view(-1)[:: max(1, x.numel() // count)] = 0
    return x


def scatter(x, index, src, **kwargs):
    return x.scatter_reduce(-1, index, src, "prod", **kwargs)


def scatter_in_place(x, index, src, **kwargs):
    return (x * 1).scatter_reduce_(-1, index, src, "prod", **kwargs)


def index(x, index, src, **kwargs):
    return x.index_reduce(-1, index, src, "prod", **kwargs)


def index_in_place(x, index, src, **kwargs):
    return (x * 1).index_reduce_(-1, index, src, "prod", **kwargs)


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("reduce", [scatter, scatter_in_place, index, index_in_place])
def test_gradients_of_products(reduce, include_self, tmp_path):
    def f(x, place, src):
        return reduce(x, place, src, include_self=include_self).sin().sum()

    def autograd(x, place, src):
        leaves = [x.clone().requires_grad_(), src.clone().requires_grad_()]
        return torch.autograd.grad(f(leaves[0], place, leaves[1]), leaves)

    derivative = grad(f, argnums=(0, 2))
    by_name = reduce in (index, index_in_place)
    places = (lambda: integers(3, 5)) if by_name else (lambda: integers(3, 2, 5))
    args = [(with_zeros(data(2, 3), n), places(), with_zeros(data(2, 5), n)) for n in (1, 2, 4, 8)]
    args.append((data(2, 3), places(), torch.zeros(2, 5, dtype=torch.float64)))
    runs = Runs(derivative, args[0], tmp_path)
    for each in args:
        assert_close(derivative(*each), autograd(*each))
        runs.check(derivative, *each)
    batch = [torch.stack(each) for each in zip(*args)]
    mapped = vmap(derivative)
    assert_close(mapped(*batch), tuple(map(torch.stack, zip(*(autograd(*each) for each in args)))))
    Runs(mapped, batch, tmp_path).check(mapped, *[each.flip(0) for each in batch])


@pytest.mark.parametrize("reduce", [scatter, index])
def test_second_derivatives_of_products(reduce, tmp_path):
    place = torch.tensor([0, 1, 1, 2])

    def f(x, src):
        return reduce(x, place, src).sin().sum()

    def second(x, src):
        return grad(lambda *a: sum(g.cos().sum() for g in grad(f, argnums=(0, 1))(*a)), argnums=(0, 1))(x, src)

    def step(x, src, t=1e-6):
        first = lambda *a: sum(g.cos().sum() for g in grad(f, argnums=(0, 1))(*a))  # noqa: E731
        return [
            torch.stack([(first(*moved(k, i, t)) - first(*moved(k, i, -t))) / (2 * t) for i in range(len((x, src)[k]))])
            for k in (0, 1)
        ]

    def moved(k, i, t):
        both = [x.clone(), src.clone()]
        both[k][i] += t
        return both

    runs = mapped = None
    for zeros in (0, 1):
        x, src = with_zeros(data(3), 1) if zeros else data(3), with_zeros(data(4), 1) if zeros else data(4)
        assert_close(second(x, src), tuple(step(x, src)), rtol=1e-4, atol=1e-6)
        runs = runs or Runs(second, [x, src], tmp_path)
        runs.check(second, x, src)
        mapped = mapped or Runs(vmap(second), [x[None], src[None]], tmp_path)
        mapped.check(vmap(second), x[None], src[None])
    two = torch.tensor([1.0, 0, 0, 1], dtype=torch.float64)  # libtorch has no formula for these
    for run in (second, lambda *a: vmap(second)(*[each[None] for each in a])):
        with pytest.raises(RuntimeError, match="Double backward is unsupported"):
            run(x, two)
    runs.raise_("Double backward is unsupported", x, two)
    mapped.raise_("Double backward is unsupported", x[None], two[None])


# --- x[mask] = v -----------------------------------------------------------------------------------


def put_rows(x, mask, v):
    y = x * 1
    y[mask] = v
    return y


def put_behind(x, mask, v):
    y = x * 1
    y[:, mask] = v
    return y


def put_more(x, mask, v):
    return x.index_put((mask,), v, accumulate=True)


def put_all(x, mask, v):
    return x.index_put((mask,), v)


T, F = True, False


@pytest.mark.parametrize("f, shape, masks, v", [
    (put_rows, (4, 3), [[T, F, T, F], [F, T, T, F]], (2, 3)),
    (put_rows, (4, 3), [[T, F, T, F], [F, F, F, T]], (1, 3)),
    (put_rows, (4, 3), [[T, F, T, F], [F, F, F, T]], (3,)),
    (put_rows, (4, 3), [[T, F, T, F], [F, T, T, F]], (2, 1)),
    (put_rows, (2, 3), [[[T, F, T], [F, F, T]], [[F, F, T], [T, T, F]]], (3,)),
    (put_rows, (2, 3, 2), [[[T, F, T], [F, F, T]], [[F, F, T], [T, T, F]]], (3, 2)),
    (put_rows, (2, 3, 2), [[[T, F, T], [F, F, T]], [[F, F, T], [F, T, F]]], (1, 1)),
    (put_behind, (3, 4, 2), [[T, F, T, F], [F, T, T, F]], (3, 2, 2)),
    (put_behind, (3, 4, 2), [[T, F, T, F], [F, T, T, F]], (2, 1)),
    (put_behind, (3, 4, 2), [[T, F, T, F], [F, F, F, F]], (3, 1, 2)),
    (put_more, (4, 3), [[T, F, T, F], [F, T, T, F]], (2, 3)),
    (put_all, (4,), [[T, F, T, F], [F, T, T, F]], (2,)),
    (put_all, (4,), [[T, F, T, F], [F, F, F, F]], (1,)),
])  # fmt: skip
def test_gradients_of_what_is_written_by_a_mask(f, shape, masks, v, tmp_path):
    masks = [torch.tensor(mask) for mask in masks]

    def derivative(x, mask, v):
        return grad(lambda x, v: (f(x, mask, v).sin() * torch.arange(x.numel()).view(x.shape)).sum(), argnums=(0, 1))(
            x, v
        )

    def second(x, mask, v):
        return grad(lambda x, v: sum(g.cos().sum() for g in derivative(x, mask, v)), argnums=(0, 1))(x, v)

    for g in (derivative, second):
        runs = Runs(g, [data(*shape), masks[0], data(*v)], tmp_path)
        for mask in masks:
            x, values = data(*shape), data(*v)
            leaves = [x.clone().requires_grad_(), values.clone().requires_grad_()]
            weighted = f(leaves[0], mask, leaves[1]).sin() * torch.arange(x.numel()).view(shape)
            if g is derivative:
                assert_close(g(x, mask, values), torch.autograd.grad(weighted.sum(), leaves))
            runs.check(g, x, mask, values)


def test_as_many_values_as_the_mask_has_places(tmp_path):
    def derivative(x, mask, v):
        return grad(lambda v: put_rows(x, mask, v).sin().sum())(v)

    runs = Runs(derivative, [data(4, 3), torch.tensor([T, F, T, F]), data(2, 3)], tmp_path)
    for mask in ([T, T, T, F], [T, F, F, F], [F, F, F, F]):
        runs.raise_("shape mismatch", data(4, 3), torch.tensor(mask), data(2, 3))
    batch = [data(2, 4, 3), torch.tensor([[T, F, T, F], [F, F, T, T]]), data(2, 2, 3)]
    expected = torch.stack([derivative(*each) for each in zip(*batch)])
    for run in Runs.ways_of(vmap(derivative), batch, tmp_path).values():
        assert_close(run(*batch), expected)


@pytest.mark.parametrize("f", [
    lambda x, mask: x[mask].sin(),
    lambda x, mask: x[:, mask[0]],
    lambda x, mask: x[torch.tensor([1, 0])][:, torch.tensor([[0], [1]]), mask[:2, 0]],
    lambda x, mask: put_rows(x, mask, x[mask] * 2),
])  # fmt: skip
def test_masks_that_are_captured(f, tmp_path):
    mask = torch.tensor([[T, F, T], [T, T, F], [F, T, T], [F, F, T]])

    def value(x):
        return f(x, mask)

    derivative = grad(lambda x: value(x).cos().sum())
    for g in (value, derivative):
        runs = Runs(g, [data(4, 3, 2)], tmp_path)
        runs.check(g, data(4, 3, 2))
        runs = Runs(vmap(g), [data(5, 4, 3, 2)], tmp_path)
        runs.check(vmap(g), data(5, 4, 3, 2))


def test_a_captured_mask_of_another_shape():
    with pytest.raises(IndexError, match="shape of the mask"):
        trace(lambda x: x[torch.tensor([T, F, T])])(data(4))


# --- losses and solutions --------------------------------------------------------------------------


def ctc_arguments(joined=False):
    log_probs = data(7, 3, 5).log_softmax(-1)
    targets = 1 + integers(4, 3, 3)
    inputs, lengths = torch.tensor([7, 6, 5]), torch.tensor([3, 1, 2])
    if joined:
        targets = torch.cat([row[:n] for row, n in zip(targets, lengths)])
    return [log_probs, targets, inputs, lengths]


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_ctc_loss_with_lengths_that_are_arguments(joined, reduction, tmp_path):
    def f(*args):
        return torch.nn.functional.ctc_loss(*args, reduction=reduction, zero_infinity=True)

    def derivative(*args):
        loss, pull = vjp(lambda x: f(x, *args[1:]), args[0])
        return loss, pull(torch.ones_like(loss))[0]

    others = ctc_arguments(joined)
    others[2] = torch.tensor([4, 7, 7])
    others[3] = torch.tensor([2, 2, 2] if joined else [1, 2, 1])
    none = ctc_arguments()
    none[3] = torch.tensor([0, 0, 0])
    for g in (f, derivative):
        runs = Runs(g, ctc_arguments(joined), tmp_path)
        runs.check(g, *others)
        if not joined:
            runs.check(g, *none)
    pairs = list(zip(ctc_arguments(joined), others))
    expected = derivative(*others)
    for g, dims in ((vmap(derivative), 0), (vmap(derivative, (0, None, None, 0)), (0, None, None, 0))):
        args = [torch.stack(pair) if dims == 0 or dim == 0 else pair[1] for pair, dim in zip(pairs, (0, None, None, 0))]
        assert_close([each[1] for each in g(*args)], list(expected))
        Runs(g, args, tmp_path).check(g, *args)


def test_ctc_loss_with_lengths_that_are_integers(tmp_path):
    def f(log_probs, targets):
        return grad(lambda x: torch.nn.functional.ctc_loss(x, targets, (7, 6, 5), (3, 1, 2)))(log_probs)

    log_probs, targets, *_ = ctc_arguments()
    runs = Runs(f, [log_probs, targets], tmp_path)
    runs.check(f, *ctc_arguments()[:2])


@pytest.mark.parametrize("driver", [None, "gels", "gelsy", "gelsd", "gelss"])
@pytest.mark.parametrize("rows", [2, 3, 5])
def test_least_squares(driver, rows, tmp_path):
    def f(a, b):
        return tuple(torch.linalg.lstsq(a, b, driver=driver))

    def derivative(a, b):
        return grad(lambda a, b: torch.linalg.lstsq(a, b, driver=driver).solution.sin().sum(), argnums=(0, 1))(a, b)

    by_rank = driver in ("gelsd", "gelss") and rows == 5
    for g in (f, derivative):
        runs = Runs(g, [data(rows, 3), data(rows, 2)], tmp_path, by_shapes=not by_rank)
        runs.check(g, data(rows, 3), data(rows, 2))
        batch = [data(4, rows, 3), data(4, rows, 2)]
        runs = Runs(vmap(g), batch, tmp_path, by_shapes=not by_rank)
        runs.check(vmap(g), data(4, rows, 3), data(4, rows, 2))
    deficient = data(rows, 3)
    deficient[:, 1] = deficient[:, 0]
    b = data(rows, 2)
    if driver in ("gelsy", None):
        Runs(f, [data(rows, 3), data(rows, 2)], tmp_path).check(f, deficient, b)
    if by_rank:
        Runs(f, [data(rows, 3), data(rows, 2)], tmp_path, by_shapes=False).raise_("full rank", deficient, b)
        runs = Runs(f, [deficient, b], tmp_path, by_shapes=False)
        runs.check(f, deficient * 2, data(rows, 2))
        runs.raise_("full rank", data(rows, 3), b)
        with pytest.raises(UnsupportedError, match="the shape of its result depends on numbers"):
            trace(f)(ShapeDtype(b.shape, b.dtype), ShapeDtype(b.shape, b.dtype))
