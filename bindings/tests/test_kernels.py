"""How many kernels a rule runs: at most as many as torch.func's for the same call, and one bmm for a nested mm."""

import warnings

import pytest
import torch
import torch.func
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import torchlift

# Operators that move no data.
VIEWS = {
    *("_reshape_alias", "alias", "as_strided", "detach", "expand", "permute", "select", "slice", "split", "squeeze"),
    *("t", "transpose", "unbind", "unsqueeze", "view"),
}


class Recorder(TorchDispatchMode):
    """The operators that reach libtorch's kernels, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def kernels(f, *args):
    with Recorder() as recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.func tells of its loops
        f(*args)
    return [name for name in recorder.names if name not in VIEWS]


X = torch.randn(4, 5, 6)
SQUARE = torch.randn(6, 6)
IMAGES = torch.randn(4, 2, 3, 8, 8)
FILTERS = torch.randn(4, 5, 3, 3, 3)
ROWS = torch.randint(0, 5, (4, 2))

CASES = {
    "mm": (torch.mm, X, torch.randn(4, 6, 3)),
    "mm by a shared matrix": (lambda a: a @ SQUARE, X),
    "bmm": (torch.bmm, torch.randn(4, 2, 5, 6), torch.randn(4, 2, 6, 3)),
    "mv": (torch.mv, X, torch.randn(4, 6)),
    "addmm": (torch.addmm, torch.randn(4, 3), X, torch.randn(4, 6, 3)),
    "linear": (lambda a: F.linear(a, SQUARE, SQUARE[0]), X),
    "linear with own weights": (F.linear, X, torch.randn(4, 7, 6)),
    "einsum": (lambda a, b: torch.einsum("ij,jk->ik", a, b), X, torch.randn(4, 6, 3)),
    "softmax": (lambda a: a.softmax(-1), X),
    "layer_norm": (lambda a: F.layer_norm(a, (6,), SQUARE[0], SQUARE[1]), X),
    "group_norm": (lambda a: F.group_norm(a, 2), torch.randn(4, 2, 6, 6)),
    "batch_norm": (lambda a: F.batch_norm(a, torch.zeros(5), torch.ones(5)), torch.randn(4, 2, 5, 6)),
    "conv2d": (F.conv2d, IMAGES, FILTERS),
    "conv2d of own images": (lambda a: F.conv2d(a, FILTERS[0]), IMAGES),
    "conv2d by own filters": (lambda b: F.conv2d(IMAGES[0], b), FILTERS),
    "max_pool2d": (lambda a: F.max_pool2d(a, 2), IMAGES),
    "embedding": (F.embedding, ROWS, X),
    "cross_entropy": (F.cross_entropy, X, torch.randint(0, 6, (4, 5))),
    "mse_loss": (F.mse_loss, X, X + 1),
    "attention": (lambda q: F.scaled_dot_product_attention(q, q, q), torch.randn(4, 2, 3, 5, 8)),
    "cat": (lambda a: torch.cat([a, a]), X),
    "gather": (lambda a, i: a.gather(1, i), X, torch.randint(0, 6, (4, 5, 2))),
    "index": (lambda a, i: a[i], X, ROWS),
    "index_put": (lambda a, i: a.index_put((i,), torch.ones(())), X, ROWS),
    "scatter_add": (lambda a, i: a.scatter_add(1, i, a), X, torch.randint(0, 6, (4, 5, 2))),
    "sum": (lambda a: a.sum(0), X),
    "var": (torch.var, X),
    "cumsum": (lambda a: a.cumsum(0), X),
    "topk": (lambda a: a.topk(2), X),
    "gelu": (F.gelu, X),
    "where": (lambda a: torch.where(a > 0, a, 0.0), X),
    "solve": (torch.linalg.solve, torch.randn(4, 5, 5), torch.randn(4, 5, 2)),
}


@pytest.mark.parametrize("name", CASES)
def test_no_more_than_torch_func(name):
    f, *args = CASES[name]
    ours, theirs = (kernels(T.vmap(f), *args) for T in (torchlift, torch.func))
    assert len(ours) <= len(theirs), (ours, theirs)


def test_a_dot_product_takes_two():
    """torch.func runs one bmm of rows and columns. A product and a sum take a fifth of its time on the CPU."""
    assert kernels(torchlift.vmap(torch.dot), torch.randn(4, 6), torch.randn(4, 6)) == ["mul", "sum"]


@pytest.mark.parametrize(
    "a, b, inner, outer",
    [
        ((2, 3, 4, 5), (2, 3, 5, 6), (0, 0), (0, 0)),
        ((2, 3, 4, 5), (2, 5, 6), (0, None), (0, 0)),
        ((2, 4, 5), (2, 3, 5, 6), (None, 0), (0, 0)),
        ((2, 4, 5), (3, 5, 6), (None, 0), (0, None)),
    ],
)
def test_nested_mm_is_one_bmm(a, b, inner, outer):
    nested = torchlift.vmap(torchlift.vmap(torch.mm, inner), outer)
    found = kernels(nested, torch.randn(a), torch.randn(b))
    # The columns of (3, 5, 6) matrices come into one matrix by a copy only.
    copies = ["clone", "_unsafe_view"] if (inner, outer) == ((None, 0), (0, 0)) else []
    assert found in (["bmm"], [*copies, "bmm"])
