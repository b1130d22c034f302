"""Per-sample gradients, ghost norms, clipping, DP-SGD: against a loop over the examples."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift import TransformError, UnsupportedError, _ghost

close = torch.testing.assert_close


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, ids):
        return self.head(self.layer(self.embedding(ids)).mean(1))


class TimeFirst(nn.Module):
    """Its Linear sees [time, batch, features]."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x.transpose(0, 1)))).sum(0)


class Tied(nn.Module):
    """The embedding is used once by its layer, and once as a matrix."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)

    def forward(self, ids):
        return F.linear(self.embedding(ids).mean(1), self.embedding.weight)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x):
        return self.layer(self.layer(x) * self.scale)


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2),
        nn.GroupNorm(2, 4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=(2, 1), bias=False),
        nn.Conv2d(8, 4, (1, 2), padding="same", padding_mode="circular"),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


def images(n):
    return torch.randn(n, 2, 7, 8)


CASES = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3, bias=False)),
        lambda n: torch.randn(n, 4),
        [],
    ),
    "conv": (conv_net, images, []),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.RMSNorm(20), nn.Linear(20, 3)),
        lambda n: torch.randn(n, 2, 7),
        [],
    ),
    "conv3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 3, 2, stride=2), nn.Flatten(), nn.LazyLinear(3)),
        lambda n: torch.randn(n, 2, 4, 5, 4),
        [],
    ),
    "attention": (Attention, lambda n: torch.randint(0, 11, (n, 5)), ["layer.self_attn."]),
    "time_first": (TimeFirst, lambda n: torch.randn(n, 3, 4), []),
    "tied": (Tied, lambda n: torch.randint(0, 5, (n, 6)), ["embedding."]),
    "twice": (Twice, lambda n: torch.randn(n, 4), ["layer.", "scale"]),
    "batch_norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(90, 3)),
        images,
        ["1."],
    ),
    "gru": (
        lambda: GruNet(),
        lambda n: torch.randn(n, 4, 3),
        ["gru."],
    ),
}


class GruNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


def make(name, n):
    build, inputs, fallback = CASES[name]
    model = build()
    if name == "conv3d":
        model(inputs(1))
    classes = 5 if name == "tied" else 4 if name == "twice" else 3
    return model.double(), _double(inputs(n)), torch.randint(0, classes, (n,)), fallback


def _double(t):
    return t.double() if t.is_floating_point() else t


def loop(model, xs, ys):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    params = [p for p in model.parameters() if p.requires_grad]
    rows = []
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    for i in range(len(xs)):
        loss = F.cross_entropy(model(xs[i : i + 1]), ys[i : i + 1])
        rows.append(torch.autograd.grad(loss, params))
        for k, v in model.named_buffers():
            v.copy_(buffers[k])
    return {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}


def norms_of(grads):
    return torch.stack([g.reshape(len(g), -1).square().sum(1) for g in grads.values()]).sum(0).sqrt()


@pytest.mark.parametrize("always", [True, False])  # ghost norms, also where the gradient is smaller
@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_norms(name, size, always, monkeypatch):
    if always:
        monkeypatch.setattr(_ghost, "_is_worth_it", lambda layer, output: True)
    model, xs, ys, fallback = make(name, size)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    want = loop(model, xs, ys)
    got = torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys)
    assert list(got) == list(want)
    for key in want:
        close(got[key], want[key], rtol=1e-7, atol=1e-9)
    norms = torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys)
    close(norms, norms_of(want), rtol=1e-7, atol=1e-9)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", CASES)
def test_which_layers_have_their_gradients_made(name, monkeypatch):
    """The ghost formulas are used where they can be."""
    monkeypatch.setattr(_ghost, "_is_worth_it", lambda layer, output: True)
    model, xs, ys, fallback = make(name, 2)
    fallback = [*fallback, *(n for n, m in model.named_modules() if "Norm" in type(m).__name__)]
    covered = []
    find = _ghost._plan

    def plan(*args):
        covered.append(find(*args)[0])
        return covered[0], find(*args)[1]

    monkeypatch.setattr(_ghost, "_plan", plan)
    torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys)
    made = [n for n, p in model.named_parameters() if p.requires_grad and n not in covered[0]]
    assert all(any(n.startswith(part) for part in fallback) for n in made), made
    assert all(any(n.startswith(part) for n in made) for part in fallback), made


def test_gradients_smaller_than_two_matrices_of_positions_are_made():
    conv, linear, table = torch.nn.Conv2d(8, 16, 3), torch.nn.Linear(8, 16), torch.nn.Embedding(10, 4)
    assert _ghost._is_worth_it(conv, torch.Size([1, 16, 4, 4]))  # 2 * 16 * 16 <= 1152
    assert not _ghost._is_worth_it(conv, torch.Size([1, 16, 5, 5]))
    assert _ghost._is_worth_it(linear, torch.Size([8, 16]))  # 2 * 8 * 8 <= 128
    assert not _ghost._is_worth_it(linear, torch.Size([9, 16]))
    assert _ghost._is_worth_it(table, torch.Size([4, 4]))  # 2 * 4 * 4 <= 40
    assert not _ghost._is_worth_it(table, torch.Size([5, 4]))


class Elsewhere(nn.Module):
    """A layer whose weight is used without calling it, or whose call leads nowhere."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = nn.Linear(4, 4), way

    def forward(self, x):
        if self.way == "also":
            return self.layer(x) + F.linear(x.sin(), self.layer.weight)
        if self.way == "transposed":
            return self.layer(x) @ self.layer.weight.t()
        if self.way == "unused":
            self.layer(x)
            return F.linear(x.sin(), self.layer.weight)
        if self.way == "detached":
            return self.layer(x).detach() + F.linear(x.sin(), self.layer.weight)
        if self.way == "no_grad":
            with torch.no_grad():
                h = self.layer(x)
            return h * self.layer.bias + x @ self.layer.weight
        if self.way == "first only":
            self.way = "transposed"  # another thing in every call
            return self.layer(x)
        assert self.way == "in place"
        return self.layer(x).mul_(2).relu_()


@pytest.mark.parametrize(
    "way", ["also", "transposed", "unused", "detached", "no_grad", "in place"]
)
def test_weights_that_are_used_elsewhere(way):
    model, xs, ys = Elsewhere(way).double(), torch.randn(5, 4).double(), torch.randint(0, 4, (5,))
    for p in model.parameters():
        p.requires_grad_(True)
    rows = []
    for i in range(5):
        loss = F.cross_entropy(model(xs[i : i + 1]), ys[i : i + 1])
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        rows.append(sum(g.square().sum() for g in grads if g is not None).sqrt())
    norms = torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys)
    close(norms, torch.stack(rows), rtol=1e-7, atol=1e-9)


class Inside(nn.Module):
    """A layer that is called in a transform of the forward pass, or by autocast."""

    def __init__(self, way):
        super().__init__()
        self.a, self.b, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x):
        if self.way == "gradient":
            return torchlift.grad(lambda v: self.a(v).pow(3).sum())(x) + self.b(x)
        if self.way == "gradient of a linear function":
            return torchlift.grad(lambda v: self.a(v).sum())(x) + self.b(x)
        if self.way == "beside a gradient":
            g, h = torchlift.grad(lambda v: (v.sin().sum(), self.a(v)), has_aux=True)(x)
            return g * h
        if self.way == "tangent":
            return torchlift.jvp(lambda v: self.a(v).sin(), (x,), (self.b(x),))[1]
        if self.way == "vmap":
            return torchlift.vmap(self.a)(torch.stack([x, x.sin()])).sum(0) + self.b(x)
        if self.way == "branches":
            return torchlift.cond(x.sum() > 0, lambda h: self.a(h), lambda h: self.b(h), x)
        assert self.way == "checkpoint"
        return torchlift.checkpoint(lambda v: self.a(v).sin(), self.b(x))


@pytest.mark.parametrize(
    "way",
    ["gradient", "gradient of a linear function", "beside a gradient", "tangent", "vmap", "branches", "checkpoint"],
)
def test_layers_inside_of_transforms(way):
    model, xs, ys = Inside(way).double(), torch.randn(6, 4).double(), torch.randint(0, 4, (6,))
    want = norms_of(torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys))
    close(torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys), want)


@pytest.mark.parametrize("first", [True, False])
def test_casts_that_autocast_shares(first):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            with torch.autocast("cpu"):
                one = self.layer(x) if first else F.linear(x.sin(), self.layer.weight)
                other = F.linear(x.sin(), self.layer.weight) if first else self.layer(x)
                return (one + other).double()

    model, xs, ys = Twice(), torch.randn(6, 4), torch.randint(0, 4, (6,))
    want = norms_of(torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys))
    close(torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys), want, rtol=0.02, atol=0.02)


def test_an_input_that_is_written_into():
    class Writes(nn.Sequential):
        def forward(self, x):
            h = x * 1
            y = self[0](h)
            h.add_(1)
            return y

    model, xs, ys = Writes(nn.Linear(4, 4)), torch.randn(6, 4), torch.randint(0, 4, (6,))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys)
    with pytest.raises(UnsupportedError, match=r"input of the layer '0', of shape \[1, 4\], was modified by an in-place"):
        torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys)


def test_calls_leave_nothing_behind():
    """The node of a layer's output holds the hook, which must not hold the node."""
    model, xs, ys, _ = make("mlp", 3)
    held = []
    build = _ghost._Call

    def call(*args):
        made = build(*args)
        held.append(weakref.ref(made))
        return made

    def fails(out, y):
        raise KeyError("no loss")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ghost, "_Call", call)
        torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys)
        with pytest.raises(KeyError):
            torchlift.per_sample_grad_norms(model, fails)(xs, ys)
    gc.collect()
    assert len(held) == 4 and not any(each() for each in held)


def test_a_module_that_does_something_else_in_the_next_call():
    model, xs, ys = Elsewhere("first only").double(), torch.randn(3, 4).double(), torch.arange(3)
    norms = torchlift.per_sample_grad_norms(model, F.cross_entropy)
    model.way = "first only"
    first = norms(xs, ys)
    assert model.way == "transposed"
    second = norms(xs, ys)
    model.way = "first only"
    want = norms_of(torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys))
    close(first, want, rtol=1e-7, atol=1e-9)
    want = norms_of(torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys))
    close(second, want, rtol=1e-7, atol=1e-9)


def test_norms_are_differentiable():
    model, xs, ys, _ = make("mlp", 3)
    norms = lambda xs: torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys)

    def plain(xs):
        rows = torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys)
        return norms_of(rows)

    weights = torch.rand(3, dtype=torch.float64)
    got = torchlift.grad(lambda xs: (norms(xs) * weights).sum())(xs)
    want = torchlift.grad(lambda xs: (plain(xs) * weights).sum())(xs)
    close(got, want)


def test_empty_batch():
    model, xs, ys, _ = make("mlp", 0)
    assert torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys).shape == (0,)


def test_frozen_parameters():
    model, xs, ys, _ = make("conv", 3)
    model[0].weight.requires_grad_(False)
    model[6].requires_grad_(False)
    want = loop(model, xs, ys)
    assert list(torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys)) == list(want)
    close(torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys), norms_of(want))


def test_reparametrised_layers_have_their_gradients_made():
    model, xs, ys, _ = make("mlp", 3)
    torch.nn.utils.parametrizations.weight_norm(model[0])
    want = loop(model, xs, ys)
    close(torchlift.per_sample_grad_norms(model, F.cross_entropy)(xs, ys), norms_of(want))


@pytest.mark.parametrize("options", [dict(memory_budget=1), dict(memory_budget=10**9), dict(chunk_size=2)])
def test_microbatches(options):
    model, xs, ys, _ = make("conv", 5)
    want = loop(model, xs, ys)
    got = torchlift.per_sample_grad(model, F.cross_entropy, **options)(xs, ys)
    for key in want:
        close(got[key], want[key])
    close(torchlift.per_sample_grad_norms(model, F.cross_entropy, **options)(xs, ys), norms_of(want))


def test_several_inputs():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.bilinear = nn.Bilinear(3, 2, 4)

        def forward(self, a, b):
            return self.bilinear(a, b)

    model, a, b = Sum(), torch.randn(5, 3), torch.randn(5, 2)
    loss = lambda out: out.square().sum()  # noqa: E731
    grads = torchlift.per_sample_grad(model, loss)((a, b))
    for i in range(5):
        want = torch.autograd.grad(loss(model(a[i : i + 1], b[i : i + 1])), list(model.parameters()))
        for g, w in zip(grads.values(), want):
            close(g[i], w)


def test_clip_and_sum():
    grads = {"a": torch.randn(6, 2, 3, dtype=torch.float64), "b": torch.randn(6, 4, dtype=torch.float64)}
    grads["scalar"] = torch.randn(6, dtype=torch.float64)
    for g in grads.values():
        g[0] = 0
    norms = norms_of(grads)
    want = {k: sum(g[i] * min(1.0, 1.5 / max(norms[i].item(), 1e-300)) for i in range(6)) for k, g in grads.items()}
    for given in (None, norms):
        got = torchlift.clip_and_sum(grads, 1.5, given)
        for key in want:
            close(got[key], want[key])
    with pytest.raises(TransformError, match="max_norm must be above 0, got 0"):
        torchlift.clip_and_sum(grads, 0)


@pytest.mark.parametrize("ghost", [True, False])
@pytest.mark.parametrize("name", ["mlp", "conv", "attention", "batch_norm"])
def test_dp_gradients(name, ghost):
    model, xs, ys, _ = make(name, 4)
    per_sample = loop(model, xs, ys)
    max_norm = norms_of(per_sample).median().item()
    want = torchlift.clip_and_sum(per_sample, max_norm)
    run = lambda **kw: torchlift.dp_gradients(  # noqa: E731
        model, F.cross_entropy, max_norm=max_norm, ghost=ghost, **kw
    )(xs, ys)
    got = run(noise_multiplier=0.0)
    for key in want:
        close(got[key], want[key] / 4, rtol=1e-7, atol=1e-9)
    got = run(noise_multiplier=2.0, expected_batch_size=10, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    for key in want:
        noise = torch.randn(want[key].shape, dtype=torch.float64, generator=generator)
        close(got[key], (want[key] + 2.0 * max_norm * noise) / 10, rtol=1e-7, atol=1e-9)


def test_dp_sgd_step():
    model, xs, ys, _ = make("mlp", 4)
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    grads = torchlift.dp_gradients(model, F.cross_entropy, max_norm=0.5, noise_multiplier=0.0)(xs, ys)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torchlift.dp_sgd_step(model, F.cross_entropy, optimizer, xs, ys, max_norm=0.5, noise_multiplier=0.0)
    for key, p in model.named_parameters():
        close(p.detach(), before[key] - 0.1 * grads[key])


def test_dropout_is_refused_where_passes_would_differ():
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    xs, ys = torch.randn(4, 3), torch.randint(0, 3, (4,))
    with pytest.raises(RuntimeError, match="random"):
        torchlift.dp_gradients(model, F.cross_entropy, max_norm=1.0, noise_multiplier=1.0)(xs, ys)
    run = torchlift.dp_gradients(model, F.cross_entropy, max_norm=1.0, noise_multiplier=1.0, ghost=False)
    assert run(xs, ys)["0.weight"].shape == (3, 3)


def test_errors():
    model, xs, ys, _ = make("mlp", 4)
    with pytest.raises(TransformError, match=r"must be a single number, got shape \[1, 3\]"):
        torchlift.per_sample_grad(model, lambda out, y: out)(xs, ys)
    with pytest.raises(TransformError, match=r"one size along dim 0.*\[\[4, 4\], \[3\]\]"):
        torchlift.per_sample_grad(model, F.cross_entropy)(xs, ys[:3])
    with pytest.raises(TransformError, match="memory_budget must be above 0"):
        torchlift.per_sample_grad(model, F.cross_entropy, memory_budget=0)(xs, ys)
    with pytest.raises(TransformError, match="noise_multiplier at least 0"):
        torchlift.dp_gradients(model, F.cross_entropy, max_norm=1.0, noise_multiplier=-1.0)
    for transform in (torchlift.per_sample_grad, torchlift.per_sample_grad_norms):
        with pytest.raises(TransformError, match="no parameter of ReLU requires grad"):
            transform(nn.ReLU(), lambda out: out.sum())(torch.ones(2, 3))
