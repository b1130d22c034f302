"""Batches that are not contiguous although their examples are, and the other way round.

Derivative formulas of libtorch look at the strides of what they get: under vmap, of an example. What a rule does
with the batch has to agree with that. Against a loop of plain autograd.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import torchlift as tl

BATCH = 3


def every_other(batch: Tensor) -> Tensor:
    return torch.stack([batch, torch.full_like(batch, 7)], 1).flatten(0, 1)[::2]


def shared(batch: Tensor) -> Tensor:
    return batch[:1].expand_as(batch)


def interleaved(batch: Tensor) -> Tensor:
    return batch.movedim(0, -1).contiguous().movedim(-1, 0)


def transposed(batch: Tensor) -> Tensor:
    return batch.mT.contiguous().mT


LAYOUTS = [every_other, shared, interleaved, transposed]


def regular(a: Tensor) -> Tensor:
    return 0.3 * a + 2 * torch.eye(a.shape[-1], dtype=a.dtype)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "det": lambda a: torch.linalg.det(regular(a)),
    "logdet": lambda a: torch.logdet(regular(a) @ regular(a).mT),
    "det as it lies": torch.linalg.det,
    "slogdet as it lies": lambda a: torch.linalg.slogdet(a)[1],
    "solve as it lies": lambda a: torch.linalg.solve(a, torch.ones(a.shape[-1], 2, dtype=a.dtype)),
    "solve from the right": lambda a: torch.linalg.solve(a, torch.ones(2, a.shape[-1], dtype=a.dtype), left=False),
    "inv": torch.linalg.inv,
    "lu_factor": lambda a: torch.linalg.lu_factor(a)[0],
    "cholesky": lambda a: torch.linalg.cholesky(a @ a.mH + torch.eye(a.shape[-1], dtype=a.dtype)),
    "qr": lambda a: torch.linalg.qr(a)[1],
    "svdvals": torch.linalg.svdvals,
    "pinv": torch.linalg.pinv,
    "matrix_exp": torch.linalg.matrix_exp,
    "triangular solve": lambda a: torch.linalg.solve_triangular(regular(a).triu(), a, upper=True),
    "matmul": lambda a: a @ a,
    "prod": lambda a: a.prod(-1),
    "cumprod": lambda a: a.cumprod(0),
}
REAL_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "cdist": lambda a: torch.cdist(a, a + 1),
    "sort": lambda a: a.sort(0)[0],
    "softmax": lambda a: a.softmax(0) * a,
    "layer_norm": lambda a: F.layer_norm(a, a.shape[-1:]) * a,
    "group_norm": lambda a: F.group_norm(a[None], 2) * a,
    "conv2d": lambda a: F.conv2d(a[None, None], a[None, None, :2, :2]),
    "max_pool2d": lambda a: F.max_pool2d(a[None, None], 2) ** 2,
    "adaptive pooling": lambda a: F.adaptive_avg_pool2d(a[None, None], 3) ** 2,
    "interpolate": lambda a: F.interpolate(a[None, None], scale_factor=2, mode="bilinear") ** 2,
    "attention": lambda a: F.scaled_dot_product_attention(a[None], a[None], a[None]),
    "embedding": lambda a: F.embedding(torch.tensor([0, 2, 2]), a) ** 2,
    "gru cell": lambda a: torch.gru_cell(a, a, a.repeat(3, 1), a.repeat(3, 1)),
}


def far_apart(batch: Tensor) -> Tensor:
    """Two elements apart in every dim, the batch dim innermost."""
    room = batch.new_zeros([2 * n for n in reversed(batch.shape)]).permute(*reversed(range(batch.dim())))
    return room[(slice(None, None, 2),) * batch.dim()].copy_(batch)


@pytest.mark.parametrize(
    "view",
    [
        torch.diagonal,
        lambda a: a.diagonal(1),
        lambda a: a.diagonal(-1),
        lambda a: a.unfold(0, 3, 1).diagonal(0, 0, 1),
        lambda a: a.mT[1:].diagonal(),
        lambda a: a[::2].diagonal(1),
    ],
)
def test_the_tangent_of_a_view_lies_as_its_primal_does(view: Callable[[Tensor], Tensor]) -> None:
    """Where a dual number's parts lie apart, libtorch takes the view of the tangent by as_strided."""
    torch.manual_seed(0)
    x, t = far_apart(torch.randn(3, 5, 5)), torch.randn(3, 5, 5)
    tangent = tl.vmap(lambda x, t: tl.jvp(view, (x,), (t,))[1])(x, far_apart(t))
    assert torch.equal(tangent, torch.stack([view(row) for row in t]))
    assert torch.equal(
        tl.vmap(lambda t: tl.jvp(view, (x[0],), (t,))[1])(far_apart(t)), torch.stack([view(row) for row in t])
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in OPERATORS for dtype in (torch.float64, torch.complex128)]
    + [(name, torch.float64) for name in REAL_ONLY],
)
def test_gradients_do_not_depend_on_the_layout_of_a_batch(
    name: str, dtype: torch.dtype, layout: Callable[[Tensor], Tensor]
) -> None:
    f = (OPERATORS | REAL_ONLY)[name]
    torch.manual_seed(0)
    xs = layout(torch.randn(BATCH, 4, 4, dtype=dtype))
    cotangents = torch.randn(BATCH, *f(xs[0]).shape, dtype=f(xs[0]).dtype)

    def gradient(x: Tensor, cotangent: Tensor) -> Tensor:
        return tl.vjp(f, x)[1](cotangent)[0]

    def expected(x: Tensor, cotangent: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(f(x), x, cotangent)[0]

    want = torch.stack([expected(*row) for row in zip(xs, cotangents)])
    torch.testing.assert_close(tl.vmap(gradient)(xs, cotangents), want, rtol=1e-7, atol=1e-8)
    nested = tl.vmap(tl.vmap(gradient, (None, 0)))(xs, torch.stack([cotangents, 2 * cotangents], 1))
    torch.testing.assert_close(nested, torch.stack([want, 2 * want], 1), rtol=1e-7, atol=1e-8)


NONE_OF: dict[str, tuple[Callable[..., Tensor], list[tuple[int, ...]]]] = {
    "cartesian_prod": (torch.cartesian_prod, [(3,), (2,)]),
    "householder_product": (torch.linalg.householder_product, [(5, 3), (3,)]),
    "ormqr": (torch.ormqr, [(5, 3), (3,), (5, 2)]),
    "tensorinv": (lambda a: torch.linalg.tensorinv(a, 1), [(6, 2, 3)]),
    "attention": (F.scaled_dot_product_attention, [(2, 4, 8)] * 3),
    "pinv": (lambda a, b: torch.linalg.pinv(a @ b.mT), [(4, 3), (4, 3)]),
    "diagonal": (lambda a: a.mT.diagonal(), [(4, 3)]),
    "view_as_complex": (lambda a: torch.view_as_complex(a.transpose(0, 1)).abs(), [(4, 3, 2)]),
    "istft": (lambda x, w: torch.istft(torch.view_as_complex(x), 6, 2, window=w.abs() + 1), [(4, 5, 2), (6,)]),
    "cov": (lambda x, w: torch.cov(x, aweights=w.abs()), [(3, 5), (5,)]),
    "segment_reduce": (lambda a: torch.segment_reduce(a, "sum", lengths=torch.tensor([1, 3])), [(4, 3)]),
}


@pytest.mark.parametrize("name", NONE_OF)
@pytest.mark.parametrize("dim", [0, -1])
def test_derivatives_of_no_examples(name: str, dim: int) -> None:
    f, shapes = NONE_OF[name]
    examples = [torch.randn(shape) for shape in shapes]
    none = [e.unsqueeze(dim).narrow(dim, 0, 0) for e in examples]
    out = f(*examples)
    tangents = tl.vmap(lambda *x: tl.jvp(f, x, x)[1], dim)(*none)
    assert tangents.shape == (0, *out.shape)
    gradients = tl.vmap(lambda *x: tl.vjp(f, *x)[1](torch.ones_like(out)), dim)(*none)
    assert [g.shape for g in gradients] == [(0, *shape) for shape in shapes]
    pushed = tl.vmap(lambda *x: tl.jvp(f, tuple(examples), x)[1], dim)(*none)
    assert pushed.shape == (0, *out.shape)
