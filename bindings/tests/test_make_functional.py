"""make_functional and its kin, extract_state, load_state; functorch's own are the oracle."""

import warnings

import pytest
import torch
from torch import nn

import torchlift
from torchlift import TransformError, grad, vmap

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import functorch

close = torch.testing.assert_close


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def bn_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.filterwarnings("ignore")
class TestAgainstFunctorch:
    @pytest.mark.parametrize("disable", [False, True])
    def test_make_functional(self, disable):
        model, x = net(), torch.randn(5, 3)
        f, params = torchlift.make_functional(model, disable_autograd_tracking=disable)
        g, theirs = functorch.make_functional(model, disable_autograd_tracking=disable)
        assert isinstance(params, tuple) and len(params) == len(theirs)
        for p, q in zip(params, theirs):
            close(p, q)
            assert p.requires_grad is q.requires_grad is (not disable)
            assert all(p is not own for own in model.parameters())  # copies
        close(f(params, x), g(theirs, x))
        close(f(params, input=x), model(x))

    def test_make_functional_with_buffers(self):
        model, x = bn_net(), torch.randn(5, 3)
        f, params, buffers = torchlift.make_functional_with_buffers(model)
        g, p, b = functorch.make_functional_with_buffers(model)
        assert len(params) == len(p) and len(buffers) == len(b)
        close(f(params, buffers, x), g(p, b, x))
        for ours, theirs in zip(buffers, b):  # Both write in place.
            close(ours, theirs)
        assert model[1].num_batches_tracked == 0

    def test_combine_state_for_ensemble(self):
        models, x = [bn_net().eval() for _ in range(3)], torch.randn(5, 3)
        f, params, buffers = torchlift.combine_state_for_ensemble(models)
        _, p, b = functorch.combine_state_for_ensemble(models)
        for ours, theirs in zip((*params, *buffers), (*p, *b)):
            close(ours, theirs)
            assert ours.requires_grad is theirs.requires_grad and ours.is_leaf
        got = vmap(f, in_dims=(0, 0, None))(params, buffers, x)
        close(got, torch.stack([m(x) for m in models]))


class TestMakeFunctional:
    def test_tied_weights_are_one_parameter(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        f, params = torchlift.make_functional(model)
        assert len(params) == 3
        x, w = torch.randn(2), torch.randn(2, 2)
        zero = torch.zeros(2)
        close(f((w, zero, zero), x), w @ (w @ x))

    def test_per_sample_gradients(self):
        model, xs = net(), torch.randn(6, 3)
        f, params = torchlift.make_functional(model)
        grads = vmap(grad(lambda p, x: f(p, x).square().sum()), (None, 0))(params, xs)
        for i, x in enumerate(xs):
            want = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
            for g, w in zip(grads, want):
                close(g[i], w)

    def test_errors(self):
        with pytest.raises(TransformError, match="has buffers. Use make_functional_with_buffers"):
            torchlift.make_functional(bn_net())
        f, params = torchlift.make_functional(net())
        with pytest.raises(TransformError, match=r"expected 4 parameters, got 3. Give one for each"):
            f(params[:3], torch.randn(3))


class TestState:
    def test_round_trip(self):
        a, b, x = bn_net().eval(), bn_net().eval(), torch.randn(5, 3)
        torchlift.load_state(b, torchlift.extract_state(a))
        close(a(x), b(x))
        params, buffers = torchlift.extract_state(a, detach=False)
        assert params["0.weight"] is a[0].weight and set(buffers) == {n for n, _ in a.named_buffers()}

    def test_nothing_changes_on_errors(self):
        model = nn.Linear(3, 2)
        before = model.weight.detach().clone()
        good, bad = torch.zeros(2, 3), torch.zeros(3)
        for state, text in [
            ({"weight": good, "bias": bad}, r"'bias' has shape \[2\], got \[3\]"),
            ({"weight": good}, r"missing names \['bias'\], unexpected names \[\]"),
            ({"weight": good, "bias": torch.zeros(2), "b": bad}, r"unexpected names \['b'\]"),
        ]:
            with pytest.raises(TransformError, match=text):
                torchlift.load_state(model, state)
            close(model.weight.detach(), before)
        torchlift.load_state(model, {"weight": good}, strict=False)
        close(model.weight.detach(), good)


class TestReturnedBuffers:
    def state(self, model):
        return {k: v.detach().clone() for k, v in model.state_dict().items()}

    def test_given_buffers_are_left_alone(self):
        model, x = bn_net(), torch.randn(8, 3)
        state = self.state(model)
        before = {k: v.clone() for k, v in state.items()}
        twin = bn_net()
        twin.load_state_dict(state)
        want = twin(x)
        out, buffers = torchlift.functional_call(model, state, x, mutate_buffers="return")
        close(out, want)
        assert list(buffers) == [n for n, _ in model.named_buffers()]
        for name, buffer in twin.named_buffers():
            close(buffers[name], buffer)
        for name, value in state.items():
            assert torch.equal(value, before[name])
        assert model[1].num_batches_tracked == 0
        out, buffers = torchlift.functional_call(model, {}, x, mutate_buffers="return")
        assert model[1].num_batches_tracked == 0 and buffers["1.num_batches_tracked"] == 1

    @pytest.mark.parametrize("rows", [1, 4])
    def test_modes(self, rows):
        model, xs = bn_net(), torch.randn(rows, 8, 3)
        state = self.state(model)

        def run(modes):
            call = lambda x: torchlift.functional_call(  # noqa: E731
                model, state, x, mutate_buffers="return", buffer_modes=modes
            )
            return vmap(call)(xs)

        out, per_row = run("per_row")
        _, shared = run({"": "shared", "1.running_var": "frozen"})
        _, frozen = run({"1": "frozen"})
        singles = [torchlift.functional_call(model, state, x, mutate_buffers="return") for x in xs]
        close(out, torch.stack([o for o, _ in singles]))
        for name in per_row:
            want = torch.stack([b[name] for _, b in singles])
            close(per_row[name], want)
            same = state[name].expand(rows, *state[name].shape)
            close(frozen[name], same)
            if name == "1.running_mean":
                close(shared[name], want.mean(0).expand_as(want))
            if name == "1.running_var":
                close(shared[name], same)
        assert shared["1.num_batches_tracked"].tolist() == [1] * rows

    def test_with_vmap_of_grad_and_nested_vmap(self):
        model, xs = bn_net(), torch.randn(2, 3, 8, 3)
        params, buffers = torchlift.extract_state(model)

        def loss(p, x):
            out, new = torchlift.functional_call(model, (p, buffers), x, mutate_buffers="return")
            return out.pow(3).sum(), new

        f = grad(loss, has_aux=True)
        grads, new = vmap(vmap(f, in_dims=(None, 0)), in_dims=(None, 0))(params, xs)
        for i in range(2):
            for j in range(3):
                want, want_buffers = f(params, xs[i, j])
                for name in want:
                    close(grads[name][i, j], want[name], rtol=1e-4, atol=1e-4)
                for name in want_buffers:
                    close(new[name][i, j], want_buffers[name])

    def test_reassigned_buffers(self):
        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("n", torch.zeros(()))

            def forward(self, x):
                self.n = self.n + x.sum()
                return x * self.n

        counter = Counter()
        call = lambda x: torchlift.functional_call(counter, {}, x, mutate_buffers="return")  # noqa: E731
        _, buffers = vmap(call)(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        assert buffers["n"].tolist() == [3.0, 7.0] and counter.n == 0

    def test_errors(self):
        model, x = bn_net(), torch.randn(8, 3)
        call = lambda **kw: torchlift.functional_call(model, {}, x, **kw)  # noqa: E731
        with pytest.raises(TransformError, match='must be "return" or None'):
            call(mutate_buffers="yes")
        with pytest.raises(TransformError, match="must be one of .*'shared'.*, got 'mean'"):
            call(mutate_buffers="return", buffer_modes="mean")
        with pytest.raises(TransformError, match="names 'bn', but Sequential has no buffer"):
            call(mutate_buffers="return", buffer_modes={"bn": "shared"})


class TestBatchNormHelpers:
    def test_replace_all(self):
        ours, theirs = bn_net(), bn_net()
        theirs.load_state_dict(ours.state_dict())
        assert torchlift.replace_all_batch_norm_modules_(ours) is ours
        torch.func.replace_all_batch_norm_modules_(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        xs = torch.randn(4, 8, 3)
        close(vmap(ours)(xs), torch.stack([theirs(x) for x in xs]))

    def test_patch(self):
        shared = nn.BatchNorm2d(8)
        model = nn.Sequential(shared, nn.Sequential(shared, nn.ReLU())).eval()
        make = lambda bn: nn.GroupNorm(2, bn.num_features)  # noqa: E731
        assert torchlift.patch_batch_norm_with(model, make) is model
        assert isinstance(model[0], nn.GroupNorm) and model[0] is model[1][0]
        assert not model[0].training
        assert isinstance(torchlift.patch_batch_norm_with(nn.BatchNorm1d(4), make), nn.GroupNorm)
        with pytest.raises(TransformError, match="must return a module, got NoneType"):
            torchlift.patch_batch_norm_with(bn_net(), lambda bn: None)


def test_load_state_of_another_dtype_or_in_conflict():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    with pytest.raises(TransformError, match="'weight' has dtype torch.float32, got torch.float64"):
        torchlift.load_state(model, {"weight": torch.zeros(2, 2).double()}, strict=False)
    tied = nn.Sequential(model, nn.Linear(2, 2))
    tied[1].weight = model.weight
    state = {"0.weight": torch.zeros(2, 2), "1.weight": torch.ones(2, 2)}
    with pytest.raises(TransformError, match="'0.weight' and '1.weight' are one tensor"):
        torchlift.load_state(tied, state, strict=False)
    assert torch.equal(model.weight, before)
    torchlift.load_state(tied, {**state, "1.weight": torch.zeros(2, 2)}, strict=False)
    assert not model.weight.any()


def test_strict_names_shapes_and_dtypes():
    model, x = nn.Linear(3, 2), torch.randn(3)
    state = {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)}
    with pytest.raises(TransformError, match=r"'bias' is a tensor of shape \[2\], torch.float32, got"):
        torchlift.functional_call(model, state, x, strict=True)
    state["bias"] = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(TransformError, match=r"got one of shape \[2\], torch.float64"):
        torchlift.functional_call(model, state, x, strict=True)
