"""Autocast: under a transform an operator gets the dtype it would get in a loop over the examples."""

import torch
import torch.nn.functional as F
import pytest

import torchlift as tl

DTYPES = [torch.bfloat16, torch.float16]
BATCH = 3


def square(t):
    """Well conditioned, symmetric and positive definite."""
    return t @ t.mT + t.shape[-1] * torch.eye(t.shape[-1], dtype=t.dtype)


def of(shape, make=None):
    return (shape, make)


def ints(high, *shape):
    return ("ints", high, shape)


A = torch.ops.aten
N = of((4, 4))
SPD = of((4, 4), square)
POSITIVE = of((4, 4), lambda t: t.sigmoid())
IMAGE = of((1, 2, 6, 6))
VOLUME = of((1, 2, 4, 4, 4))
LINE = of((2, 8))

# name of the operator -> (function, examples of its arguments), for all that autocast knows on CPU.
CASES = {
    # lower precision
    "conv1d": (A.conv1d, [of((1, 2, 8)), of((3, 2, 3))]),
    "conv1d.padding": (lambda x, w: A.conv1d.padding(x, w, None, [1], "same"), [of((1, 2, 8)), of((3, 2, 3))]),
    "conv2d": (A.conv2d, [IMAGE, of((3, 2, 3, 3))]),
    "conv2d.padding": (lambda x, w: A.conv2d.padding(x, w, None, [1, 1], "valid"), [IMAGE, of((3, 2, 3, 3))]),
    "conv3d": (A.conv3d, [VOLUME, of((3, 2, 2, 2, 2))]),
    "conv3d.padding": (lambda x, w: A.conv3d.padding(x, w, None, [1, 1, 1], "same"), [VOLUME, of((3, 2, 3, 3, 3))]),
    "_convolution.deprecated": (
        lambda x, w: torch._convolution(x, w, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False),
        [IMAGE, of((3, 2, 3, 3))],
    ),
    "conv_tbc": (A.conv_tbc, [of((5, 2, 3)), of((3, 3, 4)), of((4,))]),
    "conv_transpose1d": (A.conv_transpose1d, [of((1, 2, 8)), of((2, 3, 3))]),
    "conv_transpose2d.input": (A.conv_transpose2d, [IMAGE, of((2, 3, 3, 3))]),
    "conv_transpose3d.input": (A.conv_transpose3d, [VOLUME, of((2, 3, 2, 2, 2))]),
    "mm": (A.mm, [N, N]),
    "bmm": (A.bmm, [of((2, 3, 4)), of((2, 4, 3))]),
    "matmul": (A.matmul, [N, of((4,))]),
    "addmm": (A.addmm, [N, N, N]),
    "_addmm_activation": (A._addmm_activation, [of((4,)), N, N]),
    "addbmm": (A.addbmm, [of((3, 3)), of((2, 3, 4)), of((2, 4, 3))]),
    "baddbmm": (A.baddbmm, [of((2, 3, 3)), of((2, 3, 4)), of((2, 4, 3))]),
    "linear": (A.linear, [N, N, of((4,))]),
    "linalg_vecdot": (A.linalg_vecdot, [N, N]),
    "prelu": (A.prelu, [N, of((1,))]),
    "scaled_dot_product_attention": (
        A.scaled_dot_product_attention, [of((2, 3, 4)), of((2, 3, 4)), of((2, 3, 4))]),
    # float32
    "avg_pool3d": (lambda x: A.avg_pool3d(x, [2, 2, 2]), [VOLUME]),
    "adaptive_avg_pool3d": (lambda x: A.adaptive_avg_pool3d(x, [2, 2, 2]), [VOLUME]),
    "adaptive_max_pool3d": (lambda x: A.adaptive_max_pool3d(x, [2, 2, 2])[0], [VOLUME]),
    "max_pool3d": (lambda x: A.max_pool3d(x, [2, 2, 2]), [VOLUME]),
    "fractional_max_pool2d": (
        lambda x: A.fractional_max_pool2d(x, [2, 2], [3, 3], torch.full((1, 2, 2), 0.5, dtype=x.dtype))[0], [IMAGE]),
    "fractional_max_pool3d": (
        lambda x: A.fractional_max_pool3d(x, [2, 2, 2], [2, 2, 2], torch.full((1, 2, 3), 0.5, dtype=x.dtype))[0],
        [VOLUME]),
    "max_unpool2d": (lambda x: A.max_unpool2d(x, torch.arange(36).view(1, 1, 6, 6).expand(1, 2, 6, 6), [6, 6]), [IMAGE]),
    "max_unpool3d": (
        lambda x: A.max_unpool3d(
            x, torch.arange(64).view(1, 1, 4, 4, 4).expand(1, 2, 4, 4, 4), [4, 4, 4], [1, 1, 1], [0, 0, 0]),
        [VOLUME]),
    "binary_cross_entropy": (A.binary_cross_entropy, [POSITIVE, POSITIVE]),
    "binary_cross_entropy_with_logits": (A.binary_cross_entropy_with_logits, [N, POSITIVE]),
    "grid_sampler": (lambda x, g: A.grid_sampler(x, g, 0, 0, False), [IMAGE, of((1, 3, 3, 2))]),
    "grid_sampler_2d": (lambda x, g: A.grid_sampler_2d(x, g, 0, 0, False), [IMAGE, of((1, 3, 3, 2))]),
    "_grid_sampler_2d_cpu_fallback": (
        lambda x, g: A._grid_sampler_2d_cpu_fallback(x, g, 0, 0, False), [IMAGE, of((1, 3, 3, 2))]),
    "grid_sampler_3d": (lambda x, g: A.grid_sampler_3d(x, g, 0, 0, False), [VOLUME, of((1, 2, 2, 2, 3))]),
    "polar": (A.polar, [N, N]),
    "prod": (A.prod, [N]),
    "prod.dim_int": (lambda x: A.prod(x, 0), [N]),
    "quantile": (lambda x: A.quantile(x, torch.tensor([0.3, 0.6], dtype=x.dtype), 0), [N]),
    "quantile.scalar": (lambda x: A.quantile(x, 0.3, 0), [N]),
    "nanquantile": (lambda x: A.nanquantile(x, torch.tensor([0.3], dtype=x.dtype), 0), [N]),
    "nanquantile.scalar": (lambda x: A.nanquantile(x, 0.3, 0), [N]),
    "stft": (lambda x: torch.stft(x, 4, return_complex=True, center=False), [LINE]),
    "stft.center": (lambda x: torch.stft(x, 4, return_complex=True, center=True), [LINE]),
    "cdist": (A.cdist, [N, N]),
    "trace": (A.trace, [N]),
    "view_as_complex": (A.view_as_complex, [of((4, 2))]),
    # Of one triangle: libtorch gives the other one, which is not read, a gradient too.
    "cholesky_inverse": (lambda t: A.cholesky_inverse(t.tril()), [of((4, 4), lambda t: torch.linalg.cholesky(square(t)))]),
    "cholesky_solve": (A.cholesky_solve, [N, of((4, 4), lambda t: torch.linalg.cholesky(square(t)))]),
    "inverse": (A.inverse, [SPD]),
    "pinverse": (A.pinverse, [SPD]),
    "svd": (lambda x: A.svd(x)[1], [N]),
    "geqrf": (lambda x: A.geqrf(x)[0], [N]),
    "_lu_with_info": (lambda x: A._lu_with_info(x)[0], [SPD]),
    "orgqr": (A.orgqr, [N, of((4,))]),
    "ormqr": (A.ormqr, [N, of((4,)), N]),
    "lu_solve": (lambda b, lu: A.lu_solve(b, lu, torch.arange(1, 5, dtype=torch.int32)), [N, SPD]),
    "triangular_solve": (lambda b, a: A.triangular_solve(b, a)[0], [N, SPD]),
    "reflection_pad1d": (lambda x: A.reflection_pad1d(x, [1, 2]), [LINE]),
    "reflection_pad2d": (lambda x: A.reflection_pad2d(x, [1, 2, 1, 0]), [IMAGE]),
    "replication_pad1d": (lambda x: A.replication_pad1d(x, [1, 2]), [LINE]),
    "replication_pad2d": (lambda x: A.replication_pad2d(x, [1, 2, 1, 0]), [IMAGE]),
    "replication_pad3d": (lambda x: A.replication_pad3d(x, [1, 2, 1, 0, 1, 1]), [VOLUME]),
    "mse_loss": (A.mse_loss, [N, N]),
    "cosine_embedding_loss": (lambda x, y: A.cosine_embedding_loss(x, y, torch.ones(4)), [N, N]),
    "nll_loss": (A.nll_loss, [N, ints(4, 4)]),
    "nll_loss2d": (A.nll_loss2d, [of((1, 3, 2, 2)), ints(3, 1, 2, 2)]),
    "hinge_embedding_loss": (lambda x: A.hinge_embedding_loss(x, torch.ones(4)), [N]),
    "poisson_nll_loss": (lambda x, y: A.poisson_nll_loss(x, y, True, False, 1e-8, 1), [N, POSITIVE]),
    "cross_entropy_loss": (A.cross_entropy_loss, [N, ints(4, 4)]),
    "l1_loss": (A.l1_loss, [N, N]),
    "smooth_l1_loss": (A.smooth_l1_loss, [N, N]),
    "huber_loss": (A.huber_loss, [N, N]),
    "margin_ranking_loss": (lambda x, y: A.margin_ranking_loss(x, y, torch.ones(4)), [N, N]),
    "soft_margin_loss": (lambda x: A.soft_margin_loss(x, torch.ones(4, 4)), [N]),
    "triplet_margin_loss": (A.triplet_margin_loss, [N, N, N]),
    "multi_margin_loss": (A.multi_margin_loss, [N, ints(4, 4)]),
    "multilabel_margin_loss": (A.multilabel_margin_loss, [N, ints(4, 4, 4)]),
    "multilabel_margin_loss_forward": (lambda x, y: A.multilabel_margin_loss_forward(x, y, 1)[0], [N, ints(4, 4, 4)]),
    "kl_div": (A.kl_div, [N, POSITIVE]),
    "ctc_loss.IntList": (
        lambda x: A.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2]]), [5], [2]), [of((5, 1, 3))]),
    "ctc_loss.Tensor": (
        lambda x: A.ctc_loss(x.log_softmax(-1), torch.tensor([[1, 2]]), torch.tensor([5]), torch.tensor([2])),
        [of((5, 1, 3))]),
    "fake_quantize_per_tensor_affine": (lambda x: A.fake_quantize_per_tensor_affine(x, 0.1, 0, -128, 127), [N]),
    "index_copy": (lambda x, y: A.index_copy(x, 0, torch.tensor([2, 0]), y), [N, of((2, 4))]),
    "linalg_cond": (A.linalg_cond, [SPD]),
    "linalg_cond.p_str": (lambda x: A.linalg_cond(x, "fro"), [SPD]),
    "linalg_matrix_rank": (lambda x: A.linalg_matrix_rank(x, 0.1), [SPD]),
    "linalg_matrix_rank.tol_tensor": (lambda x: A.linalg_matrix_rank(x, torch.tensor(0.1)), [SPD]),
    "linalg_matrix_rank.atol_rtol_float": (lambda x: torch.linalg.matrix_rank(x, atol=0.1, rtol=0.1), [SPD]),
    "linalg_matrix_rank.atol_rtol_tensor": (
        lambda x: torch.linalg.matrix_rank(x, atol=torch.tensor(0.1), rtol=torch.tensor(0.1)), [SPD]),
    "linalg_solve": (A.linalg_solve, [SPD, N]),
    "linalg_cholesky": (A.linalg_cholesky, [SPD]),
    "linalg_cholesky_ex": (lambda x: A.linalg_cholesky_ex(x)[0], [SPD]),
    "linalg_svdvals": (A.linalg_svdvals, [N]),
    "linalg_eigvals": (A.linalg_eigvals, [SPD]),
    "linalg_eigvalsh": (A.linalg_eigvalsh, [SPD]),
    "linalg_inv": (A.linalg_inv, [SPD]),
    "linalg_inv_ex": (lambda x: A.linalg_inv_ex(x)[0], [SPD]),
    "linalg_householder_product": (A.linalg_householder_product, [N, of((4,))]),
    "linalg_tensorinv": (lambda x: A.linalg_tensorinv(x, 1), [SPD]),
    "linalg_tensorsolve": (A.linalg_tensorsolve, [SPD, of((4,))]),
    "linalg_qr": (lambda x: A.linalg_qr(x)[1], [SPD]),
    "linalg_svd": (lambda x: A.linalg_svd(x)[1], [N]),
    "linalg_eig": (lambda x: A.linalg_eig(x)[0], [SPD]),
    "linalg_eigh": (lambda x: A.linalg_eigh(x)[0], [SPD]),
    "linalg_lstsq": (lambda a, b: A.linalg_lstsq(a, b)[0], [SPD, N]),
    "linalg_matrix_sqrth": (lambda x: A.linalg_matrix_sqrth(x), [SPD]),
    # widest dtype
    "cat": (lambda x, y: A.cat([x, y.float()]), [N, N]),
    "stack": (lambda x, y: A.stack([x, y.float()]), [N, N]),
}
CASES.update({f"fft_{name}": (getattr(torch.fft, name), [N]) for name in (
    "fft", "ifft", "rfft", "fft2", "ifft2", "fftn", "ifftn", "rfft2", "rfftn", "ihfft", "hfft", "irfft", "irfft2", "irfftn")})

LEFT_OUT = {
    "aten::_native_multi_head_attention",  # inference only: no derivative
    "aten::mkldnn_rnn_layer",  # called by lstm under no_grad only
}


def test_the_table_has_all_operators():
    known = {f"aten::{name}" for name in CASES} | LEFT_OUT
    names = {
        name
        for name in torch._C._dispatch_get_all_op_names()
        if torch._C._dispatch_has_kernel_for_dispatch_key(name, "AutocastCPU")
    }
    assert names - known == set()


def make(spec, dtype):
    if spec[0] == "ints":
        return torch.randint(spec[1], (BATCH, *spec[2]))
    shape, prepare = spec
    t = torch.randn(BATCH, *shape)
    return (t if prepare is None else prepare(t)).to(dtype)


def real(t):
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def result_of(f, rows, autocast, backward_inside):
    """The results and gradients of a loop, or None where libtorch itself has no such kernel."""
    outputs, gradients = [], []
    for row in zip(*rows):
        leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in row]
        wrt = [t for t in leaves if t.requires_grad]
        try:
            with torch.autocast("cpu", autocast):
                out = f(*leaves)
        except (RuntimeError, NotImplementedError, IndexError, ValueError):
            return None
        outputs.append(out.detach())
        if not out.requires_grad or gradients is None:
            continue
        total = real(out).float().sum()
        try:
            with torch.autocast("cpu", autocast, enabled=backward_inside):
                found = torch.autograd.grad(total, wrt, allow_unused=True, materialize_grads=True)
            gradients.append(found)
        except (RuntimeError, NotImplementedError):
            gradients = None
    columns = None if not gradients else [torch.stack(column) for column in zip(*gradients)]
    return torch.stack(outputs), columns


def close(got, expected):
    assert got.dtype == expected.dtype
    tolerance = 5e-2 if expected.dtype in DTYPES else 1e-2
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("autocast", DTYPES, ids=str)
@pytest.mark.parametrize("of_low_precision", [False, True], ids=["float32", "low"])
@pytest.mark.parametrize("name", sorted(CASES))
def test_operator(name, of_low_precision, autocast):
    torch.manual_seed(0)
    f, specs = CASES[name]
    rows = [make(spec, autocast if of_low_precision else torch.float32) for spec in specs]
    expected = result_of(f, rows, autocast, backward_inside=True)
    if expected is None:
        # libtorch has no kernel for these dtypes: neither have we.
        with torch.autocast("cpu", autocast), pytest.raises(Exception):
            tl.vmap(f)(*rows)
        return
    outputs, gradients = expected
    with torch.autocast("cpu", autocast):
        close(tl.vmap(f)(*rows), outputs)
        nested = [torch.stack([t, t.flip(0)]) for t in rows]
        close(tl.vmap(tl.vmap(f))(*nested), torch.stack([outputs, outputs.flip(0)]))
        shared = tl.vmap(f, in_dims=(0, *[None] * (len(rows) - 1)))(rows[0], *[t[0] for t in rows[1:]])
        assert shared.dtype == outputs.dtype
    if not gradients:
        return
    wrt = tuple(i for i, t in enumerate(rows) if t.is_floating_point())

    def loss(*args):
        return real(f(*args)).float().sum()

    with torch.autocast("cpu", autocast):
        got = tl.vmap(tl.grad(loss, argnums=wrt))(*rows)
    # Through the vmap, with the backward pass outside of autocast as torch recommends.
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in rows]
    with torch.autocast("cpu", autocast):
        total = tl.vmap(loss)(*leaves).sum()
    through = torch.autograd.grad(total, [leaves[i] for i in wrt], allow_unused=True, materialize_grads=True)
    for each, want in zip(got, gradients):
        close(each, want)
    for each, want in zip(through, result_of(f, rows, autocast, backward_inside=False)[1]):
        close(each, want)


def test_second_derivatives():
    w, x = torch.randn(4, 4), torch.randn(BATCH, 4)

    def f(x):
        return torch.tanh(x @ w).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        hessians = tl.vmap(tl.hessian(f))(x)
        expected = torch.stack([torch.autograd.functional.hessian(f, row) for row in x])
    assert hessians.dtype == expected.dtype
    torch.testing.assert_close(hessians, expected, rtol=0.1, atol=0.1)


def test_jvp():
    w, x, v = torch.randn(4, 4), torch.randn(BATCH, 4), torch.randn(BATCH, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out, tangent = tl.vmap(lambda x, v: tl.jvp(lambda x: x @ w, (x,), (v,)))(x, v)
    assert out.dtype == tangent.dtype == torch.bfloat16
    torch.testing.assert_close(tangent.float(), v @ w, rtol=0.05, atol=0.1)


def test_turned_on_and_off_inside():
    w, x = torch.randn(4, 4), torch.randn(BATCH, 4)

    def f(x):
        with torch.autocast("cpu", torch.bfloat16):
            low = x @ w
            with torch.autocast("cpu", enabled=False):
                high = x @ w
        return low, high, x @ w

    low, high, after = tl.vmap(f)(x)
    assert (low.dtype, high.dtype, after.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_the_cast_of_a_weight_is_that_of_its_own_level():
    """autocast keeps the cast of a leaf; each level, and each gradient, must see its own."""
    w = torch.randn(4, 4, requires_grad=True)
    x = torch.randn(BATCH, 4)

    def loss(w, x):
        return (x @ w).float().square().sum()

    def reference(w, x):
        return (x.bfloat16() @ w.bfloat16()).float().square().sum()

    with torch.autocast("cpu", torch.bfloat16):
        plain = x @ w  # Puts w's cast into the cache.
        inner = tl.vmap(tl.grad(loss), in_dims=(None, 0))(w, x)
        twice = tl.vmap(tl.grad(lambda w, x: loss(w, x) + loss(w, x)), in_dims=(None, 0))(w, x)
        per_weight = tl.vmap(loss, in_dims=(0, None))(torch.stack([w, 2 * w]), x)
        total = tl.vmap(loss, in_dims=(None, 0))(w, x).sum() + plain.float().sum()
        again = x @ w
    (through,) = torch.autograd.grad(total, w)
    expected = torch.stack([torch.autograd.grad(reference(w, row), w)[0] for row in x])
    torch.testing.assert_close(inner, expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(twice, 2 * expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(per_weight[1] / per_weight[0], torch.tensor(4.0), rtol=0.05, atol=0.05)
    (direct,) = torch.autograd.grad((x.bfloat16() @ w.bfloat16()).float().sum(), w)
    torch.testing.assert_close(through, expected.sum(0) + direct, rtol=0.05, atol=0.1)
    assert not tl._C.is_lifted(again) and again.equal(plain)


def test_modules():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.LayerNorm(108), torch.nn.Linear(108, 5))
    params = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(BATCH, 1, 8, 8), torch.randint(5, (BATCH,))

    def loss(params, x, y):
        return F.cross_entropy(tl.functional_call(model, params, (x[None],)), y[None])

    with torch.autocast("cpu", torch.bfloat16):
        grads, values = tl.vmap(tl.grad_and_value(loss), in_dims=(None, 0, 0))(params, x, y)
    for i in range(BATCH):
        with torch.autocast("cpu", torch.bfloat16):
            value = F.cross_entropy(model(x[i][None]), y[i][None])
        expected = torch.autograd.grad(value, list(model.parameters()))
        assert values.dtype == value.dtype
        torch.testing.assert_close(values[i], value.detach(), rtol=0.02, atol=0.02)
        for got, want in zip(grads.values(), expected):
            assert got.dtype == want.dtype
            torch.testing.assert_close(got[i], want, rtol=0.05, atol=0.05)
