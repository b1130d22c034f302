"""Ensemble: against its members, one by one."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import torchlift
from torchlift import Ensemble, TransformError

close = torch.testing.assert_close


def mlp(width=4):
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.gru(x)[0][:, -1])


BUILDERS = {
    "mlp": (mlp, (5, 3)),
    "conv": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2)), (5, 2, 5, 5)),
    "norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4)), (5, 3)),
    "recurrent": (Recurrent, (5, 4, 3)),
    "attention": (lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True), (5, 6, 4)),
}


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_agrees_with_its_members(name, training, size):
    build, shape = BUILDERS[name]
    models = [build().train(training) for _ in range(size)]
    ensemble, x = Ensemble(models), torch.randn(shape)
    got = ensemble(x)
    close(got, torch.stack([m(x) for m in models]), rtol=1e-5, atol=1e-5)
    for member, model in zip(ensemble.members(), models):
        for (key, a), b in zip(member.state_dict().items(), model.state_dict().values()):
            close(a, b, msg=key)  # Buffers too, which both have updated.
    xs = torch.randn(size, *shape)
    close(ensemble.map_members(xs), torch.stack([m(v) for m, v in zip(models, xs)]), rtol=1e-5, atol=1e-5)


def test_no_loops():
    build, shape = BUILDERS["recurrent"]
    with torchlift.strict():
        Ensemble([build() for _ in range(3)])(torch.randn(shape)).sum().backward()


def test_architectures_are_grouped():
    models = [mlp(4), mlp(8), mlp(4), nn.Linear(3, 2), mlp(8)]
    ensemble, x = Ensemble(models), torch.randn(5, 3)
    assert sorted(map(tuple, ensemble.member_indices)) == [(0, 2), (1, 4), (3,)]
    close(ensemble(x), torch.stack([m(x) for m in models]))
    xs = torch.randn(5, 5, 3)
    close(ensemble.map_members(xs), torch.stack([m(v) for m, v in zip(models, xs)]))
    for a, b in zip(ensemble.members(), models):
        close(a(x), b(x))
    mixed = Ensemble([nn.Linear(3, 2), nn.Linear(3, 1)])(x)
    assert [tuple(out.shape) for out in mixed] == [(5, 2), (5, 1)]


def test_what_forward_depends_on_splits_groups():
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) * self.factor

    # Numbers, functions, and objects of which nothing is known.
    for factors in ([1.0, 2.0], [torch.tensor(1.0), torch.tensor(2.0)]):
        models, x = [Scaled(f) for f in factors], torch.randn(5, 3)
        ensemble = Ensemble(models)
        assert len(ensemble.groups) == 2
        close(ensemble(x), torch.stack([m(x) for m in models]))

    class Activated(nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.function(self.layer(x))

    models = [Activated(torch.tanh), Activated(torch.relu), Activated(torch.tanh)]
    ensemble = Ensemble(models)
    assert sorted(map(tuple, ensemble.member_indices)) == [(0, 2), (1,)]
    close(ensemble(x), torch.stack([m(x) for m in models]))


@pytest.mark.parametrize("name", BUILDERS)
def test_models_built_alike_are_one_group(name):
    build, _ = BUILDERS[name]
    assert len(Ensemble([build() for _ in range(3)]).groups) == 1


def test_trains_all_members_in_one_step():
    models = [mlp(), mlp(), mlp(6)]
    ensemble, x, y = Ensemble(models), torch.randn(16, 3), torch.randint(0, 2, (16,))
    ours = torch.optim.Adam(ensemble.parameters(), lr=0.05)
    theirs = [torch.optim.Adam(m.parameters(), lr=0.05) for m in models]
    for _ in range(5):
        losses = ensemble.train_step(ours, F.cross_entropy, x, y)
        for i, (model, optimizer) in enumerate(zip(models, theirs)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            close(losses[i], loss.detach())
    for member, model in zip(ensemble.members(), models):
        for a, b in zip(member.parameters(), model.parameters()):
            close(a, b, rtol=1e-4, atol=1e-5)


def test_saved_and_loaded():
    a, b, x = Ensemble([mlp(), mlp()]), Ensemble([mlp(), mlp()]), torch.randn(5, 3)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    file.seek(0)
    b.load_state_dict(torch.load(file))
    close(a(x), b(x))
    close(copy.deepcopy(a)(x), a(x))
    assert a.double()(x.double()).dtype is torch.float64


def test_the_models_are_copied():
    models, x = [mlp(), mlp()], torch.randn(3)
    ensemble = Ensemble(models)
    want = ensemble(x)
    with torch.no_grad():
        models[0][0].weight.zero_()
    close(ensemble(x), want)


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    models, x = [Tied(), Tied()], torch.randn(5, 3)
    ensemble = Ensemble(models)
    assert len(list(ensemble.parameters())) == 3
    close(ensemble(x), torch.stack([m(x) for m in models]))


def test_dropout_differs_between_members():
    layer = nn.Sequential(nn.Linear(3, 64), nn.Dropout())
    ensemble = Ensemble([layer, copy.deepcopy(layer)])
    out = ensemble(torch.randn(3))
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("init", ["call", "vmap"])
def test_create(init):
    make = lambda: nn.Sequential(nn.Linear(300, 50), nn.LayerNorm(50), nn.BatchNorm1d(50))  # noqa: E731
    ensemble = Ensemble.create(make, 3, init=init)
    weight = dict(ensemble.named_parameters())["groups.0.0.weight"]
    assert weight.shape == (3, 50, 300) and weight.requires_grad and weight.is_leaf
    bound = 300**-0.5  # of nn.Linear
    for row in weight:
        assert row.abs().max() <= bound and row.abs().max() > 0.95 * bound
        assert abs(row.mean()) < 0.05 * bound
    assert not torch.equal(weight[0], weight[1])
    norm = dict(ensemble.named_parameters())["groups.0.1.weight"]
    close(norm.detach(), torch.ones(3, 50))
    torch.manual_seed(5)
    a = Ensemble.create(make, 3, init=init)
    torch.manual_seed(5)
    b = Ensemble.create(make, 3, init=init)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q)
    assert ensemble(torch.randn(4, 300)).shape == (3, 4, 50)


def test_errors():
    with pytest.raises(TransformError, match="at least one model"):
        Ensemble([])
    with pytest.raises(TransformError, match="training mode"):
        Ensemble([mlp(), mlp().eval()])
    with pytest.raises(TransformError, match="num_members must be at least 1, got 0"):
        Ensemble.create(mlp, 0)
    with pytest.raises(TransformError, match='init must be "call" or "vmap"'):
        Ensemble.create(mlp, 2, init="fast")
    with pytest.raises(TransformError, match="Scale '' has parameters but no reset"):
        Ensemble.create(Scale, 2, init="vmap")
    with pytest.raises(TransformError, match=r"first dim of 2 members, got shape \[3, 3\]"):
        Ensemble([mlp(), mlp()]).map_members(torch.randn(3, 3))


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x * self.scale


def test_attention_is_initialised_as_by_its_constructor():
    ensemble = Ensemble.create(lambda: nn.TransformerEncoderLayer(8, 2, 16), 4, init="vmap")
    stacked = dict(ensemble.groups[0].named_parameters())
    weight = stacked["self_attn.in_proj_weight"]
    bound = (6 / (8 + 24)) ** 0.5  # Xavier's
    assert weight.shape == (4, 24, 8) and bound * 0.9 < weight.abs().max() <= bound
    assert not torch.equal(weight[0], weight[1])
    assert stacked["self_attn.out_proj.bias"].abs().max() == 0
    assert ensemble(torch.randn(5, 2, 8)).shape == (4, 5, 2, 8)
