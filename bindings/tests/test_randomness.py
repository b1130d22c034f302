"""randomness="reproducible", random_rows and memory_budget from Python. The table of operators is in C++."""

import threading

import pytest
import torch
import torch.nn.functional as F

import torchlift
from torchlift import TransformError, UnsupportedError, grad, jacrev, jvp, vmap


@pytest.fixture(autouse=True)
def no_validation():
    """Distributions look at their arguments' values, which a batched tensor does not show."""
    previous = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    yield
    torch.distributions.Distribution.set_default_validate_args(previous)


def seeded(f, *args, seed=5, **kwargs):
    torch.manual_seed(seed)
    return f(*args, **kwargs)


def looped(f, xs):
    rows = torchlift.random_rows()
    results = []
    for i, x in enumerate(xs):
        with rows(i):
            results.append(f(x))
    return torch.stack(results)


def noisy(x):
    y = F.dropout(x * torch.rand(4)) + torch.randn_like(x) + torch.randint(9, (4,)) + torch.randperm(4)
    return y + torch.normal(x, 1.0) + torch.poisson(torch.ones(4))


FUNCTIONS = {
    "mixed": noisy,
    "distributions": lambda x: torch.stack(
        [
            torch.distributions.Gamma(x.exp(), 1.0).rsample(),
            torch.distributions.Dirichlet(x.exp()).rsample(),
            torch.distributions.Beta(x.exp(), 2.0).rsample(),
            torch.distributions.Categorical(logits=x).sample((4,)).float(),
            torch.distributions.Bernoulli(logits=x).sample(),
            torch.distributions.Poisson(x.exp()).sample(),
        ]
    ),
    "dropouts": lambda x: F.alpha_dropout(x, 0.3, True) + F.dropout1d(x.view(1, 4, 1), 0.5).flatten(),
    "rrelu": lambda x: F.rrelu(-x.abs(), training=True),
    "attention": lambda x: F.scaled_dot_product_attention(
        x.view(1, 4, 1), x.view(1, 4, 1), x.view(1, 4, 1), dropout_p=0.5
    ).flatten(),
    "multinomial": lambda x: torch.multinomial(x.exp(), 3).float(),
    "fractional_max_pool": lambda x: F.fractional_max_pool2d(x.outer(x.repeat(4))[None], 2, output_size=(2, 5)).flatten(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_loop_vmap_and_chunks_agree(name):
    f, xs = FUNCTIONS[name], torch.randn(5, 4)
    whole = seeded(vmap(f, randomness="reproducible"), xs)
    assert not whole[0].equal(whole[1])
    for chunk_size in (1, 2, 5):
        assert seeded(vmap(f, randomness="reproducible", chunk_size=chunk_size), xs).equal(whole)
    assert seeded(looped, f, xs).equal(whole)
    assert not vmap(f, randomness="reproducible")(xs).equal(whole)


def test_keyword_arguments_and_dict_dims():
    def f(x, *, w):
        return F.dropout(x * w)

    xs = torch.ones(5, 4)
    whole = seeded(vmap(f, randomness="reproducible", in_dims={"x": 0, "w": None}), xs, w=2.0)
    again = seeded(vmap(f, randomness="reproducible", chunk_size=2, in_dims={"w": 0}), xs, w=torch.full((5, 4), 2.0))
    assert whole.equal(again)


def test_nested():
    xs = torch.randn(3, 2, 4)
    inner = vmap(noisy, randomness="reproducible")
    whole = seeded(vmap(inner, randomness="reproducible"), xs)
    assert seeded(vmap(inner, randomness="reproducible", chunk_size=1), xs).equal(whole)
    assert seeded(looped, inner, xs).equal(whole)
    assert seeded(looped, lambda row: looped(noisy, row), xs).equal(whole)
    chunked = vmap(noisy, randomness="reproducible", chunk_size=1)
    assert seeded(vmap(chunked, randomness="reproducible", chunk_size=2), xs).equal(whole)


def test_gradients():
    w, xs = torch.randn(4, 4), torch.randn(5, 4)

    def loss(w, x):
        return F.dropout(torch.tanh(x @ w)).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0), randomness="reproducible")
    whole = seeded(per_sample, w, xs)
    torch.testing.assert_close(seeded(looped, lambda x: grad(loss)(w, x), xs), whole)
    chunked = vmap(grad(loss), in_dims=(None, 0), randomness="reproducible", chunk_size=2)
    torch.testing.assert_close(seeded(chunked, w, xs), whole)
    outer = grad(lambda w: vmap(loss, in_dims=(None, 0), randomness="reproducible")(w, xs).sum())
    torch.testing.assert_close(seeded(outer, w), whole.sum(0))


def test_jvp_and_jacobians():
    xs, v = torch.randn(5, 4), torch.randn(4)

    def f(x):
        return F.dropout(x.sin()) * torch.rand(4)

    options = {"randomness": "reproducible"}
    outputs, tangents = seeded(vmap(lambda x: jvp(f, (x,), (v,)), **options), xs)
    assert outputs.equal(seeded(vmap(f, **options), xs))
    jacobians = seeded(vmap(jacrev(f), **options), xs)
    torch.testing.assert_close(jacobians @ v, tangents)
    looped_jacobians = seeded(looped, jacrev(f), xs)
    torch.testing.assert_close(looped_jacobians, jacobians)


def test_the_generator_moves_on_by_calls():
    f, xs = vmap(noisy, randomness="reproducible"), torch.randn(5, 4)
    seeded(f, xs)
    after = torch.rand(3)
    seeded(vmap(noisy, randomness="reproducible", chunk_size=1), xs[:2])
    assert torch.rand(3).equal(after)


def test_generators():
    xs = torch.zeros(5, 4)

    def run(**options):
        generator = torch.Generator().manual_seed(3)
        f = vmap(lambda x: torch.rand(4, generator=generator) + x, randomness="reproducible", **options)
        return torch.stack([f(xs), f(xs)])

    first = run()
    torch.manual_seed(1)
    assert run(chunk_size=2).equal(first)
    assert not first[0].equal(first[1])


def test_modules():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    params = dict(model.named_parameters())
    xs = torch.randn(6, 4)

    def f(x):
        return torchlift.functional_call(model, params, (x,))

    whole = seeded(vmap(f, randomness="reproducible"), xs)
    assert not whole[0].equal(whole[1])
    torch.testing.assert_close(seeded(looped, f, xs), whole)
    rnn = torch.nn.LSTM(4, 3, num_layers=2, dropout=0.5)
    sequences = torch.randn(3, 5, 4)
    whole = seeded(vmap(lambda x: rnn(x)[0], randomness="reproducible"), sequences)
    torch.testing.assert_close(seeded(looped, lambda x: rnn(x)[0], sequences), whole)


def test_rows_on_other_threads():
    xs = torch.randn(4, 4)
    whole = seeded(vmap(noisy, randomness="reproducible"), xs)
    torch.manual_seed(5)
    rows, results = torchlift.random_rows(), {}

    def work(i):
        with rows(i):
            results[i] = noisy(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert results[i].equal(whole[i])


def test_initializers_in_rows():
    rows = torchlift.random_rows()
    made = []
    for i in range(2):
        with rows(i):
            made.append(torch.nn.Linear(4, 4).weight)
    assert all(isinstance(w, torch.nn.Parameter) and w.is_leaf for w in made)
    assert not made[0].equal(made[1])


def test_errors():
    xs, captured = torch.zeros(3, 4), torch.empty(4)
    with pytest.raises(TransformError, match="'different' or 'reproducible', got 'often'"):
        vmap(noisy, randomness="often")
    with pytest.raises(UnsupportedError, match="cannot ask for reproducible in-place randomness"):
        vmap(lambda x: captured.normal_() + x, randomness="reproducible")(xs)
    with pytest.raises(UnsupportedError, match="while in randomness error mode: vmap level 1"):
        vmap(vmap(lambda x: torch.rand(2) + x, randomness="reproducible"))(xs)
    with pytest.raises(TransformError, match="at least 0, got -1"):
        torchlift.random_rows()(-1)


def test_checkpoints_are_refused():
    from torch.utils.checkpoint import checkpoint

    w = torch.randn(4, 4)

    def loss(w, x):
        return checkpoint(lambda w: F.dropout(x @ w), w, use_reentrant=False).sum()

    with pytest.raises(UnsupportedError, match="was called in a backward pass"):
        vmap(grad(loss), in_dims=(None, 0), randomness="reproducible")(w, torch.randn(3, 4))


def test_branches_that_some_examples_are_in():
    def f(x):
        return torchlift.cond(x.sum() > 0, lambda x: x + torch.rand(4), lambda x: x, x)

    xs = torch.tensor([1.0, -1.0, 2.0])[:, None].expand(3, 4)
    with pytest.raises(UnsupportedError, match="in a branch or loop that only some examples are in"):
        vmap(f, randomness="reproducible")(xs)
    drawn = vmap(f, randomness="different")(xs)
    assert drawn[1].equal(xs[1]) and not (drawn[0] - xs[0]).equal(drawn[2] - xs[2])


# --- memory_budget --------------------------------------------------------------------------------

EXAMPLE = 2 * 64 * 64 * 4  # bytes that `outer` takes for one example


def outer(x):
    return (torch.outer(x, x) * 2).sum()


def test_memory_budget():
    xs = torch.randn(50, 64)
    whole = vmap(outer)(xs)
    for examples in (1, 4, 20, 200):
        budget = examples * EXAMPLE + EXAMPLE // 2
        torch.testing.assert_close(vmap(outer, memory_budget=budget)(xs), whole)
        report = torchlift.memory_report()
        assert report.examples == 50 and report.budget == budget
        assert 0 < report.peak_bytes <= budget
        assert min(examples, 49) * 0.6 <= report.chunk_size <= examples


def test_memory_budget_of_a_gradient():
    xs, w = torch.randn(40, 64), torch.randn(64, 64)
    per_sample = grad(lambda w, x: torch.tanh(x @ w).sum())
    whole = vmap(per_sample, in_dims=(None, 0))(w, xs)
    got = vmap(per_sample, in_dims=(None, 0), memory_budget=500_000)(w, xs)
    torch.testing.assert_close(got, whole)
    report = torchlift.memory_report()
    assert report.peak_bytes <= 500_000 and 1 < report.chunk_size < 40
    assert report.result_bytes >= whole.numel() * 4


def test_memory_budget_keeps_random_numbers():
    xs = torch.randn(40, 64)

    def f(x):
        return F.dropout(x) + outer(x) * 0

    for randomness in ("same", "reproducible"):
        whole = seeded(vmap(f, randomness=randomness), xs)
        assert seeded(vmap(f, randomness=randomness, memory_budget=5 * EXAMPLE), xs).equal(whole)


def test_memory_budget_errors():
    xs = torch.randn(5, 64)
    with pytest.raises(TransformError, match="memory_budget must be None or an int of at least 1, got 0"):
        vmap(outer, memory_budget=0)
    with pytest.raises(TransformError, match=r"both chunk_size \(2\) and memory_budget \(5\)"):
        vmap(outer, chunk_size=2, memory_budget=5)
    with pytest.raises(TransformError, match="memory_budget is 1000 bytes, but one example takes"):
        vmap(outer, memory_budget=1000)(xs)
    with pytest.raises(ZeroDivisionError):
        vmap(lambda x: 1 / 0, memory_budget=1000)(xs)
    # Nothing is left of a meter.
    with torch.profiler.profile():
        vmap(outer)(xs)
        with pytest.raises(UnsupportedError, match="memory cannot be measured while torch.profiler"):
            vmap(outer, memory_budget=10 * EXAMPLE)(xs)
    torch.testing.assert_close(vmap(outer, memory_budget=10 * EXAMPLE)(xs), vmap(outer)(xs))


def test_memory_budget_empty_batch():
    assert vmap(outer, memory_budget=10)(torch.zeros(0, 64)).shape == (0,)
