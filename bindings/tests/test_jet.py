"""jet against nested jvps, operator by operator, and in compositions."""

import math

import pytest
import torch
import torch.nn.functional as F

import torchlift
from torchlift import TransformError, UnsupportedError, grad, jacfwd, jacrev, jet, jvp, vjp, vmap

ORDER = 4


def curve(x, series, t):
    """x(t), by Horner's rule."""
    total = torch.zeros_like(x)
    for j in range(series.shape[0], 0, -1):
        total = (total + series[j - 1] / math.factorial(j)) * t
    return x + total


def nested(f, primals, series):
    """The derivatives of f along the curve, by a nest of jvps."""
    t0 = torch.zeros((), dtype=torch.float64)

    def along(t):
        return f(*(x if s is None else curve(x, s, t) for x, s in zip(primals, series)))

    order = next(s.shape[0] for s in series if s is not None)
    out = []
    for _ in range(order):
        inner = along
        along = lambda t, inner=inner: jvp(inner, (t,), (torch.ones_like(t),))[1]  # noqa: E731
        out.append(along(t0))
    value = f(*primals)
    return torch.stack(out) if out else value.new_zeros([0, *value.shape])


def series_like(x, order=ORDER, scale=0.5):
    return torch.randn(order, *x.shape, dtype=x.dtype) * scale


def check(f, *primals, order=ORDER, constants=(), tolerance=1e-9):
    series = tuple(
        None if i in constants else series_like(x, order) for i, x in enumerate(primals)
    )
    value, got = jet(f, primals, series)
    torch.testing.assert_close(value, f(*primals), rtol=tolerance, atol=tolerance)
    expected = nested(f, primals, series)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    check_laplacian(f, primals, constants, tolerance)
    return got


def check_laplacian(f, primals, constants, tolerance):
    """Against second derivatives by nested jvps; without calling f a second time (docs/taylor_mode.md)."""
    moving = [i for i in range(len(primals)) if i not in constants and primals[i].numel() > 0]
    if not moving or any(primals[i].is_complex() for i in moving):
        return

    calls = []

    def real(*xs):
        calls.append(1)
        output = f(*xs)
        return torch.view_as_real(output) if output.is_complex() else output

    for i in moving:
        diagonal = torchlift.hessian_diag(real, argnums=i)(*primals)
        expected = diagonal.flatten(diagonal.dim() - primals[i].dim()).sum(-1) if primals[i].dim() else diagonal
        calls.clear()
        got = torchlift.laplacian(real, argnums=i)(*primals)
        assert len(calls) == 1
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        check_hessian(real, primals, i, tolerance)


def check_hessian(f, primals, i, tolerance):
    """Of few numbers, which is Taylor mode, against forward over reverse; in one call of f (docs/jacobians.md)."""
    directions = torch.randn(2, *primals[i].shape, dtype=primals[i].dtype) * 0.5
    calls = []

    def along(ab):
        calls.append(1)
        moved = primals[i] + ab[0] * directions[0] + ab[1] * directions[1]
        return f(*primals[:i], moved, *primals[i + 1 :])

    zero = torch.zeros(2, dtype=primals[i].dtype)
    got = torchlift.hessian(along)(zero)
    assert len(calls) == 1
    expected = torchlift.hessian(along, chunk_size=2)(zero)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def real(*shape):
    return torch.randn(shape, dtype=torch.float64)


def positive(*shape):
    return torch.rand(shape, dtype=torch.float64) + 0.5


def unit(*shape):
    return torch.rand(shape, dtype=torch.float64) * 1.2 - 0.6


def spd(n):
    a = real(n, n)
    return a @ a.T + n * torch.eye(n, dtype=torch.float64)


index = torch.tensor([2, 0, 1, 1])
mask = torch.tensor([True, False, True])

UNARY = {
    "abs": (torch.abs, real), "acos": (torch.acos, unit), "acosh": (lambda x: torch.acosh(x + 2), positive),
    "asin": (torch.asin, unit), "asinh": (torch.asinh, real), "atan": (torch.atan, real),
    "atanh": (torch.atanh, unit), "cos": (torch.cos, real), "cosh": (torch.cosh, real),
    "digamma": (torch.digamma, positive), "erf": (torch.erf, real), "erfc": (torch.erfc, real),
    "erfinv": (torch.erfinv, unit), "exp": (torch.exp, real), "exp2": (torch.exp2, real),
    "expm1": (torch.expm1, real), "frac": (torch.frac, real), "i0": (torch.special.i0, real),
    "lgamma": (torch.lgamma, positive), "log": (torch.log, positive), "log10": (torch.log10, positive),
    "log1p": (torch.log1p, positive), "log2": (torch.log2, positive), "logit": (lambda x: torch.logit(x / 3), positive),
    "neg": (torch.neg, real), "reciprocal": (torch.reciprocal, positive), "rsqrt": (torch.rsqrt, positive),
    "sigmoid": (torch.sigmoid, real), "sin": (torch.sin, real), "sinc": (torch.sinc, positive),
    "sinh": (torch.sinh, real), "sqrt": (torch.sqrt, positive), "square": (torch.square, real),
    "tan": (torch.tan, unit), "tanh": (torch.tanh, real), "xlogy": (lambda x: torch.xlogy(x, x), positive),
    "ndtr": (torch.special.ndtr, real), "log_ndtr": (torch.special.log_ndtr, real),
    "celu": (F.celu, real), "elu": (F.elu, real), "gelu": (F.gelu, real),
    "gelu_tanh": (lambda x: F.gelu(x, approximate="tanh"), real), "hardshrink": (F.hardshrink, real),
    "hardswish": (F.hardswish, real), "hardtanh": (F.hardtanh, real),
    "leaky_relu": (F.leaky_relu, real), "logsigmoid": (F.logsigmoid, real), "mish": (F.mish, real),
    "relu": (F.relu, real), "relu6": (F.relu6, real), "selu": (F.selu, real), "silu": (F.silu, real),
    "softplus": (F.softplus, real), "softplus_threshold": (lambda x: F.softplus(x, 2.0, 0.3), real),
    "softshrink": (F.softshrink, real), "softsign": (F.softsign, real), "tanhshrink": (F.tanhshrink, real),
    "threshold": (lambda x: F.threshold(x, 0.1, 3.0), real),
    "clamp": (lambda x: x.clamp(-0.5, 0.5), real), "clamp_min": (lambda x: x.clamp_min(0.1), real),
    "pow2": (lambda x: x**2, real), "pow3": (lambda x: x**3, real), "pow5": (lambda x: x**5, real),
    "pow_half": (lambda x: x**0.5, positive), "pow_third": (lambda x: x ** (1 / 3), positive),
    "pow_minus": (lambda x: x**-2, positive), "pow0": (lambda x: x**0 * x, real),
    "pow_zero_base": (lambda x: (x - x.detach()) ** 3, real),
    "number_pow": (lambda x: 1.7**x, real), "number_div": (lambda x: 3 / x, positive),
    "number_sub": (lambda x: 3 - x, real), "number_add": (lambda x: x + 2.5, real),
    "fmod": (lambda x: torch.fmod(x, 0.7), real), "remainder": (lambda x: x % 0.7, real),
    "nan_to_num": (torch.nan_to_num, real), "deg2rad": (torch.deg2rad, real),
    "polygamma": (lambda x: torch.polygamma(1, x), positive),
}


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    f, make = UNARY[name]
    x = make(3, 2)
    check(f, x)
    check(f, make(), order=3)


BINARY = {
    "add": lambda a, b: torch.add(a, b, alpha=2), "sub": torch.sub, "rsub": torch.rsub, "mul": torch.mul,
    "div": torch.div, "pow": torch.pow, "atan2": torch.atan2, "hypot": torch.hypot,
    "maximum": torch.maximum, "minimum": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin,
    "logaddexp": torch.logaddexp, "logaddexp2": torch.logaddexp2, "xlogy": torch.xlogy,
    "copysign": torch.copysign, "fmod": torch.fmod, "remainder": torch.remainder,
    "lerp_number": lambda a, b: torch.lerp(a, b, 0.3), "lerp": lambda a, b: torch.lerp(a, b, a),
    "where": lambda a, b: torch.where(a > b, a * b, a - b),
    "addcmul": lambda a, b: torch.addcmul(a, a, b, value=0.7),
    "addcdiv": lambda a, b: torch.addcdiv(a, a, b, value=0.7),
    "mse_loss": F.mse_loss, "smooth_l1": F.smooth_l1_loss, "huber": F.huber_loss, "l1": F.l1_loss,
    "bce": lambda a, b: F.binary_cross_entropy(a / 2, (b / 2).expand_as(a)),
    "bce_logits": lambda a, b: F.binary_cross_entropy_with_logits(a, b.expand_as(a)), "kl": F.kl_div, "poisson": F.poisson_nll_loss,
    "cosine": lambda a, b: F.cosine_similarity(a, b.expand_as(a)), "ldexp": torch.ldexp,
    "cat": lambda a, b: torch.cat([a, b.expand_as(a)]),
    "stack": lambda a, b: torch.stack([a, b.expand_as(a)], -1),
    "masked_fill": lambda a, b: a.masked_fill(mask[:2], b.sum()), "float_div_trunc": lambda a, b: torch.div(a, b, rounding_mode="trunc") + a,
    "complex": lambda a, b: torch.view_as_real(torch.complex(a, b.expand_as(a).contiguous())),
    "polar": lambda a, b: torch.view_as_real(torch.polar(a, b)),
    "dist": torch.dist, "cdist": lambda a, b: torch.cdist(a, b.expand_as(a) + 1),
    "outer": lambda a, b: torch.outer(a[0], b), "dot": lambda a, b: torch.dot(a[0], b),
    "vdot": lambda a, b: torch.vdot(a[0], b), "mv": lambda a, b: torch.mv(a, b),
    "matmul": lambda a, b: a @ b, "mm": lambda a, b: a.T @ b.expand_as(a),
    "bmm": lambda a, b: torch.bmm(a.expand(2, 3, 2), b.expand(2, 2, 2)),
    "addmm": lambda a, b: torch.addmm(b, a, b.expand(2, 2), beta=0.5, alpha=2),
    "baddbmm": lambda a, b: torch.baddbmm(b, a[None], b.expand(1, 2, 2)),
    "addbmm": lambda a, b: torch.addbmm(b, a[None], b.expand(1, 2, 2)),
    "addmv": lambda a, b: torch.addmv(a[:, 0], a, b), "addr": lambda a, b: torch.addr(a, a[:, 0], b),
    "linear": lambda a, b: F.linear(a, b.expand(4, 2), a.sum().expand(4)),
    "einsum": lambda a, b: torch.einsum("ij,j,kj->ik", a, b, a), "kron": torch.kron,
    "tensordot": lambda a, b: torch.tensordot(a, b, dims=1),
    "cross": lambda a, b: torch.linalg.cross(a.T, b[:, None].expand(2, 3)),
    "bilinear": lambda a, b: F.bilinear(a, a, b.expand(3, 2, 2)),
    "prelu": lambda a, b: F.prelu(a - 0.7, b), "glu": lambda a, b: F.glu(a * b),
    "layer_norm": lambda a, b: F.layer_norm(a, [2], b, b),
    "group_norm": lambda a, b: F.group_norm(a[..., None] + torch.arange(2), 1, b, b),
    "batch_norm": lambda a, b: F.batch_norm(a, None, None, b, b, training=True),
    "batch_norm_eval": lambda a, b: F.batch_norm(a, torch.ones(2).double(), torch.ones(2).double(), b, b),
    "rms_norm": lambda a, b: F.rms_norm(a, [2], b),
    "instance_norm": lambda a, b: F.instance_norm(a[None], None, None),
    "embedding": lambda a, b: F.embedding(index[:2], a) * b,
    "index_put": lambda a, b: a.index_put((index[:2],), b), "index_add": lambda a, b: a.index_add(0, index[:2], a[:2] * b),
    "index_copy": lambda a, b: a.index_copy(0, index[:2], a[1:] * b),
    "scatter": lambda a, b: a.scatter(0, index[None, :2], b[None]),
    "scatter_add": lambda a, b: a.scatter_add(0, index[None, :2], b[None]),
    "scatter_reduce": lambda a, b: a.scatter_reduce(0, index[None, :2], b[None], "prod"),
    "select_scatter": lambda a, b: a.select_scatter(b, 0, 1),
    "slice_scatter": lambda a, b: a.slice_scatter(b[None], 0, 1, 2),
    "diagonal_scatter": lambda a, b: a.diagonal_scatter(b), "masked_scatter": lambda a, b: a.masked_scatter(a > 0.9, a * b),
}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    f = BINARY[name]
    a, b = positive(3, 2), positive(2) * 1.3
    check(f, a, b)
    if name != "bce":  # Whose formula cannot do this: it writes into a ZeroTensor.
        check(f, a, b, constants=(0,), order=3)
    check(f, a, b, constants=(1,), order=3)


REDUCTIONS = {
    "sum": lambda x: x.sum(), "sum_dim": lambda x: x.sum(1), "mean": lambda x: x.mean(0), "prod": torch.prod,
    "prod_dim": lambda x: x.prod(1), "cumsum": lambda x: x.cumsum(0), "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1), "var": torch.var, "var_dim": lambda x: x.var(1, correction=0),
    "std": lambda x: x.std(1), "var_mean": lambda x: sum(torch.var_mean(x, 1)), "std_mean": lambda x: sum(torch.std_mean(x)),
    "norm": torch.norm, "vector_norm3": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
    "norm1": lambda x: torch.linalg.vector_norm(x, 1), "norm_inf": lambda x: torch.linalg.vector_norm(x, math.inf, dim=0),
    "logsumexp": lambda x: x.logsumexp(1), "logsumexp_keep": lambda x: x.logsumexp((0, 1), keepdim=True),
    "softmax": lambda x: x.softmax(1), "softmax0": lambda x: x.softmax(0), "log_softmax": lambda x: x.log_softmax(1),
    "max": torch.max, "min": torch.min, "max_dim": lambda x: x.max(1).values, "min_dim": lambda x: x.min(0).values,
    "amax": lambda x: x.amax(1), "amin": lambda x: x.amin(0), "aminmax": lambda x: sum(x.aminmax(dim=0)),
    "median": torch.median, "median_dim": lambda x: x.median(0).values, "kthvalue": lambda x: x.kthvalue(2, 0).values,
    "sort": lambda x: x.sort(0).values, "topk": lambda x: x.topk(2, 0).values, "cummax": lambda x: x.cummax(0).values,
    "cummin": lambda x: x.cummin(1).values, "trace": torch.trace, "nansum": torch.nansum, "quantile": lambda x: x.quantile(0.3, 0),
    "cross_entropy": lambda x: F.cross_entropy(x.T, index[:2]), "nll_loss": lambda x: F.nll_loss(x.T.log_softmax(1), index[:2]),
    "normalize": F.normalize, "renorm": lambda x: x.renorm(2, 0, 0.5),
}

SHAPES = {
    "view": lambda x: x.view(6) * x.view(6), "reshape": lambda x: x.reshape(2, 3), "t": lambda x: x.t() @ x,
    "transpose": lambda x: x.transpose(0, 1), "permute": lambda x: x.permute(1, 0), "expand": lambda x: x.expand(2, 3, 3) if x.shape[1] == 3 else x[None].expand(2, 3, 2),
    "select": lambda x: x[1], "slice": lambda x: x[1:, ::2], "narrow": lambda x: x.narrow(0, 1, 2), "unbind": lambda x: torch.stack(x.unbind(1)),
    "split": lambda x: torch.cat(x.split(2)[::-1]), "chunk": lambda x: x.chunk(2)[1], "diagonal": lambda x: x.diagonal(), "diag": lambda x: x[0].diag(),
    "unfold": lambda x: x.unfold(0, 2, 1), "squeeze": lambda x: x[:, None].squeeze(1), "movedim": lambda x: x.movedim(0, 1), "as_strided": lambda x: x.as_strided((2, 2), (2, 1)),
    "flip": lambda x: x.flip(0), "roll": lambda x: x.roll(1, 0), "rot90": torch.rot90, "repeat": lambda x: x.repeat(2, 1), "tile": lambda x: x.tile(2, 2),
    "repeat_interleave": lambda x: x.repeat_interleave(2, 0), "tril": torch.tril, "triu": torch.triu, "gather": lambda x: x.gather(0, index[:2][None]),
    "index": lambda x: x[index[:3], :], "index_select": lambda x: x.index_select(0, index), "mask": lambda x: x[mask], "take": lambda x: x.take(index),
    "masked_select": lambda x: x.masked_select(mask[:, None]), "take_along_dim": lambda x: x.take_along_dim(x.argsort(0), 0),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0), "pad_reflect": lambda x: F.pad(x[None], (1, 1), mode="reflect"), "pad_replicate": lambda x: F.pad(x[None], (2, 1), mode="replicate"),
    "masked_fill_number": lambda x: x.masked_fill(x > 0, 2.0) * x, "index_fill": lambda x: x.index_fill(0, index[:1], 2.0), "scatter_number": lambda x: x.scatter(0, index[None, :2], 5.0),
    "where_number": lambda x: torch.where(x > 0, x * x, 1.0), "diff": lambda x: x.diff(dim=0), "trapezoid": lambda x: torch.trapezoid(x * x, dim=0),
    "fft": lambda x: torch.view_as_real(torch.fft.fft(x * x)), "rfft": lambda x: torch.view_as_real(torch.fft.rfft(x, dim=0)), "irfft": lambda x: torch.fft.irfft(torch.complex(x, x * x)),
    "to_float": lambda x: (x * x).to(torch.float64), "clone": lambda x: x.clone() * x.contiguous(), "meshgrid": lambda x: torch.stack(torch.meshgrid(x[0], x[1], indexing="ij")),
    "block_diag": lambda x: torch.block_diag(x, x * x), "tensor_split": lambda x: x.tensor_split(2)[0], "hstack": lambda x: torch.hstack([x, x * x]),
}

LINALG = {
    "inv": torch.linalg.inv, "det": torch.linalg.det, "slogdet": lambda a: torch.linalg.slogdet(a)[1], "logdet": torch.logdet,
    "cholesky": torch.linalg.cholesky, "solve": lambda a: torch.linalg.solve(a, a[:, :2] * 2), "triangular": lambda a: torch.linalg.solve_triangular(a.tril(), a, upper=False),
    "qr": lambda a: torch.linalg.qr(a).R, "eigvalsh": torch.linalg.eigvalsh, "svdvals": torch.linalg.svdvals, "matrix_exp": lambda a: torch.matrix_exp(a / 9),
    "matrix_power": lambda a: torch.linalg.matrix_power(a, 3), "lstsq": lambda a: torch.linalg.lstsq(a, a[:, :1] * 2).solution, "pinv": torch.linalg.pinv,
    "lu_solve": lambda a: torch.linalg.lu_solve(*torch.linalg.lu_factor(a), a[:, :1]), "cholesky_solve": lambda a: torch.cholesky_solve(a[:, :1], torch.linalg.cholesky(a)),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name):
    check(REDUCTIONS[name], real(3, 2))


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    check(SHAPES[name], real(3, 2))


@pytest.mark.parametrize("name", LINALG)
def test_linalg(name):
    symmetrized = lambda a: LINALG[name]((a + a.T) / 2)  # noqa: E731
    check(symmetrized, spd(3), order=3, tolerance=1e-7)


# Backward passes of these take a shortcut by a factorization, which is no function to autograd.
@pytest.mark.parametrize("name", ["inv", "det", "slogdet", "logdet", "cholesky", "solve", "triangular"])
def test_jet_of_grad_of_linalg(name):
    f = grad(lambda a: LINALG[name]((a + a.T) / 2).square().sum())
    check(f, spd(3), order=2, tolerance=1e-7)


IMAGES = {
    "conv": lambda x, w: F.conv2d(x, w, w.sum((1, 2, 3)), padding=1),
    "conv_transpose": lambda x, w: F.conv_transpose2d(x, w.transpose(0, 1), stride=2),
    "conv1d": lambda x, w: F.conv1d(x[:, :, 0], w[:, :, 0]),
    "max_pool": lambda x, w: F.max_pool2d(x * x, 2), "avg_pool": lambda x, w: F.avg_pool2d(x * x, 2),
    "adaptive_avg": lambda x, w: F.adaptive_avg_pool2d(x, 3), "adaptive_max": lambda x, w: F.adaptive_max_pool2d(x, 2),
    "interpolate": lambda x, w: F.interpolate(x * x, scale_factor=2, mode="bilinear"),
    "nearest": lambda x, w: F.interpolate(x, scale_factor=2), "pixel_shuffle": lambda x, w: F.pixel_shuffle(x.repeat(1, 2, 1, 1), 2),
    "unfold": lambda x, w: F.unfold(x, 2), "fold": lambda x, w: F.fold(F.unfold(x, 2), (4, 4), 2),
    "grid_sample": lambda x, w: F.grid_sample(x, torch.tanh(x[:, :2].permute(0, 2, 3, 1) + 0.013), align_corners=False),
    "lp_pool": lambda x, w: F.lp_pool2d(x * x + 1, 2, 2),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images(name):
    x, w = real(2, 2, 4, 4), real(3, 2, 2, 2)
    check(IMAGES[name], x, w, order=3)
    if name.startswith("conv"):
        check(IMAGES[name], x, w, constants=(0,), order=2)
        check(IMAGES[name], x, w, constants=(1,), order=2)


def test_complex():
    x = torch.randn(3, dtype=torch.complex128)
    for f in (lambda z: z * z.exp(), torch.tanh, lambda z: (z + 3).sqrt(), lambda z: (z + 3).log(),
              lambda z: z.abs(), lambda z: (z * z.conj()).real, lambda z: z.pow(3), torch.sin,
              lambda z: 1 / (z + 3), lambda z: torch.view_as_real(z).sum() * z, torch.sigmoid,
              lambda z: z.angle(), torch.acos, torch.atanh):
        check(lambda z: f(z), x, tolerance=1e-8)


def test_hardsigmoid():  # Its derivative has no formula of forward mode.
    x = real(5) * 3
    s = series_like(x)
    expected = jet(lambda x: (x + 3).clamp(0, 6) / 6, (x,), (s,))
    torch.testing.assert_close(jet(F.hardsigmoid, (x,), (s,)), expected)


# --- known series ---------------------------------------------------------------------------------


def test_series_of_known_functions():
    x, v = torch.zeros((), dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    v[0] = 1
    factorial = torch.tensor([math.factorial(j) for j in range(1, 9)], dtype=torch.float64)
    for f, coefficients in (
        (torch.exp, [1 / math.factorial(j) for j in range(1, 9)]),
        (lambda t: 1 / (1 - t), [1] * 8),
        (torch.log1p, [(-1) ** (j + 1) / j for j in range(1, 9)]),
        (torch.tan, [1, 0, 1 / 3, 0, 2 / 15, 0, 17 / 315, 0]),
        (torch.asin, [1, 0, 1 / 6, 0, 3 / 40, 0, 15 / 336, 0]),
        (lambda t: (1 + t).sqrt(), [1 / 2, -1 / 8, 1 / 16, -5 / 128, 7 / 256, -21 / 1024, 33 / 2048, -429 / 32768]),
        (lambda t: t**3, [0, 0, 1, 0, 0, 0, 0, 0]),
    ):
        _, series = jet(f, (x,), (v,))
        expected = torch.tensor(coefficients, dtype=torch.float64)
        torch.testing.assert_close(series / factorial, expected)


@pytest.mark.parametrize("order", [0, 1])
def test_low_orders(order):
    f = lambda x: torch.tanh(x) * x.sum() + x.sort(0).values + F.softplus(x) + torch.lgamma(x + 9)  # noqa: E731
    x = real(3)
    value, series = jet(f, (x,), (series_like(x, order),))
    torch.testing.assert_close(value, f(x))
    assert series.shape == (order, 3)
    check(f, x, order=order)


def test_high_order():
    x, v = torch.tensor(0.3, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
    v[0] = 1
    _, series = jet(lambda t: torch.sin(t) * torch.exp(t), (x,), (v,))
    # d^n/dt^n e^t sin t = 2^(n/2) e^t sin(t + n pi / 4)
    expected = [2 ** (n / 2) * math.exp(0.3) * math.sin(0.3 + n * math.pi / 4) for n in range(1, 21)]
    torch.testing.assert_close(series, torch.tensor(expected, dtype=torch.float64))


def test_empty_and_scalar():
    f = lambda x: torch.softmax(x * x, -1) + x.exp() if x.dim() else x.exp() * x  # noqa: E731
    for x in (real(0), real(2, 0), real()):
        value, series = jet(f, (x,), (series_like(x),))
        assert value.shape == x.shape and series.shape == (ORDER, *x.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    f = lambda x: F.layer_norm(torch.sin(x) + 2.0, [4]) * x.softmax(0) + F.gelu(x) + 1 / (x + 5)  # noqa: E731
    x, s = real(4), series_like(real(4), 2)
    value, series = jet(f, (x.to(dtype),), (s.to(dtype),))
    assert value.dtype == dtype and series.dtype == dtype
    _, exact = jet(f, (x.to(dtype).double(),), (s.to(dtype).double(),))
    tolerance = 1e-4 if dtype == torch.float32 else 0.3
    torch.testing.assert_close(series.double(), exact, rtol=tolerance, atol=tolerance)


def test_type_promotion_of_numbers_and_constants():
    x = torch.tensor(2.0)
    value, series = jet(lambda x: x + 1.5, (x,), (torch.ones(2),))
    assert value.dtype == torch.float32 and series.dtype == torch.float32
    double = torch.tensor(3.0, dtype=torch.float64)
    for f in (lambda x: x * double, lambda x: x + double, lambda x: x / double, lambda x: double / x):
        value, series = jet(f, (x,), (torch.ones(2),))
        assert value.dtype == f(x).dtype == torch.float64 and series.dtype == torch.float64
    value, series = jet(lambda x, y: x * y, (x, double), (torch.ones(2), torch.ones(2).double()))
    assert value.dtype == torch.float64 and series.dtype == torch.float64


# --- in place ---------------------------------------------------------------------------------------

double = {"dtype": torch.float64}
IN_PLACE = {
    "mul_": lambda x: (x * 1).mul_(x), "exp_": lambda x: (x * 1).exp_(), "add_": lambda x: (x * x).add_(2.0).add_(x),
    "add_constant": lambda x: (x * x).add_(torch.ones(2, **double)), "sub_": lambda x: (x * x).sub_(x, alpha=3),
    "div_": lambda x: (x * 1).div_(x * x + 2), "pow_": lambda x: (x * 1).pow_(3),
    "pow_tensor": lambda x: (x * x + 1).pow_(x), "relu_": lambda x: (x * 1).relu_(),
    "clamp_": lambda x: (x * x).clamp_(max=0.8), "lgamma_": lambda x: (x * x + 1).lgamma_(),
    "zero_": lambda x: (x * 1).zero_() + x, "fill_": lambda x: (x * 1).fill_(3.0) * x,
    "floor_": lambda x: (x * 1).floor_() + x, "sigmoid_": lambda x: (x * 1).sigmoid_(),
    "masked_fill_": lambda x: (x * x).masked_fill_(x > 0, 2.0), "index_put_": lambda x: index_write(x),
    "addmm_": lambda x: (x.T @ x).addmm_(x.T, x), "addcmul_": lambda x: (x * 1).addcmul_(x, x),
    "copy_": lambda x: (x * 1).copy_(x[0] * x[0]), "copy_constant": lambda x: (x * 1).copy_(torch.ones(2, **double)) + x,
    "t_": lambda x: (x * x).t_(), "transpose_": lambda x: (x * x).transpose_(0, 1),
    "squeeze_": lambda x: (x * x)[:, None].clone().squeeze_(1), "view": lambda x: write_view(x),
    "index_add_": lambda x: (x * 1).index_add_(0, index[:3], x * x), "lerp_": lambda x: (x * 1).lerp_(x * x, 0.3),
    "cumsum_": lambda x: (x * x).cumsum_(0), "cumprod_": lambda x: (x * 1).cumprod_(0), "triu_": lambda x: (x * x).triu_(),
    "foreach": lambda x: sum(torch._foreach_mul([x, x * x], [x, x])), "foreach_exp": lambda x: sum(torch._foreach_exp([x, x * x])),
}
# What nested jvps cannot write, and the same without writing.
WRITES = {
    "buffer": (lambda x: write_buffer(x), lambda x: written_buffer(x)),
    "mul_": (lambda x: torch.ones(3, 2, **double).mul_(x).mul_(x), lambda x: x * x),
    "exp_": (lambda x: torch.ones(3, 2, **double).add_(x).exp_(), lambda x: (x + 1).exp()),
    "out": (lambda x: torch.mul(x, x, out=torch.zeros(3, 2, **double)), lambda x: x * x),
    "out_exp": (lambda x: torch.exp(x, out=x * 1), torch.exp),
    "out_empty": (lambda x: torch.add(x, 1.0, out=torch.zeros(0, **double)), lambda x: x + 1),
    "detach_": (lambda x: (x * x).detach_() * x, lambda x: (x * x).detach() * x),
    "scatter_": (lambda x: torch.zeros(3, 2, **double).scatter_(0, index[None, :2], x[:1] * x[:1]),
                 lambda x: torch.zeros(3, 2, **double).scatter(0, index[None, :2], x[:1] * x[:1])),
    "integers": (lambda x: torch.zeros(3, 2).long().copy_(x * 5) * x, lambda x: (x * 5).long() * x),
    "random": (lambda x: (x * 1).normal_().zero_() + (x * 1).bernoulli_(0.5).mul_(0) + x, lambda x: x),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name):
    f, functional = WRITES[name]
    x = real(3, 2)
    s = series_like(x)
    value, got = jet(f, (x,), (s,))
    torch.testing.assert_close(value, functional(x))
    torch.testing.assert_close(got, nested(functional, (x,), (s,)))


def written_buffer(x):
    top = (x[0] * x[1])[None]
    return torch.cat([top, x[:2], (x[2] * x[0])[None]]) ** 2


def index_write(x):
    y = x * x
    y[index[:2]] = x[:2] * x[1:]
    y[0, 1] = 5.0
    return y * y


def write_view(x):
    y = x * x
    y[1].mul_(x[0])
    y[:, 0] += x[:, 1] * x[:, 1]
    y.view(6)[4:].exp_()
    return y * x


def write_buffer(x):
    z = torch.zeros(4, 2, dtype=torch.float64)
    row = z[3]
    z[0] = x[0] * x[1]
    z[1:] += x
    row.mul_(x[0])
    return z * z


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place(name):
    check(IN_PLACE[name], real(3, 2))


def test_results_of_writes_fit():
    x = real(3)
    with pytest.raises(RuntimeError, match=r"shape \[3, 3\], which cannot be written into a tensor of shape \[3\]"):
        jet(lambda x: (x * 1).mul_(x[:, None]), (x,), (series_like(x),))


def test_f_writes_into_a_copy_of_its_primal():
    x = real(3)
    before = x.clone()
    value, series = jet(lambda x: x.mul_(x), (x,), (series_like(x, 1),))
    torch.testing.assert_close(x, before)
    torch.testing.assert_close(value, before * before)


# --- constants ---------------------------------------------------------------------------------------


def test_detach_no_grad_and_comparisons_are_constants():
    def f(x):
        with torch.no_grad():
            c = (x * x).sum()
            y = x[0].exp()
        n = (x > 0).sum() + x.argmax() + x.round().sum()
        return x * c + x * x.detach() + y * x * n + torch.floor(x) + torch.sign(x) * x

    check(f, real(3))


def test_no_grad_write_keeps_derivatives():
    def f(x):
        y = x * x
        with torch.no_grad():
            y.mul_(2.0)
        return y

    x, s = real(3), series_like(real(3), 2)
    value, series = jet(f, (x,), (s,))
    torch.testing.assert_close(value, 2 * x * x)
    torch.testing.assert_close(series, jet(lambda x: x * x, (x,), (s,))[1])


def test_values_decide():
    def f(x):
        if x.sum() > 0 and bool(x[0] < 100) and float(x[1]) < 100:
            return x * x * x.sum().item()
        return x.sin() * int(x[0])

    check(f, real(3).abs())
    check(f, -real(3).abs())


def test_random_numbers_are_constants():
    def f(x):
        torch.manual_seed(3)
        y = torch.randn_like(x) * x + torch.rand(3).double() * x * x
        return y + F.dropout(x * x, 0.5) + (x * 1).normal_() + torch.nn.functional.dropout1d(x.expand(1, 2, 3) * 1, 0.5).sum(1)[0]

    x, s = real(3), series_like(real(3))
    _, series = jet(f, (x,), (s,))
    torch.testing.assert_close(series, nested(f, (x,), (s,)))


def test_unused_and_constant_outputs():
    x = real(3)
    (a, b), (da, db) = jet(lambda x: (torch.ones(2), x * 1), (x,), (series_like(x),))
    assert da.shape == (ORDER, 2) and (da == 0).all() and db.shape == (ORDER, 3)


def test_control_flow():
    def f(x):
        y = torchlift.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x * x, x)
        z = torchlift.fori_loop(0, 3, lambda i, y: y * x, y)
        z = z + torchlift.while_loop(lambda y: y.abs().sum() > 0.1, lambda y: y * 0.5 * x.tanh(), y)
        return torchlift.scan(lambda c, v: (c * v, c + v), z.sum(), x)[1]

    check(f, real(3), order=3)


def test_checkpoint():
    f = lambda x: torchlift.checkpoint(lambda x: (x * x).sin(), x) * x  # noqa: E731
    check(f, real(3), order=3)
    check(grad(lambda x: f(x).sum()), real(3), order=2)


def test_autocast():
    x, w = torch.randn(3, 3), torch.randn(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value, series = jet(lambda x: (x @ w + 1).sin(), (x,), (torch.randn(2, 3, 3),))
    assert value.dtype == torch.bfloat16 and series.dtype == torch.bfloat16


# --- modules -----------------------------------------------------------------------------------------


def test_mlp_with_series_of_parameters():
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.LayerNorm(4), torch.nn.Linear(4, 2)).double()
    params = {n: p.detach() for n, p in module.named_parameters()}
    x = real(5, 3)
    f = lambda p, x: torchlift.functional_call(module, p, (x,))  # noqa: E731
    series = ({n: series_like(p, 3) for n, p in params.items()}, series_like(x, 3))
    value, got = jet(f, (params, x), series)
    names = list(params)
    flat = lambda *a: f(dict(zip(names, a[:-1])), a[-1])  # noqa: E731
    expected = nested(flat, (*params.values(), x), (*series[0].values(), series[1]))
    torch.testing.assert_close(got, expected)
    # The parameters as constants, one whole argument.
    _, got = jet(f, (params, x), (None, series[1]))
    torch.testing.assert_close(got, nested(lambda x: f(params, x), (x,), (series[1],)))


def test_attention():
    q, k, v = real(2, 3, 4), real(2, 3, 4), real(2, 3, 4)
    written = lambda q, k, v: torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v  # noqa: E731
    check(written, q, k, v, order=3)
    fused = lambda q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None], scale=0.5)[0]  # noqa: E731
    series = tuple(series_like(t, 2) for t in (q, k, v))
    torch.testing.assert_close(jet(fused, (q, k, v), series)[1], jet(written, (q, k, v), series)[1])


@pytest.mark.parametrize("make", [
    lambda: torch.nn.MultiheadAttention(4, 2), lambda: torch.nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True),
    lambda: torch.nn.GRU(4, 3), lambda: torch.nn.LSTM(4, 3),
    lambda: torch.nn.Sequential(torch.nn.Conv1d(3, 2, 2), torch.nn.BatchNorm1d(2).eval(), torch.nn.GELU()),
])
def test_layers(make):
    module = make().double()
    for p in module.parameters():
        p.requires_grad_(False)

    def f(x):
        out = module(x, x, x) if isinstance(module, torch.nn.MultiheadAttention) else module(x)
        return out[0] if isinstance(out, tuple) else out

    check(f, real(2, 3, 4), order=2)


# --- compositions ------------------------------------------------------------------------------------


def g(x):
    return torch.tanh(x) * x.prod() + torch.log_softmax(x * x, 0) + (x.outer(x) @ x).sin()


def test_jet_of_grad():
    check(grad(lambda x: g(x).sum()), real(3), order=3)
    check(lambda x: vjp(g, x)[1](x.cos())[0], real(3), order=3)
    w = real(3, 3)
    mlp = lambda x: F.layer_norm(F.silu(F.gelu(x @ w).relu() + torch.sigmoid(x)), [3]).softmax(-1).pow(2).sum()  # noqa: E731
    check(grad(mlp), real(2, 3), order=3)
    check(grad(lambda x: F.cross_entropy(x.sin() @ w, index[:2])), real(2, 3), order=3)
    x = real(3, 4)
    s = series_like(x, 3)
    halves = lambda x: (x[:, :2] * x[:, 2:].sigmoid()).square().sum()  # noqa: E731
    got = jet(grad(lambda x: F.glu(x).square().sum()), (x,), (s,))[1]
    torch.testing.assert_close(got, nested(grad(halves), (x,), (s,)))


def test_jet_of_grad_of_convolutions():
    w = real(2, 1, 2, 2)
    loss = lambda x, w: F.max_pool2d(F.conv2d(x, w, padding=1).tanh(), 2).square().sum()  # noqa: E731
    check(grad(loss), real(1, 1, 3, 3), w, order=3)
    check(grad(loss, argnums=1), real(1, 1, 3, 3), w, order=3)


def test_jet_of_grad_with_writes():
    def loss(x):
        z = torch.zeros(3, dtype=torch.float64)
        z[0] = x[0] * x[1]
        z[1:] = x[1:].exp()
        y = z * x
        y.mul_(x)
        return (y.relu_() * y).sum()

    def functional(x):
        y = torch.cat([(x[0] * x[1])[None], x[1:].exp()]) * x * x
        return y.relu().square().sum()

    x = real(3)
    s = series_like(x, 3)
    torch.testing.assert_close(jet(grad(loss), (x,), (s,))[1], nested(grad(functional), (x,), (s,)))


def test_jet_of_other_transforms():
    check(lambda x: jvp(g, (x,), (x.cos(),))[1], real(3), order=3)
    check(jacfwd(g), real(3), order=2)
    check(jacrev(g), real(3), order=2)
    check(torchlift.hessian(lambda x: g(x).sum()), real(3), order=2)
    check(vmap(g), real(2, 3), order=3)
    check(vmap(grad(lambda x: g(x).sum())), real(2, 3), order=2)
    check(vmap(g), real(1, 3), order=2)


def flat_jet(f):
    def run(x):
        value, series = jet(f, (x,), (torch.stack([x.cos(), x.sin(), x * x]),))
        return value + series.sum(0)

    return run


def by_nest(f):
    def run(x):
        return f(x) + nested(f, (x,), (torch.stack([x.cos(), x.sin(), x * x]),)).sum(0)

    return run


# libtorch's jvp of softmax writes in place, and cannot be differentiated in reverse mode.
def smooth(x):
    e = (x * x).exp()
    return torch.tanh(x) * x.prod() + e / e.sum() + (x.outer(x) @ x).sin() + torch.lgamma(x * x + 1)


def test_vmap_of_jet():
    x = real(2, 3)
    torch.testing.assert_close(vmap(flat_jet(g))(x), torch.stack([flat_jet(g)(row) for row in x]))
    torch.testing.assert_close(vmap(flat_jet(g))(x[:1]), flat_jet(g)(x[0])[None])
    assert vmap(flat_jet(torch.sin))(x[:0]).shape == (0, 3)
    s = real(4, 2, 3)
    _, series = vmap(lambda x, s: jet(g, (x,), (s,)), in_dims=(0, 1), out_dims=(0, 1))(x, s)
    torch.testing.assert_close(series[:, 1], jet(g, (x[1],), (s[:, 1],))[1])


def test_jet_of_jet():
    check(flat_jet(g), real(3), order=2)
    torch.testing.assert_close(flat_jet(flat_jet(g))(torch.ones(3).double()), by_nest(by_nest(g))(torch.ones(3).double()))


def test_grad_of_jet():
    x = real(3)
    f = lambda x: flat_jet(smooth)(x).sum()  # noqa: E731
    torch.testing.assert_close(grad(f)(x), grad(lambda x: by_nest(smooth)(x).sum())(x))
    torch.autograd.gradcheck(flat_jet(lambda x: x.sort().values * torch.lgamma(x + 5) * x.softmax(0)), x.requires_grad_())
    torch.autograd.gradgradcheck(flat_jet(lambda x: (x.sin() * x).exp()), real(2).requires_grad_())


def test_grad_to_what_the_function_closes_over():
    w = real(3, 3).requires_grad_()
    x = real(3)
    s = series_like(x, 2)
    loss = lambda f: f(lambda x: torch.tanh(w @ x), (x,), (s,)).pow(2).sum()  # noqa: E731
    got = torch.autograd.grad(loss(lambda *a: jet(*a)[1]), w)[0]
    torch.testing.assert_close(got, torch.autograd.grad(loss(nested), w)[0])
    with torch.no_grad():
        value, series = jet(lambda x: torch.tanh(w @ x), (x,), (s,))
    assert not value.requires_grad and not series.requires_grad
    torch.testing.assert_close(series, nested(lambda x: torch.tanh(w @ x), (x,), (s,)).detach())


def test_jvp_of_jet():
    x, v = real(3), real(3)
    for transform in (lambda f: jvp(f, (x,), (v,))[1], lambda f: jacfwd(f)(x), lambda f: jacrev(f)(x),
                      lambda f: torchlift.hessian(lambda x: f(x).sum())(x)):
        torch.testing.assert_close(transform(flat_jet(smooth)), transform(by_nest(smooth)))
    assert (vmap(grad(lambda x: flat_jet(g)(x).sum()))(real(2, 3))).shape == (2, 3)


def test_no_grad_around_and_inside():
    x, s = real(3), series_like(real(3), 2)

    def f(x):
        with torch.no_grad():
            c = x.exp()
        return c * x

    with torch.no_grad():
        inside = jet(f, (x,), (s,))[1]
        expected = jet(lambda x: grad(lambda x: g(x).sum())(x), (x,), (s,))[1]
    torch.testing.assert_close(inside, s * x.exp())
    torch.testing.assert_close(expected, nested(grad(lambda x: g(x).sum()), (x,), (s,)))


def test_has_aux_and_trees():
    x = {"a": real(2), "b": [real(3)]}
    s = {"a": real(2, 2), "b": [real(2, 3)]}

    def f(x):
        return {"y": x["a"].sin(), "z": (x["b"][0] * x["a"].sum(),)}, ("aux", x["a"] * 2)

    value, series, aux = jet(f, (x,), (s,), has_aux=True)
    assert aux[0] == "aux"
    torch.testing.assert_close(aux[1], x["a"] * 2)
    torch.testing.assert_close(series["y"], jet(torch.sin, (x["a"],), (s["a"],))[1])
    assert series["z"][0].shape == (2, 3) and value["z"][0].shape == (3,)
    _, series, _ = jet(f, (x,), ({"a": s["a"], "b": [None]},), has_aux=True)
    torch.testing.assert_close(series["z"][0], x["b"][0] * s["a"].sum(1, keepdim=True))


# --- errors ------------------------------------------------------------------------------------------


def fails(match, primals, series, f=torch.sin, error=TransformError, **options):
    with pytest.raises(error, match=match):
        jet(f, primals, series, **options)


def test_bad_arguments():
    x = real(3)
    fails(r"jet\(sin, .*primals must be a tuple", x, (x,))
    fails("series must be a tuple, .*For one argument pass", (x,), real(2, 3))
    fails("no primals", (), ())
    fails(r"has dtype torch.int64 .*only tensors of a floating", (torch.ones(3).long(),), (torch.ones(2, 3),))
    fails(r"the series have structure .*the primals have structure", (x,), ((real(2, 3),),))
    fails(r"the series have structure", (x,), (real(2, 3), real(2, 3)))
    fails(r"the series of argument 0.* has shape \[2, 4\] .*must have shape \[K, 3\].*Stack the derivatives", (x,), (real(2, 4),))
    fails(r"has shape \[3\] .*must have shape \[K, 3\]", (x,), (x,))
    fails(r"dtype torch.float32, but must have .*torch.float64. Convert it", (x,), (torch.ones(2, 3),))
    fails(r"is a list|must be a tensor of shape \[K, 3\]|structure", (x,), ([x, x],))
    fails(r"has 3 derivatives, but the series of argument 0.* has 2. All series must have the same order", (x, x), (real(2, 3), real(3, 3)), torch.add)
    fails("there is no series, so the order is not known", (x,), (None,))
    fails("returned no tensor", (x,), (real(2, 3),), lambda x: ())
    fails("must return tensors", (x,), (real(2, 3),), lambda x: 3)


def test_operators_that_cannot_be_expanded():
    x = real(3)
    fails("jet.*no derivative formula of forward mode|forward", (x,), (real(2, 3),), lambda x: x.to(torch.float32).to_mkldnn().to_dense(), (UnsupportedError, RuntimeError))
    fails("aten::set_|jet", (x,), (real(2, 3),), lambda x: (x * 1).set_(x * 2), (UnsupportedError, RuntimeError))


def test_functions_with_rules_of_their_own():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    @torchlift.custom_jvp
    def custom(x):
        return x * 2

    custom.defjvp(lambda primals, tangents: (primals[0] * 2, tangents[0] * 2))
    x = real(3)
    fails(r"\[jet\] an autograd Function: a function with a rule of its own", (x,), (real(2, 3),), Twice.apply, UnsupportedError)
    fails(r"rule of its own", (x,), (real(2, 3),), custom, UnsupportedError)
    fails(r"rule of its own", (x,), (real(2, 3),), lambda x: vmap(Twice.apply)(x), UnsupportedError)
    value, series = jet(lambda x: x * Twice.apply(x.detach()), (x,), (real(2, 3),))
    torch.testing.assert_close(value, 2 * x * x)


PULLBACKS = {
    "jvp": lambda x, g: jvp(torch.sin, (x,), (g,))[1],
    "jvp of jvp": lambda x, g: jvp(lambda y: jvp(lambda z: -z.cos(), (y,), (torch.ones_like(y),))[1], (x,), (g,))[1],
    "jacfwd": lambda x, g: jacfwd(torch.sin)(x) * g,
    "vjp": lambda x, g: vjp(torch.sin, x)[1](g)[0],
    "jet": lambda x, g: jet(torch.sin, (x,), (g.unsqueeze(0),))[1][0],
}


@pytest.mark.parametrize("pullback", PULLBACKS.values(), ids=PULLBACKS)
def test_forward_mode_in_a_pullback(pullback):
    """GradMode is off in a backward pass, which no transform in a rule may take for no_grad."""

    @torchlift.custom_vjp
    def sine(x):
        return x.sin()

    sine.defvjp(lambda x: (x.sin(), x), lambda x, g: (pullback(x, g),))
    x, t, one = real(), real(), torch.ones((), dtype=torch.float64)
    series = real(3)

    def compositions(sine):
        def gradient(w, t):
            return grad(lambda w: sine(w) * t.exp() + sine(w) ** 2 * t)(w)

        def along(w, t):
            return jet(lambda t: gradient(w, t), (t,), (series,))[1]

        def by_both(w):
            return jvp(lambda t: along(w, t), (t,), (one,))[1]

        batch = torch.stack([x, 2 * x])
        return (
            along(x, t),
            jvp(lambda w: along(w, t), (x,), (one,))[1],
            jvp(lambda t: along(x, t), (t,), (one,))[1],
            jvp(by_both, (x,), (one,))[1],
            grad(lambda w: along(w, t).sum())(x),
            jvp(grad(lambda w: along(w, t).sum()), (x,), (one,))[1],
            vmap(lambda v: jvp(lambda w: along(w, t), (v,), (one,))[1])(batch),
            jvp(lambda v: jet(lambda t: vmap(lambda w: gradient(w, t))(v), (t,), (series,))[1], (batch,), (torch.ones_like(batch),))[1],
        )

    torch.testing.assert_close(compositions(sine), compositions(torch.sin), rtol=1e-10, atol=1e-10)


def test_tensor_escapes():
    kept = []
    x = real(3)
    jet(lambda x: kept.append(x) or x, (x,), (real(2, 3),))
    with pytest.raises(RuntimeError, match="jet level 1"):
        kept[0] + 1
