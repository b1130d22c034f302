"""checkpoint against the same function without it."""

import gc
import weakref

import pytest
import torch

import torchlift
from torchlift import (
    TransformError,
    UnsupportedError,
    checkpoint,
    checkpoint_name,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    save_names,
    vjp,
    vmap,
)

D = torch.float64


class Model:
    """Three layers; w is closed over, v an argument."""

    def __init__(self, policy="nothing"):
        generator = torch.Generator().manual_seed(0)
        self.w, self.v = (torch.randn(4, 4, dtype=D, generator=generator) for _ in range(2))
        self.policy, self.calls = policy, 0

    def layer(self, h, v):
        self.calls += 1
        product = checkpoint_name(h @ self.w, "product")
        return (product.tanh() @ v + h).sin() * 2

    def __call__(self, h):
        for _ in range(3):
            if self.policy is None:
                h = self.layer(h, self.v)
            else:
                h = checkpoint(self.layer, h, v=self.v, policy=self.policy)
        return h

    def loss(self, x):
        return self(x).square().sum()


POLICIES = ["nothing", "products", save_names("product"), save_names("other")]
TRANSFORMS = {
    "grad": (lambda m: grad(m.loss), (4,)),
    "vjp": (lambda m: lambda x: vjp(m, x)[1](x.cos())[0], (4,)),
    "jacrev": (jacrev, (4,)),
    "hessian": (lambda m: hessian(m.loss), (4,)),
    "grad of grad": (lambda m: jacrev(grad(m.loss)), (4,)),
    "third": (lambda m: jacrev(jacrev(grad(m.loss))), (4,)),
    "vmap of grad": (lambda m: vmap(grad(m.loss)), (3, 4)),
    "grad of vmap": (lambda m: grad(lambda x: vmap(m.loss)(x).sin().sum()), (3, 4)),
    "grad of vmap of vmap": (
        lambda m: grad(lambda x: vmap(vmap(m.loss))(x).sin().sum()),
        (2, 3, 4),
    ),
    "jacrev of vmap": (lambda m: jacrev(vmap(m.loss)), (3, 4)),
    "vmap of hessian": (lambda m: vmap(hessian(m.loss)), (3, 4)),
    "grad of vmap of grad": (
        lambda m: grad(lambda x: vmap(grad(m.loss))(x).sin().sum()),
        (3, 4),
    ),
    "jvp of vmap of grad": (lambda m: lambda x: jvp(vmap(grad(m.loss)), (x,), (x,))[1], (3, 4)),
    "vmap of jvp of grad": (lambda m: vmap(lambda x: jvp(grad(m.loss), (x,), (x,))[1]), (3, 4)),
}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms(name, policy):
    transform, shape = TRANSFORMS[name]
    x = torch.randn(shape, dtype=D)
    model = Model(policy)
    torch.testing.assert_close(transform(model)(x), transform(Model(None))(x))
    assert model.calls > 3  # it ran again


@pytest.mark.parametrize("transform", [jacfwd, vmap], ids=["jacfwd", "vmap"])
def test_nothing_runs_again_without_reverse_mode(transform):
    x = torch.randn(4, 4, dtype=D)[0] if transform is jacfwd else torch.randn(3, 4, dtype=D)
    model = Model()
    torch.testing.assert_close(transform(model)(x), transform(Model(None))(x))
    assert model.calls == 3


@pytest.mark.parametrize("size", [0, 1, 5])
def test_batch_sizes_and_dims(size):
    x = torch.randn(4, size, dtype=D)
    found = vmap(grad(Model().loss), in_dims=1, out_dims=1)(x)
    torch.testing.assert_close(found, vmap(grad(Model(None).loss), in_dims=1, out_dims=1)(x))


def test_backward_of_a_module():
    layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
    x = torch.randn(5, 8)

    def gradients(run):
        layers.zero_grad()
        h = x
        for layer in layers:
            h = run(lambda t: layer(t).relu(), h)
        h.square().sum().backward()
        return [p.grad.clone() for p in layers.parameters()]

    # A lambda in a loop sees the last layer when it runs again: bind it.
    def bound(run):
        layers.zero_grad()
        h = x
        for layer in layers:
            h = run(lambda t, layer: layer(t).relu(), h, layer)
        h.square().sum().backward()
        return [p.grad.clone() for p in layers.parameters()]

    torch.testing.assert_close(bound(checkpoint), gradients(lambda f, *args: f(*args)))
    with pytest.raises(RuntimeError, match="used a tensor that it had not used before"):
        gradients(checkpoint)


def test_trees_and_constants():
    def f(tree, scale, *, shift=None):
        return {"a": tree["x"] * scale, "n": scale, "b": [(tree["y"] + shift).sin(), None]}

    def loss(run):
        def of(x):
            out = run(f, {"x": x, "y": x.cos()}, 3, shift=x)
            assert out["n"] == 3 and out["b"][1] is None
            return (out["a"] * out["b"][0]).sum()

        return of

    x = torch.randn(4, dtype=D)
    plain = loss(lambda f, *args, **kwargs: f(*args, **kwargs))
    torch.testing.assert_close(hessian(loss(checkpoint))(x), hessian(plain)(x))


@pytest.mark.parametrize("randomness", ["different", "same"])
def test_random_numbers(randomness):
    def f(x):
        return torch.dropout(x.sin(), 0.5, True) * torch.rand_like(x)

    x = torch.randn(3, 50)

    def gradients(run):
        torch.manual_seed(1)
        inside = vmap(grad(lambda row: run(f, row).sum()), randomness=randomness)(x)
        outside = grad(
            lambda x: vmap(lambda row: run(f, row).sum(), randomness=randomness)(x).sum()
        )(x)
        return inside, outside, torch.rand(3)

    torch.testing.assert_close(gradients(checkpoint), gradients(lambda f, x: f(x)), rtol=0, atol=0)


def test_reproducible_random_numbers_are_refused():
    x = torch.randn(3, 5)
    f = grad(lambda row: checkpoint(lambda t: t * torch.rand_like(t), row).sum())
    with pytest.raises(UnsupportedError, match="was called in a backward pass"):
        vmap(f, randomness="reproducible")(x)


def test_autocast():
    w = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(3, 8)
    dtypes = []

    def f(x):
        y = x @ w
        dtypes.append(y.dtype)
        return y.float().sin()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = f(x)
        y = checkpoint(f, x)
    (found,) = torch.autograd.grad(y.sum(), w)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sum(), w)[0], rtol=0, atol=0)
    assert dtypes == [torch.bfloat16] * 3


def test_policy_keeps_products():
    """In the second run, a product that was kept is not computed."""
    w = torch.randn(16, 16)
    x = torch.randn(16, 16, requires_grad=True)
    for policy, expected in [("nothing", 2), ("products", 0), (save_names("a"), 1)]:
        y = checkpoint(lambda x: checkpoint_name(x @ w, "a").sin() @ w, x, policy=policy).sum()
        # A product that is found is asked for all the same: those that allocate are computed.
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            torch.autograd.grad(y, x)
        products = [e for e in profile.events() if e.name == "aten::mm" and e.cpu_memory_usage]
        assert len(products) - 2 == expected  # two in the backward pass itself


def test_nothing_is_kept_alive():
    x = torch.randn(4, requires_grad=True)
    inner = []

    def f(x):
        y = x.sin()
        inner.append(weakref.ref(y))
        return y.cos()

    y = checkpoint(f, x)
    gc.collect()
    assert inner[0]() is None
    held = weakref.ref(f)
    del f, y
    gc.collect()
    assert held() is None


def test_exceptions_of_the_function():
    x = torch.randn(3, 4, requires_grad=True)
    calls = []

    def f(x):
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("mine")
        return x.sin()

    y = vmap(lambda row: checkpoint(f, row))(x)
    with pytest.raises(KeyError, match="mine"):
        y.sum().backward()


def test_errors():
    x = torch.randn(4, dtype=D)
    with pytest.raises(TransformError, match=r"\[checkpoint\] the first argument must be a function"):
        checkpoint(x, x)
    with pytest.raises(TransformError, match="policy must be 'nothing', 'products' or save_names"):
        checkpoint(torch.sin, x, policy="everything")
    with pytest.raises(TransformError, match="names must be strings, got 3"):
        save_names(3)
    with pytest.raises(TransformError, match="expected a tensor and a string"):
        checkpoint_name(x, 3)
    with pytest.raises(UnsupportedError, match="writes into one of its arguments in place"):
        checkpoint(lambda t: t.mul_(2), x.clone())
    leaf = x.clone().requires_grad_()
    h = leaf * 1
    y = checkpoint(torch.sin, h).sum()
    h.detach().mul_(2)
    with pytest.raises(RuntimeError, match="was written into between the function and its"):
        y.backward()


def test_ended_levels():
    x = torch.randn(3, 4, dtype=D)

    def captures(row):
        c = row.cos()
        return checkpoint(lambda t: t * c, row).sum()

    torch.testing.assert_close(vmap(grad(captures))(x), x.cos() - x * x.sin())
    with pytest.raises(UnsupportedError, match="Pass it to checkpoint as an argument"):
        grad(lambda x: vmap(captures)(x).sum())(x)

    def passes(row):
        return checkpoint(lambda t, c: t * c, row, row.cos()).sum()

    found = grad(lambda x: vmap(passes)(x).sum())(x)
    torch.testing.assert_close(found, x.cos() - x * x.sin())
    slope = lambda x: jvp(lambda y: checkpoint(torch.sin, y), (x,), (torch.ones_like(x),))[1].sum()
    with pytest.raises(UnsupportedError, match="a jvp that has ended"):
        grad(slope)(x)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("name", TRANSFORMS)
def test_in_traces(name, policy):
    transform, shape = TRANSFORMS[name]
    model = Model(policy)
    f, x = transform(model), torch.rand(shape, dtype=D)
    expected = transform(Model(None))(x)
    torch.testing.assert_close(torchlift.jit(f)(x), expected)
    traced = torchlift.trace(f)(torch.rand(shape, dtype=D))
    calls = model.calls
    torch.testing.assert_close(traced(x), expected)
    assert model.calls == calls


def test_in_a_trace_statistics_are_written_once():
    norm, plain = (torch.nn.BatchNorm1d(3, dtype=D) for _ in range(2))
    x = torch.rand(4, 3, dtype=D)
    graph = torchlift.trace(grad(lambda x: checkpoint(norm, x).sin().sum()))(x)
    torch.testing.assert_close(graph(x), grad(lambda x: plain(x).sin().sum())(x))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    assert norm.num_batches_tracked == 1
