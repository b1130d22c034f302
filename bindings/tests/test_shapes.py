"""Tracing by shapes: that the graph is that of tracing with numbers, and that nothing is computed."""

import os
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.testing import assert_close

import torchlift
from torchlift import (
    ShapeDtype,
    TransformError,
    UnsupportedError,
    cond,
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jet,
    jvp,
    make_fx,
    scan,
    trace,
    vjp,
    vmap,
    while_loop,
)

tree_map = torch.utils._pytree.tree_map


def data(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype)


def index(high, *shape):
    return torch.randint(0, high, shape)


def positive(*shape):
    return torch.rand(*shape) + 0.5


def spd(n):
    a = data(n, n)
    return a @ a.T + n * torch.eye(n)


def shapes_of(args):
    return tree_map(lambda x: ShapeDtype.of(x) if isinstance(x, torch.Tensor) else x, args)


def on_meta(args):
    return tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, args)


def tensors_of(tree):
    return [leaf for leaf in torchlift._pytree.flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def types_of(traced):
    """Of all values; strides where there is more than one element to step over."""
    types = traced.graph.value_types()
    return [
        (name, dtype, sizes, [stride for size, stride in zip(sizes, strides) if size > 1 and 0 not in sizes])
        for name, dtype, sizes, strides in types
    ]


def bits_of(tensor):
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(got, expected):
    got, expected = tensors_of(got), tensors_of(expected)
    assert len(got) == len(expected)
    for a, b in zip(got, expected):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert torch.equal(bits_of(a), bits_of(b))


# --- the graph is the same -------------------------------------------------------------------------

CASES = {}


def case(name, f, *args, **options):
    CASES[name] = (f, args, options)


def sum_of(f):
    """f's results as one number, to be differentiated: weighted, so that no gradient is constant."""

    def total(*args):
        return sum((y * torch.cos(y.detach())).sum() for y in tensors_of(f(*args)))

    return total


def gradient(f, *, argnums=0):
    return grad(sum_of(f), argnums=argnums)


def mlp(p, x):
    return torch.tanh(x @ p["w1"] + p["b1"]) @ p["w2"]


def loss(p, x, y):
    return F.cross_entropy(mlp(p, x), y)


P = {"w1": data(5, 7), "b1": data(7), "w2": data(7, 3)}
X, Y = data(8, 5), index(3, 8)
IMAGE, KERNEL = data(2, 3, 8, 8), data(4, 3, 3, 3)

# transforms
case("grad", grad(loss), P, X, Y)
case("per_sample_grad", vmap(grad(loss), (None, 0, 0)), P, X, Y)
case("vmap", vmap(lambda x, w: torch.softmax(x @ w, -1), (0, None)), X, P["w1"])
case("jacrev", jacrev(mlp), P, X[0])
case("jacfwd", jacfwd(mlp), P, X[0])
case("hessian", hessian(lambda x: torch.tanh(x @ P["w1"]).square().sum()), X[0])
case("vmap_hessian", vmap(hessian(lambda x: torch.tanh(x @ P["w1"]).square().sum())), X)
case("jvp", lambda x, t: jvp(lambda v: torch.sin(v) * v.cumsum(-1), (x,), (t,)), X, X)
case("jvp_of_jvp", lambda x: jvp(lambda u: jvp(torch.tanh, (u,), (u,))[1], (x,), (x,))[1], X)
case("vjp", lambda x, g: vjp(lambda v: torch.exp(v).cumsum(-1), x)[1](g), X, X)
case("jet", lambda x, v: jet(torch.tanh, (x,), (torch.stack([v, v]),)), X, X)
case("vmap_vmap", vmap(vmap(lambda x: torch.outer(x, x).sum(0), 0), 1), data(3, 4, 5))
case("grad_of_grad", grad(lambda x: grad(lambda v: torch.sin(v).sum())(x).square().sum()), X)
case("autograd", lambda x: torch.autograd.grad(
    sum_of(torch.tanh)(y := x.clone().requires_grad_()), y)[0], X)
case("checkpoint",
     grad(lambda x: torchlift.checkpoint(lambda v: torch.tanh(v @ P["w1"]).square().sum(), x)), X)
case("ensemble", vmap(mlp, (0, None)), tree_map(lambda t: torch.stack([t] * 3), P), X)
# in place, views, constants, factories, numbers
case("in_place", lambda x: x.clone().mul_(2).add_(x).t_().contiguous(), X)
case("write_to_view", lambda x: (y := x * 2, y[1].add_(x[0]), y[:, 0].mul_(3), y + 1)[-1], X)
case("zeros_and_write", lambda x: (z := torch.zeros(6, 5), z[:2].add_(x[:2]), z.sum(0))[-1], X)
case("vmap_write", vmap(lambda x: (z := torch.zeros(7), z[1:6].add_(x), z * 2)[-1]), X)
case("setitem_mask", lambda x: torch.where(x > 0, x, torch.full_like(x, -1.0)), X)
case("captured", lambda x: x @ P["w1"] + P["b1"].exp(), X)
case("factories", lambda x: x + torch.arange(5.0) + x.new_ones(5) + torch.eye(8, 5), X)
case("argument_written", lambda x: (x.mul_(2), x + 1)[-1], X)
case("view_of_argument", lambda x: x.t().reshape(-1).view(5, 8)[::2].unflatten(1, (2, 4)), X)
case("strided_argument", lambda x: (x.reshape(-1), x.contiguous() * 2), data(5, 8).t())
case("channels_last", lambda x: (torch.relu(x).reshape(2, -1), x * 2),
     data(2, 3, 4, 5).contiguous(memory_format=torch.channels_last))
case("numbers", lambda x, n: x * n + 2 - x.size(0), X, 3)
case("complex", lambda x: torch.view_as_real((torch.complex(x, x * 2).conj() * x).resolve_conj()), X)
case("half", lambda x: (x @ x.t()).float().sum(), data(4, 4, dtype=torch.bfloat16))
case("autocast", lambda x, w: _autocast(x, w), X, data(5, 6))
# random
case("dropout", lambda x: F.dropout(x, 0.5), X, random=True)
case("dropout_gradient", gradient(lambda x: F.dropout(x * x, 0.5)), X, random=True)
case("randn", lambda x: x + torch.randn(8, 5) + torch.randn_like(x), X, random=True)
case("vmap_different", vmap(lambda x: x + torch.rand(5), randomness="different"), X, random=True)
case("vmap_same", vmap(lambda x: x + torch.rand(5), randomness="same"), X, random=True)
case("normal_in_place", lambda x: x.clone().normal_() + x.bernoulli(0.5), X, random=True)
case("multinomial", lambda x: torch.multinomial(x.exp(), 3), X, random=True)
# control flow
case("cond", lambda x: cond(x.sum() > 0, torch.sin, lambda v: v * 2, x), X)
case("cond_gradient", gradient(lambda x: cond(x.sum() > 0, torch.sin, torch.cos, x)), X)
case("cond_vmap", vmap(lambda x: cond(x.sum() > 0, torch.sin, torch.cos, x)), X)
case("while", lambda x: while_loop(lambda v: v.sum() < 100, lambda v: v * 2 + 1, x), X.abs())
case("while_vmap",
     vmap(lambda x: while_loop(lambda v: v.sum() < 100, lambda v: v * 2 + 1, x)), X.abs())
case("scan", lambda x: scan(lambda c, row: (c + row, c * row), torch.zeros(5), x), X)
case("scan_vmap", vmap(lambda x: scan(lambda c, v: (c + v, c * v), torch.zeros(()), x)), X)
case("scan_gradient",
     gradient(lambda x: scan(lambda c, row: (torch.sin(c + row), c), torch.zeros(5), x)[0]), X)
# layers
case("conv", lambda x, w: F.conv2d(x, w, padding=1), IMAGE, KERNEL)
case("conv_gradient", gradient(lambda x, w: F.conv2d(x, w, stride=2), argnums=(0, 1)), IMAGE, KERNEL)
case("conv_vmap_gradient",
     vmap(gradient(lambda w, x: F.conv2d(x[None], w, padding=1)), (None, 0)), KERNEL, IMAGE)
case("conv_channels_last", lambda x, w: F.conv2d(x, w).relu().flatten(1),
     IMAGE.contiguous(memory_format=torch.channels_last), KERNEL)
case("conv_transpose", lambda x, w: F.conv_transpose2d(x, w, stride=2), data(2, 4, 5, 5), KERNEL)
case("conv1d_dilated", lambda x, w: F.conv1d(x, w, dilation=2), data(2, 3, 9), data(4, 3, 3))
case("conv3d", gradient(lambda x, w: F.conv3d(x, w)), data(1, 2, 4, 4, 4), data(3, 2, 2, 2, 2))
case("attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
     *(data(2, 4, 6, 8) for _ in range(3)))
case("attention_gradient",
     gradient(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), argnums=(0, 1, 2)),
     *(data(2, 4, 6, 8) for _ in range(3)))
case("attention_mask", lambda q, m: F.scaled_dot_product_attention(q, q, q, attn_mask=m),
     data(2, 4, 6, 8), data(6, 6))
case("batch_norm", lambda x, m, v: F.batch_norm(x, m.clone(), v.clone(), training=True),
     IMAGE, torch.zeros(3), torch.ones(3))
case("batch_norm_gradient", gradient(lambda x, w: F.batch_norm(x, None, None, w, training=True)),
     IMAGE, data(3))
case("batch_norm_eval", lambda x, m, v: F.batch_norm(x, m, v), IMAGE, data(3), positive(3))
case("layer_norm", gradient(lambda x, w: F.layer_norm(x, (5,), w)), X, data(5))
case("group_norm", gradient(lambda x: F.group_norm(x, 2)), data(2, 4, 3))
case("instance_norm", gradient(F.instance_norm), IMAGE)
case("rms_norm", gradient(lambda x: F.rms_norm(x, (5,))), X)
case("max_pool", gradient(lambda x: F.max_pool2d(x, 2)), IMAGE)
case("avg_pool", gradient(lambda x: F.avg_pool2d(x, 3, 2)), IMAGE)
case("adaptive_pool", gradient(lambda x: F.adaptive_avg_pool2d(x, 3)), IMAGE)
case("adaptive_max_pool", gradient(lambda x: F.adaptive_max_pool2d(x, 3)), IMAGE)
case("interpolate", gradient(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), IMAGE)
case("grid_sample", gradient(lambda x, g: F.grid_sample(x, g, align_corners=False)),
     IMAGE, torch.rand(2, 4, 4, 2))
case("pad", gradient(lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect")), IMAGE)
case("unfold", gradient(lambda x: F.unfold(x, 3)), IMAGE)
case("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), data(1, 8, 3, 3))
case("embedding", gradient(lambda w, i: F.embedding(i, w)), data(9, 4), index(9, 6))
case("embedding_bag", lambda w, i: F.embedding_bag(i, w, mode="mean"), data(9, 4), index(9, 2, 3))
case("prelu", gradient(F.prelu, argnums=(0, 1)), IMAGE, positive(3))
case("activations", gradient(
    lambda x: F.gelu(x) + F.silu(x) + F.elu(x) + F.softplus(x) + F.hardswish(x) + F.glu(
        torch.cat([x, x], -1)) + F.mish(x) + F.logsigmoid(x)), X)
case("weight_norm", lambda v, g: torch._weight_norm(v, g, 0), data(4, 5), positive(4, 1))
# losses
case("nll", grad(lambda x, y: F.nll_loss(F.log_softmax(x, -1), y)), data(8, 3), Y)
case("mse", grad(F.mse_loss), X, X)
case("huber", grad(F.huber_loss), X, X)
case("smooth_l1", grad(F.smooth_l1_loss), X, X)
case("bce", grad(lambda x, y: F.binary_cross_entropy(torch.sigmoid(x), y)), X, torch.rand(8, 5))
case("bce_logits", grad(F.binary_cross_entropy_with_logits), X, torch.rand(8, 5))
case("kl", grad(lambda x, y: F.kl_div(x, y, reduction="batchmean")), X, torch.rand(8, 5))
case("triplet", grad(F.triplet_margin_loss), X, data(8, 5), data(8, 5))
case("cosine", gradient(F.cosine_similarity), X, data(8, 5))
# sorting, indexing, reductions
case("sort", gradient(lambda x: torch.sort(x, dim=0)[0]), X)
case("topk", gradient(lambda x: x.topk(3)[0]), X)
case("argsort", lambda x: (x.argsort(-1), x.argmax(0), x.median(0).values, x.mode(0).values), X)
case("kthvalue", gradient(lambda x: x.kthvalue(2)[0]), X)
case("cummax", gradient(lambda x: x.cummax(0)[0]), X)
case("gather", gradient(lambda x, i: x.gather(0, i)), X, index(8, 4, 5))
case("scatter", gradient(lambda x, i: x.scatter_add(0, i, x[:4] * 2)), X, index(8, 4, 5))
case("scatter_reduce", lambda x, i: x.scatter_reduce(0, i, x[:4], "amax"), X, index(8, 4, 5))
case("index", gradient(lambda x, i: x[i, 1:3]), X, index(8, 6))
case("index_two", lambda x, i, j: x[i, :, j], data(4, 5, 6), index(4, 7), index(6, 7))
case("index_put", gradient(lambda x, i: x.index_put((i,), x[:6].sin(), accumulate=True)), X, index(8, 6))
case("index_select", gradient(lambda x, i: x.index_select(1, i)), X, index(5, 6))
case("index_add", lambda x, i: x.index_add(0, i, x[:6]), X, index(8, 6))
case("take_along", lambda x: torch.take_along_dim(x, x.argsort(0), 0), X)
case("masked_fill", gradient(lambda x: x.masked_fill(x > 0, 1.0)), X)
case("diff_flip_roll", lambda x: x.diff().flip(0).roll(2, 1), X)
case("cat_stack", gradient(lambda x: torch.cat([x, torch.stack([x[0], x[1]]), x[:0]])), X)
case("split_chunk", lambda x: [a * b for a, b in zip(x.split(4), x.chunk(2))], X)
case("tril_diag", gradient(lambda x: x.tril() + torch.diag_embed(x.diagonal())), data(4, 4))
case("cumsum_prod", gradient(lambda x: x.cumsum(0) + x.cumprod(1) + x.logcumsumexp(0)), X)
case("reductions", gradient(lambda x: x.amax(0) + x.prod(0) + x.var(0) + x.norm(dim=0) +
                            x.logsumexp(0) + x.std(0)), X)
case("searchsorted", lambda x, v: torch.searchsorted(x.sort(-1)[0], v), X, data(8, 3))
case("histc_like", lambda x: (x.quantile(0.5), x.count_nonzero(), x.isnan().any()), X)
case("cdist", gradient(torch.cdist), X, data(6, 5))
case("einsum", gradient(lambda a, b: torch.einsum("bik,bjk->bij", a, b)), data(2, 3, 4), data(2, 5, 4))
case("baddbmm", gradient(lambda a, b: torch.baddbmm(a, b, b)), data(2, 4, 4), data(2, 4, 4))
case("one_hot", lambda i: F.one_hot(i, 9), Y)
case("repeat_interleave", vmap(lambda x, n: x.repeat_interleave(n, output_size=4)),
     data(3, 2), torch.tensor([[1, 3], [2, 2], [4, 0]]))
case("empty", gradient(lambda x: torch.linalg.inv(x) * 2), data(0, 3, 3))
# linear algebra and Fourier transforms
case("cholesky", gradient(torch.linalg.cholesky), spd(4))
case("solve", gradient(torch.linalg.solve, argnums=(0, 1)), spd(4), data(4, 2))
case("inv", gradient(torch.linalg.inv), spd(4))
case("svd", gradient(lambda a: torch.linalg.svdvals(a)), data(4, 3))
case("svd_full", lambda a: torch.linalg.svd(a, full_matrices=False), data(4, 3))
case("eigh", gradient(lambda a: torch.linalg.eigh(a)[0]), spd(4))
case("qr", lambda a: torch.linalg.qr(a), data(4, 3))
case("slogdet", gradient(lambda a: torch.linalg.slogdet(a)[1]), spd(4))
case("det", gradient(torch.linalg.det), spd(4))
case("lu", lambda a: torch.linalg.lu_factor(a), spd(4))
case("triangular", gradient(lambda a, b: torch.linalg.solve_triangular(a, b, upper=False)),
     spd(4).tril(), data(4, 2))
case("matrix_exp", lambda a: torch.linalg.matrix_exp(a), data(4, 4))
case("pinv", lambda a: torch.linalg.pinv(a), data(4, 3))
case("fft", gradient(lambda x: torch.fft.fft(x).abs()), X)
case("rfft", gradient(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=5)), X)
case("fft2", lambda x: torch.fft.fft2(x).real, X)
# modules
LSTM = nn.LSTM(5, 6)
case("lstm", lambda p, x: functional_call(LSTM, p, (x,)), dict(nn.LSTM(5, 6).named_parameters()), X[None])
GRU = nn.GRU(5, 6, batch_first=True)
ENCODER = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
CNN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                    nn.Linear(36, 3))
case("gru_gradient",
     grad(lambda p, x: functional_call(GRU, p, (x,))[0].square().sum()),
     dict(GRU.named_parameters()), X[None])
case("transformer",
     grad(lambda p, x: functional_call(ENCODER, p, (x,)).square().sum()),
     dict(ENCODER.named_parameters()), data(2, 4, 8))
case("cnn_with_buffers",
     grad(lambda p, b, x: functional_call(CNN, (p, b), (x,)).square().sum()),
     dict(CNN.named_parameters()), dict(CNN.named_buffers()), IMAGE)
case("captured_module", lambda x: LSTM(x)[0], X[None])


def _autocast(x, w):
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ w).float().sum(0)


@pytest.mark.parametrize("name", CASES)
def test_the_graph_is_that_of_tracing_with_numbers(name):
    f, args, options = CASES[name]
    args = tree_map(lambda t: t.detach() if isinstance(t, torch.Tensor) else t, args)
    known = trace(f)(*args)
    by_shapes = trace(f)(*on_meta(args))
    assert str(by_shapes) == str(known)
    assert types_of(by_shapes) == types_of(known)
    by_shapes.graph.verify()
    seed = {"seed": 3} if options.get("random") else {}
    copies = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)
    assert_same_bits(by_shapes(*copies, **seed), known(*args, **seed))
    if not seed:
        copies = tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, args)
        got, expected = tensors_of(by_shapes(*args)), tensors_of(f(*copies))
        for a, b in zip(got, expected):
            assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


def database(part, parts):
    """(name, operator, sample) of every so-manyth operator of PyTorch's database."""
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db[part::parts]:
        # Sparse arguments are no inputs of a graph; what empty() gives has no numbers to compare.
        if not op.dtypes or any(part in op.name for part in ("sparse", "empty")):
            continue
        dtype = torch.float32 if torch.float32 in op.dtypes else min(op.dtypes, key=str)
        sample = next(iter(op.sample_inputs("cpu", dtype)), None)
        if sample is not None:
            yield f"{op.name} {op.variant_test_name}", op, sample


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the samples are small
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("part", range(8))
def test_operators_of_the_database(part, one_thread):
    different = []
    for name, op, sample in database(part, 8):
        leaves, spec = torchlift._pytree.flatten((sample.input, list(sample.args), dict(sample.kwargs)))
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]

        def f(*given):
            rest = iter(given)
            args = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            first, others, keywords = spec.unflatten(args)
            return tensors_of(op(first, *others, **keywords))

        try:
            known = trace(f)(*tensors)
        except (UnsupportedError, RuntimeError, TypeError, ValueError, AssertionError):
            continue
        if "{was}" in str(known):  # the shape depends on numbers, which are assumed
            with pytest.raises(UnsupportedError, match="depends on numbers that are computed"):
                trace(f)(*on_meta(tensors))
            continue
        by_shapes = trace(f)(*on_meta(tensors))
        if str(by_shapes) != str(known) or types_of(by_shapes) != types_of(known):
            different.append(name)
            continue
        copies = [tensor.clone() for tensor in tensors]
        assert_same_bits(by_shapes(*copies, seed=1), known(*tensors, seed=1))
    assert not different


# --- nothing is computed, and no memory is used ------------------------------------------------------

HUGE = ShapeDtype((100_000, 100_000))


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(
    "f",
    [
        lambda a, b: (torch.tanh(a @ b) @ b).square().mean(),
        lambda a, b: F.layer_norm(a @ b, b.shape[-1:]).sum(),
        lambda a, b: F.cross_entropy(a @ b, b.argmax(0)),
        lambda a, b: (-(a @ b * 2) / 3).exp().mean() - (a * 5).mean(),
        lambda a, b: torch.sort(a)[0].logsumexp(0).mean() + b.cumsum(0).amax(),
    ],
)
def test_a_gradient_of_matrices_that_no_memory_holds(f):
    trace(grad(f, argnums=(0, 1)))(ShapeDtype((4, 4)), ShapeDtype((4, 4)))  # what is imported once
    before, start = resident_bytes(), time.perf_counter()
    traced = trace(grad(f, argnums=(0, 1)))(HUGE, HUGE)
    assert time.perf_counter() - start < 2
    assert resident_bytes() - before < 50e6
    small = trace(grad(f, argnums=(0, 1)))(data(20, 20), data(20, 20))
    assert [op for op, *_ in traced.graph.nodes()] == [op for op, *_ in small.graph.nodes()]


def test_a_large_model_with_its_parameters_as_arguments():
    with torch.device("meta"):
        model = nn.Sequential(
            nn.TransformerEncoderLayer(4096, 32, 16384, batch_first=True), nn.Linear(4096, 50_000)
        )

    def loss(params, x, y):
        return F.cross_entropy(functional_call(model, params, (x,)).flatten(0, 1), y.flatten())

    x, y = ShapeDtype((256, 2048, 4096)), ShapeDtype((256, 2048), torch.int64)
    before = resident_bytes()
    traced = trace(grad(loss))(dict(model.named_parameters()), x, y)
    assert resident_bytes() - before < 200e6
    assert len(traced.graph.nodes()) > 50


def test_constants_of_one_number_have_the_numbers_of_the_others():
    f = grad(lambda x: (-(x * 3) / 7).square().mean() + (x * 2).mean())
    x = data(1024, 300)
    assert_same_bits(trace(f)(ShapeDtype.of(x))(x), trace(f)(x)(x))


# --- arguments -------------------------------------------------------------------------------------


def test_shapes_in_a_pytree_and_by_name():
    args = ({"w": data(3, 2), "b": [data(2), 3]}, data(4, 3))

    def f(p, x, *, scale):
        return torch.tanh(x @ p["w"] + p["b"][0]) * scale * p["b"][1]

    known = trace(f)(*args, scale=data(2))
    by_shapes = trace(f)(*shapes_of(args), scale=ShapeDtype([2], torch.float32))
    assert str(by_shapes) == str(known)
    assert_same_bits(by_shapes(*args, scale=torch.ones(2)), known(*args, scale=torch.ones(2)))


def test_one_shape_makes_all_arguments_shapes():
    x = data(4, 3)
    before = x.clone()
    f = trace(lambda a, b: a.mul_(2) @ b)(x, ShapeDtype((3, 5)))
    assert torch.equal(x, before)
    w = data(3, 5)
    assert torch.equal(f(x.clone(), w), (x * 2) @ w)


def test_tensors_say_that_they_are_on_the_device():
    seen = []

    def f(x):
        seen.append((x.device.type, x.is_meta, tuple(x.shape), x.stride(), x.dtype))
        return x * 2 + torch.ones(3, device=x.device)

    trace(f)(torch.empty(4, 3, dtype=torch.float64, device="meta"))
    assert seen == [("cpu", False, (4, 3), (3, 1), torch.float64)]


def test_what_a_shape_dtype_is():
    shape = ShapeDtype(torch.Size([2, 3]), torch.bfloat16)
    assert shape == ShapeDtype.of(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert (shape.shape, shape.dtype, shape.device) == ((2, 3), torch.bfloat16, torch.device("cpu"))
    assert hash(shape) == hash(ShapeDtype((2, 3), torch.bfloat16))
    assert "(2, 3)" in repr(shape)
    with pytest.raises(TransformError, match=r"shape must be sizes, such as \(8, 3\), got"):
        ShapeDtype((2, -3))
    with pytest.raises(TransformError, match="shape must be sizes"):
        ShapeDtype(3)
    with pytest.raises(TransformError, match="dtype must be one of torch"):
        ShapeDtype((2,), float)
    with pytest.raises(TransformError, match="device must be one that the graph is to run on"):
        ShapeDtype((2,), torch.float32, "meta")
    with pytest.raises(AttributeError):
        shape.shape = (3,)


def test_dynamic_dims():
    f = vmap(grad(lambda x, w: torch.tanh(x @ w).square().mean()), (0, None))
    x, w = data(4, 3), data(3, 5)
    known = trace(f, dynamic={0: {0: "batch"}})(x, w)
    by_shapes = trace(f, dynamic={0: {0: "batch"}})(*shapes_of((x, w)))
    assert str(by_shapes) == str(known)
    others = data(9, 3), w
    assert_same_bits(by_shapes(*others), known(*others))


def test_save(tmp_path):
    f = vmap(grad(lambda p, x: torch.tanh(x @ p["w"]).square().sum()), (None, 0))
    p, x = {"w": data(3, 2)}, data(4, 3)
    path = tmp_path / "f.tlc"
    torchlift.save(f, path, *shapes_of((p, x)))
    loaded = torchlift.load(path)
    assert loaded.signature == "(p: {w: Tensor}, x: Tensor) -> {w: Tensor}"
    assert_same_bits(loaded(p, x), trace(f)(p, x)(p, x))


def test_make_fx():
    f = grad(lambda x, n: F.gelu(x * n).sum())
    x = data(4, 3)
    known = make_fx(f)(x, 2).code
    assert make_fx(f)(ShapeDtype((4, 3)), 2).code == known
    assert make_fx(f)(x.to("meta"), 2).code == known
    assert make_fx(f, tracing_mode="fake")(x, 2).code == known
    assert torch.equal(make_fx(f)(ShapeDtype((4, 3)), 2)(x, 2), make_fx(f)(x, 2)(x, 2))


def test_export(tmp_path):
    w = data(3, 2)
    f = vmap(grad(lambda p, x: torch.tanh(x @ p["w"]).square().mean()), (None, 0))
    program = torchlift.compile.export(f)(*shapes_of(({"w": w}, data(4, 3))))
    torch.export.save(program, tmp_path / "f.pt2")
    given = {"w": w}, data(4, 3)
    assert_close(torch.export.load(tmp_path / "f.pt2").module()(*given), f(*given))


def test_functionalize_and_jit_inside():
    def writes(x):
        y = x.clone()
        y[0].mul_(2)
        return y

    for f in (torchlift.functionalize(writes), torchlift.jit(writes)):
        assert str(trace(f)(ShapeDtype((2, 3)))) == str(trace(f)(data(2, 3)))


def test_the_optimized_program_and_transforms_of_the_graph():
    f = grad(lambda x: torch.tanh(x @ x.t()).square().mean())
    x = data(4, 4)
    traced = trace(f)(ShapeDtype((4, 4)))
    assert_close(traced.optimized().run([x])[0], f(x))
    xs = data(3, 4, 4)
    assert_close(vmap(traced)(xs), vmap(f)(xs))
    assert_close(grad(lambda v: traced(v).sum())(x), grad(lambda v: f(v).sum())(x))


# --- what is not known -------------------------------------------------------------------------------


def test_printing_says_that_there_are_no_numbers(capsys):
    trace(lambda x: (print(x), print(vmap(lambda r: (print(r), r)[1])(x)), x * 2)[-1])(ShapeDtype((2, 3)))
    printed = capsys.readouterr().out
    assert printed.count("value=tensor(..., size=(1, 2, 3), dtype=torch.float32)") == 3


def test_checks_of_values_are_not_made():
    f = lambda m, x: torch.distributions.Normal(m, m.abs() + 1).log_prob(x)  # noqa: E731
    assert str(trace(f)(ShapeDtype((3,)), ShapeDtype((3,)))) == str(trace(f)(data(3), data(3)))
    g = trace(F.gaussian_nll_loss)(*[ShapeDtype((3,))] * 3)
    assert_close(g(x := data(3), x, x.abs()), F.gaussian_nll_loss(x, x, x.abs()))


ERRORS = {
    "item": (lambda x: x * x.sum().item(), r"a number was asked for \(aten::_local_scalar_dense"),
    "if": (lambda x: x if x.sum() > 0 else -x, "a number was asked for"),
    "nonzero": (lambda x: x.nonzero(), "aten::nonzero: the shape of its result depends on numbers"),
    "mask": (lambda x: x[x > 0], "the shape of its result depends on numbers"),
    "meta_constant": (
        lambda x: x + torch.ones(3, device="meta"),
        "it met a tensor on the meta device .* Pass it to the function as an argument",
    ),
    "sparse_constant": (lambda x: torch.eye(3).to_sparse() @ x, "sparse, quantized or has no strides"),
    "numpy": (lambda x: x.numpy(), "no data pointer"),
    "one_hot": (lambda x: F.one_hot(x.long()), "the number of classes depends on the values, which are"),
    "equal": (
        lambda x: x if vmap(lambda r: r * torch.equal(r, r))(x).shape else x,
        "aten::equal: its result depends on numbers",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_not_known(name):
    f, text = ERRORS[name]
    with pytest.raises(UnsupportedError, match=text) as caught:
        trace(f)(ShapeDtype((3, 3)))
    assert "test_shapes.py" in str(caught.value)


def test_an_operator_without_a_meta_kernel():
    f = lambda x: torch._aminmax(x)[0]  # noqa: E731
    assert_same_bits(trace(f)(ShapeDtype((3, 3)))(x := data(3, 3)), f(x))
    with pytest.raises(UnsupportedError, match="aten::_aminmax: libtorch cannot tell the shape"):
        trace(f)(HUGE)


def test_shapes_that_do_not_fit_are_the_error_that_they_are():
    with pytest.raises(RuntimeError, match=r"\[4, 3\]"):
        trace(lambda x: x @ x)(ShapeDtype((4, 3)))
