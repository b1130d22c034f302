"""The fixed cost of a call, in CPU time and with a margin: the targets are 8 us on a quiet machine."""

import time

import pytest
import torch

import torchlift


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def best_us(f, *args, repeats=200, rounds=30):
    """The best round: other work on the machine only adds."""
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for _ in range(repeats):
            f(*args)
        best = min(best, (time.process_time() - start) / repeats)
    return best * 1e6


def test_vmap_call():
    x = torch.ones(8, 5)
    cost = best_us(torchlift.vmap(lambda v: v), x)
    print(f"one vmap call: {cost:.2f} us")
    assert cost < 16


def test_grad_call_over_plain_autograd():
    x = torch.tensor(1.0)

    def plain(x):
        y = x.detach().requires_grad_()
        return torch.autograd.grad(y.sin(), y)[0]

    ours, theirs = best_us(torchlift.grad(torch.sin), x), best_us(plain, x)
    print(f"one grad call: {ours:.2f} us, plain autograd {theirs:.2f} us")
    assert ours - theirs < 16


def test_functional_call():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    params = {k: v.detach() for k, v in model.named_parameters()}
    x = torch.ones(2)
    with torch.no_grad():
        ours = best_us(torchlift.functional_call, model, params, x)
        plain = best_us(model, x)
    print(f"functional_call: {ours:.2f} us, the module {plain:.2f} us")
    assert ours - plain < 20
