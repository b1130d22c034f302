"""Every class of torch.nn under vmap, grad and vmap(grad), against a loop.

ROWS has a case for each class, or several; OTHER says of the rest why there is none; a test sees to it that
no class is in neither.
"""

import inspect
from typing import Any, Callable, NamedTuple

import pytest
import torch
from torch import nn

import torchlift
from torchlift import functional_call, grad, vmap

close = torch.testing.assert_close
N = 3  # rows of vmap
f64 = torch.float64


class Row(NamedTuple):
    name: str  # of the class
    make: "Callable[[], nn.Module]"
    inputs: "Callable[[], tuple[Any, ...]]"  # of one row
    random: bool = False
    loops: "tuple[str, ...]" = ()  # operators that have no rule and are looped over
    training: "tuple[bool, ...]" = (True, False)
    fixed: "tuple[int, ...]" = ()  # floating-point inputs that are not differentiated


def x(*shape):
    return lambda: (torch.randn(shape, dtype=f64),)


def positive(*shape):
    return torch.rand(shape, dtype=f64) * 0.8 + 0.1


def row(name, *args, shape=None, inputs=None, make=None, **options):
    options_of_module = options.pop("kw", {})
    build = make or (lambda: getattr(nn, name)(*args, **options_of_module))
    return Row(name, build, inputs or x(*shape), **options)


ELEMENTWISE = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU ReLU ReLU6 "
    "SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
).split()


def targets_of(*shape, classes=4):
    return torch.randint(0, classes, shape)


def signs(*shape):
    return torch.randint(0, 2, shape).to(f64) * 2 - 1


def same(*shapes):
    return lambda: tuple(torch.randn(s, dtype=f64) for s in shapes)


def transformer(name, *inputs, **kw):
    def make():
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        decoder = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
        return {
            "TransformerEncoderLayer": lambda: layer,
            "TransformerDecoderLayer": lambda: decoder,
            "TransformerEncoder": lambda: nn.TransformerEncoder(layer, 2),
            "TransformerDecoder": lambda: nn.TransformerDecoder(decoder, 2),
            "Transformer": lambda: nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True),
        }[name]()

    return Row(name, make, same(*inputs), **kw)


def pads():
    rows = []
    for dims in (1, 2, 3):
        shape = (2, 2) + (5,) * dims
        for kind in ("Circular", "Constant", "Reflection", "Replication", "Zero"):
            args = (2, 1.5) if kind == "Constant" else (2,)
            rows.append(row(f"{kind}Pad{dims}d", *args, shape=shape))
    return rows


def pools():
    rows = []
    for dims in (1, 2, 3):
        shape = (2, 2) + (6,) * dims
        rows += [
            row(f"AvgPool{dims}d", 2, shape=shape),
            row(f"AvgPool{dims}d", 3, shape=shape, kw=dict(stride=2, padding=1)),
            row(f"MaxPool{dims}d", 2, shape=shape),
            row(f"MaxPool{dims}d", 3, shape=shape, kw=dict(stride=1, padding=1, dilation=1)),
            row(f"LPPool{dims}d", 2.0, 2, inputs=lambda shape=shape: (positive(*shape),)),
            row(f"AdaptiveAvgPool{dims}d", 2, shape=shape),
            row(f"AdaptiveMaxPool{dims}d", 2, shape=shape),
            row(f"MaxUnpool{dims}d", 2, inputs=lambda dims=dims: unpool_inputs(dims)),
        ]
    rows += [
        row("FractionalMaxPool2d", 2, shape=(2, 2, 7, 7), kw=dict(output_size=3), random=True),
        row("FractionalMaxPool3d", 2, shape=(2, 2, 7, 7, 7), kw=dict(output_size=3), random=True),
    ]
    return rows


def unpool_inputs(dims):
    pool = getattr(nn, f"MaxPool{dims}d")(2, return_indices=True)
    return pool(torch.randn((2, 2) + (6,) * dims, dtype=f64))


def convs():
    rows = []
    for dims in (1, 2, 3):
        shape = (2, 4) + (5,) * dims
        rows += [
            row(f"Conv{dims}d", 4, 2, 3, shape=shape),
            row(f"Conv{dims}d", 4, 4, 2, shape=shape, kw=dict(groups=2, stride=2, padding=1, bias=False)),
            row(f"Conv{dims}d", 4, 2, 3, shape=shape, kw=dict(padding="same", padding_mode="circular")),
            row(f"ConvTranspose{dims}d", 4, 2, 3, shape=shape),
            row(f"ConvTranspose{dims}d", 4, 2, 2, shape=shape, kw=dict(stride=2, groups=2, padding=1)),
        ]
    return rows


def norms():
    rows = []
    for dims in (1, 2, 3):
        shape = (2, 4) + (3,) * dims
        rows += [
            row(f"BatchNorm{dims}d", 4, shape=shape),
            row(f"BatchNorm{dims}d", 4, shape=shape, kw=dict(track_running_stats=False, affine=False)),
            row(f"InstanceNorm{dims}d", 4, shape=shape),
            row(f"InstanceNorm{dims}d", 4, shape=shape, kw=dict(affine=True, track_running_stats=True)),
        ]
    return rows + [
        row("LayerNorm", (3, 4), shape=(2, 3, 4)),
        row("RMSNorm", 4, shape=(2, 3, 4)),
        row("GroupNorm", 2, 4, shape=(2, 4, 3)),
        row("LocalResponseNorm", 2, shape=(2, 4, 3)),
    ]


def recurrent():
    rows = []
    for name in ("RNN", "GRU", "LSTM"):
        rows += [
            row(name, 3, 4, shape=(5, 2, 3)),
            row(name, 3, 4, shape=(5, 3)),
            row(name, 3, 4, shape=(2, 5, 3), kw=dict(num_layers=2, bidirectional=True, batch_first=True)),
            row(name, 3, 4, shape=(5, 2, 3), kw=dict(bias=False)),
            row(name, 3, 4, shape=(5, 2, 3), kw=dict(num_layers=2, dropout=0.5), random=True),
            row(f"{name}Cell", 3, 4, shape=(2, 3)),
        ]
    return rows + [
        row("RNN", 3, 4, shape=(5, 2, 3), kw=dict(nonlinearity="relu")),
        row("RNN", 3, 4, inputs=same((5, 2, 3), (1, 2, 4))),
        row("LSTM", 3, 4, shape=(5, 2, 3), kw=dict(proj_size=2)),
        row("GRUCell", 3, 4, inputs=same((2, 3), (2, 4))),
    ]


def losses():
    image, classes = (2, 4, 3), (2, 4)
    ctc = lambda: (  # noqa: E731
        torch.randn(6, 2, 4, dtype=f64).log_softmax(2),
        torch.randint(1, 4, (2, 3)),
        torch.full((2,), 6),
        torch.full((2,), 3),
    )
    one = lambda f: (lambda: (torch.randn(classes, dtype=f64), f()))  # noqa: E731
    return [
        row("L1Loss", inputs=same(classes, classes)),
        row("MSELoss", inputs=same(classes, classes)),
        row("SmoothL1Loss", inputs=same(classes, classes)),
        row("HuberLoss", inputs=same(classes, classes), kw=dict(delta=0.5)),
        row("BCELoss", inputs=lambda: (positive(*classes), positive(*classes))),
        row("BCEWithLogitsLoss", inputs=one(lambda: positive(*classes))),
        row("CrossEntropyLoss", inputs=one(lambda: targets_of(2))),
        row("CrossEntropyLoss", inputs=one(lambda: targets_of(2)), kw=dict(label_smoothing=0.1, weight=torch.rand(4, dtype=f64))),
        row("CrossEntropyLoss", inputs=lambda: (torch.randn(image, dtype=f64), targets_of(2, 3)), kw=dict(reduction="none")),
        row("LinearCrossEntropyLoss", 5, 4, inputs=lambda: (torch.randn(2, 5, dtype=f64), targets_of(2))),
        row("NLLLoss", inputs=one(lambda: targets_of(2))),
        row("NLLLoss2d", inputs=lambda: (torch.randn(2, 4, 3, 3, dtype=f64), targets_of(2, 3, 3))),
        row("KLDivLoss", inputs=one(lambda: positive(*classes)), kw=dict(reduction="batchmean")),
        row("PoissonNLLLoss", inputs=one(lambda: positive(*classes))),
        row("HingeEmbeddingLoss", inputs=one(lambda: signs(*classes))),
        row("MarginRankingLoss", inputs=lambda: (*same((3,), (3,))(), signs(3))),
        row("CosineEmbeddingLoss", inputs=lambda: (*same(classes, classes)(), signs(2))),
        row("SoftMarginLoss", inputs=one(lambda: signs(*classes)), fixed=(1,)),
        row("MultiLabelMarginLoss", inputs=one(lambda: torch.tensor([[1, 2, -1, 0], [3, -1, 0, 1]]))),
        row("MultiLabelSoftMarginLoss", inputs=one(lambda: (signs(*classes) + 1) / 2)),
        row("MultiMarginLoss", inputs=one(lambda: targets_of(2))),
        row("TripletMarginLoss", inputs=same(classes, classes, classes)),
        row("TripletMarginWithDistanceLoss", inputs=same(classes, classes, classes)),
        row("CTCLoss", inputs=ctc, loops=("aten::_ctc_loss", "aten::_ctc_loss_backward")),
    ]


ROWS = [
    *[row(name, shape=(2, 5)) for name in ELEMENTWISE],
    row("GLU", shape=(2, 6)),
    row("PReLU", 3, shape=(2, 3, 4)),
    row("Threshold", 0.1, 2.0, shape=(2, 5)),
    # Draws for negative inputs only: which, must not differ between rows.
    row("RReLU", inputs=lambda: (-positive(2, 5),), random=True),
    row("Softmax", shape=(2, 5), kw=dict(dim=1)),
    row("LogSoftmax", shape=(2, 5), kw=dict(dim=1)),
    row("Softmin", shape=(2, 5), kw=dict(dim=1)),
    row("Softmax2d", shape=(2, 3, 4, 4)),
    row("Linear", 5, 3, shape=(2, 5)),
    row("Linear", 5, 3, shape=(5,), kw=dict(bias=False)),
    row("Bilinear", 3, 4, 2, inputs=same((2, 3), (2, 4))),
    *convs(),
    *norms(),
    *pads(),
    *pools(),
    *recurrent(),
    *losses(),
    row("Embedding", 7, 3, inputs=lambda: (torch.randint(0, 7, (2, 4)),), kw=dict(padding_idx=1)),
    *[
        row("EmbeddingBag", 7, 3, inputs=lambda: (torch.randint(0, 7, (2, 4)),), kw=dict(mode=mode))
        for mode in ("sum", "mean", "max")
    ],
    row("MultiheadAttention", 4, 2, inputs=same((5, 2, 4), (6, 2, 4), (6, 2, 4))),
    row("MultiheadAttention", 4, 2, inputs=same((2, 5, 4), (2, 6, 4), (2, 6, 4)), kw=dict(batch_first=True)),
    row("MultiheadAttention", 4, 2, inputs=same((5, 2, 4), (6, 2, 3), (6, 2, 2)), kw=dict(kdim=3, vdim=2, add_bias_kv=True)),
    transformer("TransformerEncoderLayer", (2, 5, 4)),
    transformer("TransformerDecoderLayer", (2, 5, 4), (2, 3, 4)),
    transformer("TransformerEncoder", (2, 5, 4)),
    transformer("TransformerDecoder", (2, 5, 4), (2, 3, 4)),
    transformer("Transformer", (2, 5, 4), (2, 3, 4)),
    *[row(name, shape=(2, 5), random=True) for name in ("Dropout", "AlphaDropout", "FeatureAlphaDropout")],
    row("Dropout1d", shape=(2, 3, 4), random=True),
    row("Dropout2d", shape=(2, 3, 4, 4), random=True),
    row("Dropout3d", shape=(2, 3, 4, 4, 4), random=True),
    row("Flatten", shape=(2, 3, 4)),
    row("Unflatten", 1, (2, 3), shape=(2, 6)),
    row("Fold", (4, 5), (2, 2), shape=(2, 12, 12)),
    row("Unfold", (2, 3), shape=(2, 3, 4, 5)),
    row("ChannelShuffle", 2, shape=(2, 4, 3, 3)),
    row("PixelShuffle", 2, shape=(2, 8, 3, 3)),
    row("PixelUnshuffle", 2, shape=(2, 2, 4, 4)),
    row("Upsample", shape=(2, 3, 4), kw=dict(scale_factor=2, mode="linear")),
    row("Upsample", shape=(2, 3, 4, 4), kw=dict(scale_factor=2, mode="bicubic")),
    row("UpsamplingBilinear2d", shape=(2, 3, 4, 4), kw=dict(scale_factor=2)),
    row("UpsamplingNearest2d", shape=(2, 3, 4, 4), kw=dict(scale_factor=2)),
    row("CosineSimilarity", inputs=same((2, 5), (2, 5))),
    row("PairwiseDistance", inputs=same((2, 5), (2, 5))),
    row("Sequential", make=lambda: nn.Sequential(nn.Linear(5, 4), nn.Tanh()), shape=(2, 5)),
]

OTHER = {
    "Module": "has no forward",
    "Container": "has no forward",
    "ModuleDict": "has no forward",
    "ModuleList": "has no forward",
    "ParameterDict": "has no forward",
    "ParameterList": "has no forward",
    "RNNBase": "the base of RNN, GRU, LSTM",
    "RNNCellBase": "the base of their cells",
    "DataParallel": "runs on several devices",
    "SyncBatchNorm": "runs on several devices",
    "CrossMapLRN2d": "allocates by the storage type of its input: test_python_that_makes_and_resizes_buffers",
    "AdaptiveLogSoftmaxWithLoss": "looks at values: test_value_checks.py",
    "GaussianNLLLoss": "looks at values: test_value_checks.py",
}


def ids(r):
    return r.name


def build(r, training):
    module = r.make().to(f64).train(training)
    for p in module.parameters():  # Not all zeros and ones.
        with torch.no_grad():
            p.add_(torch.randn_like(p) * 0.1)
    return module


def outputs_of(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for part in result if part is not None for t in outputs_of(part)]


def call(module, state, args):
    """The outputs; with buffers that a module in training mode would write into returned, and not used."""
    if any(True for _ in module.buffers()):
        result, _ = functional_call(module, state, args, mutate_buffers="return")
    else:
        result = functional_call(module, state, args)
    return outputs_of(result)


def loss_of(outputs):
    floats = [t for t in outputs if t.is_floating_point()]
    return sum((t * torch.linspace(0.5, 1.5, t.numel(), dtype=f64).reshape(t.shape)).sum() for t in floats)


def stack_rows(rows):
    return tuple(torch.stack(column) for column in zip(*rows))


def seeded(f, *args):
    torch.manual_seed(3)
    return f(*args)


PARAMS = [(r, t) for r in ROWS for t in r.training]


@pytest.fixture
def strict_but(request):
    """No operator may be looped over but those the row names."""
    torchlift.reset_fallback_report()
    previous = torchlift._set_vmap_fallback_warning_enabled(False)
    yield
    torchlift._set_vmap_fallback_warning_enabled(previous)
    case = request.getfixturevalue("case")
    looped = {record.op.split(".")[0] for record in torchlift.fallback_report()}
    assert looped <= set(case[0].loops), looped


def label(case):
    return f"{case[0].name}-{ROWS.index(case[0])}-{'train' if case[1] else 'eval'}"


@pytest.mark.parametrize("case", PARAMS, ids=label)
def test_vmap_over_inputs(case, strict_but):
    r, training = case
    module, rows = build(r, training), [r.inputs() for _ in range(N)]
    run = lambda *args: call(module, {}, args)  # noqa: E731
    got = seeded(vmap(run, randomness="same"), *stack_rows(rows))
    want = [seeded(run, *args) for args in rows]
    for i, parts in enumerate(zip(*want)):
        close(got[i], torch.stack(parts))


@pytest.mark.parametrize("case", [c for c in PARAMS if any(True for _ in c[0].make().parameters())], ids=label)
def test_vmap_over_parameters(case, strict_but):
    r, training = case
    module, args = build(r, training), r.inputs()
    states = [{k: torch.randn_like(p) for k, p in module.named_parameters()} for _ in range(N)]
    stacked = {k: torch.stack([s[k] for s in states]) for k in states[0]}
    run = lambda s: call(module, s, args)  # noqa: E731
    got = seeded(vmap(run, randomness="same"), stacked)
    want = [seeded(run, s) for s in states]
    for i, parts in enumerate(zip(*want)):
        close(got[i], torch.stack(parts))


@pytest.mark.parametrize("case", PARAMS, ids=label)
def test_vmap_of_grad(case, strict_but):
    """Gradients by parameters and floating-point inputs, of one row and mapped."""
    r, training = case
    module, rows = build(r, training), [r.inputs() for _ in range(N)]
    params = {k: p.detach() for k, p in module.named_parameters()}
    chosen = [i for i, a in enumerate(rows[0]) if a.is_floating_point() and i not in r.fixed]
    if not chosen and not params:
        pytest.fail("nothing to differentiate")

    def loss(tracked, others):
        params, floats = tracked
        args = list(others)
        for i, a in zip(chosen, floats):
            args[i] = a
        return loss_of(call(module, params, tuple(args)))

    def split(args):
        return [args[i] for i in chosen], [a for a in args]

    g = grad(loss)
    singles = []
    for args in rows:
        floats, others = split(args)
        got = seeded(g, (params, floats), others)
        leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        inputs = [a.clone().requires_grad_() for a in floats]
        value = seeded(loss, (leaves, inputs), others)
        wrt = [*leaves.values(), *inputs]
        want = torch.autograd.grad(value, wrt, allow_unused=True)
        want = [torch.zeros_like(a) if w is None else w for a, w in zip(wrt, want)]
        flat = [*got[0].values(), *got[1]]
        for a, b in zip(flat, want):
            close(a, b)
        singles.append(want)
    floats, others = split(stack_rows(rows))
    mapped = vmap(g, in_dims=((None, 0), 0) if params else (0, 0), randomness="same")
    got = seeded(mapped, (params, floats), others)
    flat = [*got[0].values(), *got[1]]
    for a, b in zip(flat, stack_rows(singles)):
        close(a, b)


def test_every_class_has_a_row():
    classes = {
        name
        for name, cls in vars(nn).items()
        if inspect.isclass(cls) and issubclass(cls, nn.Module) and not name.startswith("Lazy")
    }
    covered = {r.name for r in ROWS}
    assert not covered & set(OTHER)
    assert classes - covered - set(OTHER) == set()
    assert (covered | set(OTHER)) - classes == set()


def test_lazy_modules_once_initialised():
    module = nn.Sequential(nn.LazyConv2d(3, 2), nn.Flatten(), nn.LazyLinear(2))
    module(torch.randn(1, 2, 4, 4))
    xs = torch.randn(N, 2, 2, 4, 4)
    close(vmap(module)(xs), torch.stack([module(v) for v in xs]))


def test_python_that_makes_and_resizes_buffers():
    x = torch.randn(N, 2, 4, 3, 3)
    norm = nn.CrossMapLRN2d(2)
    close(vmap(norm)(x), torch.stack([norm(row) for row in x]))


def test_dropout_draws_for_each_row():
    drop = nn.Dropout(0.5)
    out = vmap(drop, randomness="different")(torch.ones(4, 50))
    assert out.unique().tolist() == [0.0, 2.0]
    assert len({tuple(row.tolist()) for row in out}) == 4


def masks():
    """Of padding, of attention, of bool and of numbers."""
    padding = torch.zeros(N, 2, 5, dtype=torch.bool)
    padding[:, 1, 3:] = True
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    infinite = torch.zeros(5, 5).masked_fill(causal, float("-inf"))
    return [
        dict(src_key_padding_mask=padding),
        dict(src_mask=causal.expand(N, 5, 5)),
        dict(src_mask=infinite.expand(N, 5, 5)),
        dict(src_mask=causal.expand(N, 5, 5), src_key_padding_mask=padding),
    ]


@pytest.mark.parametrize("mask", masks(), ids=lambda m: "+".join(m))
@pytest.mark.parametrize("norm_first", [False, True])
def test_masks_on_the_fast_path_of_attention(mask, norm_first):
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=norm_first).to(f64).eval()
    xs = torch.randn(N, 2, 5, 4, dtype=f64)
    names = list(mask)
    run = lambda v, *m: layer(v, **dict(zip(names, m)))  # noqa: E731
    rows = [run(v, *m) for v, *m in zip(xs, *mask.values())]  # not fast: tracked by autograd
    with torch.no_grad():
        got = vmap(run)(xs, *mask.values())
        fast = [run(v, *m) for v, *m in zip(xs, *mask.values())]
    close(got, torch.stack(rows))
    close(got, torch.stack(fast))
