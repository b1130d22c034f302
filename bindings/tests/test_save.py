"""save and load: functions in files."""

import collections
import subprocess
import sys
import textwrap

import pytest
import torch

import torchlift


def loss(params, x, y):
    h = torch.nn.functional.linear(x, params["w"], params["b"]).tanh()
    return ((h - y) ** 2).mean()


@pytest.fixture
def data():
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 4), "b": torch.randn(3)}
    return params, torch.randn(8, 4), torch.randn(8, 3)


PER_SAMPLE = torchlift.vmap(torchlift.grad(loss), in_dims=(None, 0, 0))


def test_what_was_saved_is_what_runs(tmp_path, data):
    path = tmp_path / "grads.tlc"
    torchlift.save(PER_SAMPLE, path, *data)
    loaded = torchlift.load(path)
    params, x, y = data
    x = x + 1
    got, expected = loaded(params, x, y), PER_SAMPLE(params, x, y)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value)
    assert "params: {b: Tensor, w: Tensor}" in loaded.signature
    torch.testing.assert_close(loaded(params, y=y, x=x)["w"], expected["w"])


def test_any_size_of_a_dynamic_dim(tmp_path, data):
    params, x, y = data
    path = tmp_path / "grads.tlc"
    torchlift.save(PER_SAMPLE, path, *data, dynamic={"x": {0: "batch"}, "y": {0: "batch"}})
    loaded = torchlift.load(path)
    for n in (1, 2, 5):
        torch.testing.assert_close(
            loaded(params, x[:n], y[:n])["w"], PER_SAMPLE(params, x[:n], y[:n])["w"]
        )


def test_cross_entropy_of_any_batch_size(tmp_path):
    """Its backward pass takes a weight that it does not read: the same in each trace, and in each file."""

    def loss(w, x, y):
        return torch.nn.functional.cross_entropy(x @ w, y)

    f = torchlift.vmap(torchlift.grad(loss), in_dims=(None, 0, 0))
    w, x, y = torch.randn(4, 3), torch.randn(64, 4), torch.randint(3, (64,))
    contents = set()
    for i in range(5):
        used = [torch.full((1,), float(i + 2)) for _ in range(100)]
        del used
        path = tmp_path / f"{i}.tlc"
        torchlift.save(f, path, w, x, y, dynamic={"x": {0: "batch"}, "y": {0: "batch"}})
        contents.add(path.read_bytes())
    assert len(contents) == 1
    got = torchlift.load(path)(w, x[:7], y[:7])
    torch.testing.assert_close(got, f(w, x[:7], y[:7]))


@pytest.mark.parametrize("channels", [8, 12, 33])
def test_pools_of_any_batch_size(tmp_path, channels):
    """The layout that a batched max pool works in is chosen by the channels alone in a trace."""

    def pooled(x):
        return (torch.nn.functional.max_pool2d(x, 2) ** 2).sum()

    f = torchlift.vmap(torchlift.grad_and_value(pooled))
    torchlift.save(f, tmp_path / "f.tlc", torch.randn(6, channels, 6, 6), dynamic={"x": {0: "batch"}})
    loaded = torchlift.load(tmp_path / "f.tlc")
    for n in (1, 2, 5, 40):
        x = torch.randn(n, channels, 6, 6)
        for got, expected in zip(loaded(x), f(x)):
            torch.testing.assert_close(got, expected)


def test_it_can_be_transformed_and_saved_again(tmp_path):
    torchlift.save(lambda x: (x.sin() * x).sum(), tmp_path / "f.tlc", torch.ones(3))
    f = torchlift.load(tmp_path / "f.tlc")
    jacobian = torchlift.vmap(torchlift.grad(f))
    x = torch.randn(4, 3)
    torch.testing.assert_close(jacobian(x), x.cos() * x + x.sin())
    torchlift.save(jacobian, tmp_path / "g.tlc", x)
    torch.testing.assert_close(torchlift.load(tmp_path / "g.tlc")(x), x.cos() * x + x.sin())


def test_structures_and_constants(tmp_path):
    def f(pair, scale, *, flag=None):
        a, (b, c) = pair
        return [a * scale, {"sum": b + c, "scale": scale, "none": flag}], (a,)

    pair = [torch.randn(2), (torch.randn(3), torch.randn(3))]
    torchlift.save(f, tmp_path / "f.tlc", pair, 3, flag=None)
    loaded = torchlift.load(tmp_path / "f.tlc")
    got, expected = loaded(pair, 3, flag=None), f(pair, 3)
    assert isinstance(got, tuple) and isinstance(got[0], list)
    torch.testing.assert_close(got[0][0], expected[0][0])
    assert got[0][1]["scale"] == 3 and got[0][1]["none"] is None
    with pytest.raises(torchlift.TransformError, match=r"scale must be 3, got"):
        loaded(pair, 4, flag=None)
    with pytest.raises(torchlift.TransformError, match="takes .*; got 1 positional"):
        loaded(pair)
    with pytest.raises(torchlift.TransformError, match=r"pair\[0\] must be a tensor"):
        loaded([1, pair[1]], 3, flag=None)


def test_weights_are_saved_with_it(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    torchlift.save(torchlift.vmap(torchlift.jacrev(net)), tmp_path / "jac.tlc", torch.randn(5, 4))
    expected = torchlift.vmap(torchlift.jacrev(net))(torch.ones(5, 4)).detach()
    code = f"""
        import torch, torchlift
        out = torchlift.load({str(tmp_path / "jac.tlc")!r})(torch.ones(5, 4))
        torch.save(out, {str(tmp_path / "out.pt")!r})
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


def test_random_operators_take_a_seed(tmp_path):
    torchlift.save(lambda x: x + torch.rand_like(x), tmp_path / "f.tlc", torch.zeros(4))
    f = torchlift.load(tmp_path / "f.tlc")
    assert torch.equal(f(torch.zeros(4), seed=3), f(torch.zeros(4), seed=3))
    assert not torch.equal(f(torch.zeros(4)), f(torch.zeros(4)))


def test_what_a_file_does_not_keep(tmp_path):
    Pair = collections.namedtuple("Pair", "a b")
    torchlift.save(lambda p: p.a + p.b, tmp_path / "f.tlc", Pair(torch.ones(2), torch.ones(2)))
    loaded = torchlift.load(tmp_path / "f.tlc")
    assert torch.equal(loaded((torch.ones(2), torch.ones(2))), torch.full((2,), 2.0))
    with pytest.raises(torchlift.UnsupportedError, match="x holds .*set.*, which a file does not keep"):
        torchlift.save(lambda x: torch.ones(2), tmp_path / "g.tlc", {1, 2})


def test_bad_files(tmp_path):
    with pytest.raises(torchlift.TransformError):
        torchlift.load(tmp_path / "none.tlc")
    (tmp_path / "text.tlc").write_text("not an artifact")
    with pytest.raises(torchlift.TransformError):
        torchlift.load(tmp_path / "text.tlc")
