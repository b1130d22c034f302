"""Overhead in Python: chains of small operators under torch.func, under torchlift, and plain."""

import torch
import torch.func

import timing
import torchlift
from table import Row

STEPS = 50
PEERS = {"torch.func": torch.func, "torchlift": torchlift}


def inputs(*lead):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(*lead, 8, 5, generator=generator)
    return x, 1 + 0.1 * torch.rand(5, generator=generator)


def mul_chain(x, c):
    for _ in range(STEPS):
        x = x * c
    return x


def sin_chain(x, c):
    for _ in range(STEPS):
        x = torch.sin(x)
    return x


CHAINS = {"mul": mul_chain, "sin": sin_chain}


def total(chain):
    return lambda x, c: chain(x, c).sum()


def plain_gradient(function, x, c):
    """What one writes without a transform."""
    leaf = x.detach().requires_grad_()
    return torch.autograd.grad(function(leaf, c), leaf)[0]


def check(values):
    """All agree; a benchmark of a wrong result is worth nothing."""
    plain = values.pop("plain")
    for name, value in values.items():
        torch.testing.assert_close(value, plain, msg=lambda text, name=name: f"{name}: {text}")


def measure(plain, transformed, rounds):
    """Medians of {"plain", "torch.func", "torchlift"}; transformed(T) makes the function to call."""
    functions = {"plain": plain} | {name: transformed(module) for name, module in PEERS.items()}
    check({name: function() for name, function in functions.items()})
    return timing.interleave(functions, rounds)


# --- overhead of vmap: microseconds an operator above plain eager on the same batched data --------------


def overhead_row(what, seconds, target):
    above = {name: (seconds[name] - seconds["plain"]) / STEPS * 1e6 for name in PEERS}
    return Row(what, "us an operator", above["torch.func"], above["torchlift"], target, relative=True)


def vmap_rows(rounds):
    for name, chain in CHAINS.items():
        x, c = inputs()
        functions = (lambda: chain(x, c)), (lambda T: mapped(T, chain, x, c))
        yield overhead_row(f"vmap overhead, {name} chain on 8x5", measure(*functions, rounds), 0.2)


def mapped(T, function, x, c):
    over_batch = T.vmap(function, in_dims=(0, None))
    return lambda: over_batch(x, c)


def nested_vmap_rows(rounds):
    for name, chain in CHAINS.items():
        x, c = inputs(4)
        functions = (lambda: chain(x, c)), (lambda T: mapped(T, T.vmap(chain, in_dims=(0, None)), x, c))
        yield overhead_row(f"vmap(vmap) overhead, {name} chain on 4x8x5", measure(*functions, rounds), 0.25)


# --- gradients: times plain autograd ------------------------------------------------------------------


def times_row(what, seconds, target):
    times = {name: seconds[name] / seconds["plain"] for name in PEERS}
    return Row(what, "times plain autograd", times["torch.func"], times["torchlift"], target)


def vmap_grad_rows(rounds):
    for name, chain in CHAINS.items():
        x, c = inputs()
        functions = (lambda: plain_gradient(total(chain), x, c)), (lambda T: mapped(T, T.grad(total(chain)), x, c))
        yield times_row(f"vmap(grad), {name} chain on 8x5", measure(*functions, rounds), 1.2)


def grad_rows(rounds):
    for name, chain in CHAINS.items():
        x, c = inputs()

        def transformed(T):
            gradient = T.grad(total(chain))
            return lambda: gradient(x, c)

        seconds = measure(lambda: plain_gradient(total(chain), x, c), transformed, rounds)
        yield times_row(f"grad, {name} chain on 8x5", seconds, 1.03)


# --- what a call costs, whatever it does: a function of one operator -------------------------------------


def fixed_row(what, seconds, target):
    above = {name: (seconds[name] - seconds["plain"]) * 1e6 for name in PEERS}
    return Row(what, "us a call", above["torch.func"], above["torchlift"], target)


def fixed_rows(rounds):
    x, _ = inputs()
    vmap_seconds = measure(lambda: torch.sin(x), lambda T: one_argument(T.vmap(torch.sin), x), rounds)
    yield fixed_row("fixed cost of a vmap call (of sin)", vmap_seconds, 8)

    row, total_sin = x[0], lambda v, c=None: torch.sin(v).sum()
    seconds = measure(
        lambda: plain_gradient(total_sin, row, None), lambda T: one_argument(T.grad(total_sin), row), rounds
    )
    yield fixed_row("fixed cost of a grad call over plain autograd", seconds, 8)
    yield functional_call_row(rounds)


def functional_call_row(rounds):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    params, x = {name: p.detach() for name, p in model.named_parameters()}, torch.ones(2)
    with torch.no_grad():
        seconds = measure(lambda: model(x), lambda T: lambda: T.functional_call(model, params, (x,)), rounds)
    return fixed_row("fixed cost of functional_call (4 parameters) over calling the module", seconds, None)


def one_argument(function, x):
    return lambda: function(x)


def rows(rounds):
    for measure_rows in (vmap_rows, nested_vmap_rows, vmap_grad_rows, grad_rows, fixed_rows):
        yield from measure_rows(rounds)
