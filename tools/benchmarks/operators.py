"""Overhead of vmap on sixty common operators: each beside what one writes on the whole batch by hand."""

import math

import torch
import torch.func
import torch.nn.functional as F

import timing
import torchlift
from table import Row

STEPS = 20  # applications in one call, so that the call itself does not count
BATCH = 8
PEERS = {"torch.func": torch.func, "torchlift": torchlift}
LEAST = 0.05  # microseconds: what is below cannot be told from nothing


def tensors():
    """What the operators take: one example's shape is in the name. `shared` ones have no batch dim."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return 0.5 + torch.rand(*shape, generator=g)

    vectors, matrices = {"v": rand(BATCH, 5), "w": rand(BATCH, 5)}, {"m": rand(BATCH, 4, 5), "n": rand(BATCH, 5, 3)}
    return vectors | matrices | {
        "square": rand(BATCH, 3, 3) + 3 * torch.eye(3),
        "image": rand(BATCH, 3, 6, 6),
        "tokens": torch.randint(0, 7, (BATCH, 5), generator=g),
        "index": torch.randint(0, 4, (BATCH, 2, 5), generator=g),
        "label": torch.randint(0, 5, (BATCH,), generator=g),
        "mask": rand(BATCH, 5) > 1,
        "heads": rand(BATCH, 2, 4, 6),
        "shared_v": rand(5),
        "shared_w": rand(6, 5),
        "shared_b": rand(6),
        "shared_k": rand(4, 3, 3, 3),
        "shared_c": rand(3),
        "shared_table": rand(7, 4),
    }  # fmt: skip


# name: (arguments, function of one example, function of the batch; None where it is the same)
OPERATORS = {
    "add": ("v w", torch.add, None),
    "add_shared": ("v shared_v", torch.add, None),
    "sub": ("v w", torch.sub, None),
    "mul": ("v w", torch.mul, None),
    "mul_number": ("v", lambda v: v * 2.0, None),
    "div": ("v w", torch.div, None),
    "pow": ("v", lambda v: v**3, None),
    "neg": ("v", torch.neg, None),
    "exp": ("v", torch.exp, None),
    "log": ("v", torch.log, None),
    "sin": ("v", torch.sin, None),
    "tanh": ("v", torch.tanh, None),
    "sqrt": ("v", torch.sqrt, None),
    "abs": ("v", torch.abs, None),
    "sigmoid": ("v", torch.sigmoid, None),
    "relu": ("v", torch.relu, None),
    "gelu": ("v", F.gelu, None),
    "silu": ("v", F.silu, None),
    "softplus": ("v", F.softplus, None),
    "clamp": ("v", lambda v: v.clamp(0.6, 1.2), None),
    "maximum": ("v w", torch.maximum, None),
    "greater": ("v w", torch.gt, None),
    "where": ("mask v w", torch.where, None),
    "masked_fill": ("v mask", lambda v, mask: v.masked_fill(mask, 0.0), None),
    "cast": ("v", lambda v: v.to(torch.float64), None),
    "sum": ("v", torch.sum, lambda v: v.sum(1)),
    "sum_dim": ("m", lambda m: m.sum(0), lambda m: m.sum(1)),
    "mean": ("v", torch.mean, lambda v: v.mean(1)),
    "amax": ("m", lambda m: m.amax(-1), None),
    "argmax": ("v", lambda v: v.argmax(0), lambda v: v.argmax(1)),
    "var": ("m", lambda m: m.var(-1), None),
    "norm": ("v", torch.linalg.vector_norm, lambda v: torch.linalg.vector_norm(v, dim=1)),
    "logsumexp": ("m", lambda m: m.logsumexp(-1), None),
    "softmax": ("m", lambda m: m.softmax(-1), None),
    "log_softmax": ("m", lambda m: m.log_softmax(-1), None),
    "cumsum": ("m", lambda m: m.cumsum(0), lambda m: m.cumsum(1)),
    "sort": ("v", lambda v: v.sort(0)[0], lambda v: v.sort(1)[0]),
    "topk": ("v", lambda v: v.topk(2)[0], None),
    "dot": ("v w", torch.dot, lambda v, w: torch.linalg.vecdot(v, w)),
    "mv": ("m v", torch.mv, lambda m, v: torch.bmm(m, v.unsqueeze(2)).squeeze(2)),
    "mm": ("m n", torch.mm, torch.bmm),
    "matmul_shared": ("v shared_w", lambda v, w: w @ v, lambda v, w: v @ w.T),
    "linear": ("v shared_w shared_b", F.linear, None),
    "einsum": ("m n", lambda m, n: torch.einsum("ij,jk->ik", m, n), lambda m, n: torch.einsum("bij,bjk->bik", m, n)),
    "inv": ("square", torch.linalg.inv, None),
    "det": ("square", torch.linalg.det, None),
    "conv2d": ("image shared_k", F.conv2d, None),
    "max_pool2d": ("image", lambda x: F.max_pool2d(x, 2), None),
    "avg_pool2d": ("image", lambda x: F.avg_pool2d(x, 2), None),
    "layer_norm": ("m", lambda m: F.layer_norm(m, (5,)), None),
    "batch_norm": ("image shared_c shared_c", lambda x, mean, var: F.batch_norm(x[None], mean, var)[0], F.batch_norm),
    "attention": ("heads heads heads", F.scaled_dot_product_attention, None),
    "embedding": ("tokens shared_table", F.embedding, None),
    "cross_entropy": ("v label", F.cross_entropy, lambda v, label: F.cross_entropy(v, label, reduction="none")),
    "mse_loss": ("v w", F.mse_loss, lambda v, w: F.mse_loss(v, w, reduction="none").mean(1)),
    "transpose": ("m", lambda m: m.mT, None),
    "reshape": ("m", lambda m: m.reshape(20), lambda m: m.reshape(BATCH, 20)),
    "select": ("m", lambda m: m[1], lambda m: m[:, 1]),
    "cat": ("v w", lambda v, w: torch.cat((v, w)), lambda v, w: torch.cat((v, w), 1)),
    "gather": ("m index", lambda m, index: m.gather(0, index), lambda m, index: m.gather(1, index)),
}


def repeated(function):
    def run(*args):
        for _ in range(STEPS):
            out = function(*args)
        return out

    return run


def seconds_of(names, example, batch, values, rounds):
    arguments = [values[name] for name in names]
    dims = tuple(None if name.startswith("shared") else 0 for name in names)
    by_hand = repeated(batch or example)
    functions = {"plain": lambda: by_hand(*arguments)}
    for peer, module in PEERS.items():
        mapped = module.vmap(repeated(example), in_dims=dims)
        functions[peer] = lambda mapped=mapped: mapped(*arguments)
        torch.testing.assert_close(functions[peer](), functions["plain"](), rtol=1e-4, atol=1e-5)
    return timing.interleave(functions, rounds)


def overheads(rounds):
    """{operator: {peer: microseconds above the batch by hand}}"""
    values, found = tensors(), {}
    for name, (names, example, batch) in OPERATORS.items():
        seconds = seconds_of(names.split(), example, batch, values, rounds)
        found[name] = {peer: max(LEAST, (seconds[peer] - seconds["plain"]) / STEPS * 1e6) for peer in PEERS}
    return found


def geometric_mean(values):
    values = list(values)
    return math.exp(sum(map(math.log, values)) / len(values))


def rows(rounds, each=False):
    """The mean over all, and the largest; with `each`, one row an operator."""
    found = overheads(rounds)
    if each:
        for name, peers in found.items():
            yield Row(f"vmap overhead, {name}", "us", peers["torch.func"], peers["torchlift"], relative=True)
    means = {peer: geometric_mean(each[peer] for each in found.values()) for peer in PEERS}
    what = f"vmap overhead, geometric mean over {len(found)} operators"
    yield Row(what, "us an operator", means["torch.func"], means["torchlift"], 0.3, relative=True)
