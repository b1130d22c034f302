"""The demo in a small form, and its parts."""

import pathlib
import subprocess
import sys

import bazel  # tools/bazel.py
import pytest
import torch

HERE = pathlib.Path(__file__).resolve().parent
TARGET = "//examples/per_sample_gradients:per_sample_gradients"


@pytest.fixture
def parts(monkeypatch):
    """The demo's modules, which import each other by name."""
    monkeypatch.syspath_prepend(str(HERE))
    import digits
    import uses
    import ways

    yield digits, uses, ways
    for name in ("digits", "uses", "ways"):
        del sys.modules[name]


def test_the_demo_runs_and_all_ways_agree(tmp_path):
    bazel.run("build", *bazel.PLAIN, TARGET)
    binary = bazel.bin_dir() / "examples" / "per_sample_gradients" / "per_sample_gradients"
    command = [sys.executable, HERE / "demo.py", f"--binary={binary}", f"--out={tmp_path / 'picture.png'}"]
    command += ["--digits=150", "--epochs=2", "--rounds=1"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all gradients agree with the loop" in done.stdout
    for way in ("torchlift, C++", "torchlift, Python", "torch.func", "loop"):
        assert done.stdout.count(f"{way:<20}") == 2  # the mlp's row and the cnn's
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_gradients_fail_the_demo(parts, monkeypatch, capsys):
    digits, _, ways = parts
    import demo

    data = digits.load_digits(20, 0.1)
    model = digits.make_mlp()
    gradients, seconds = demo.compute_in_python(model, data, rounds=1)
    medians = {"mlp": {way: s[0] for way, s in seconds.items()}}
    assert demo.report({"mlp": gradients}, medians, 20)
    gradients["torchlift, Python"]["output.bias"][7] *= 1.01
    assert not demo.report({"mlp": gradients}, medians, 20)
    del sys.modules["demo"], sys.modules["picture"]


def test_labels_are_changed_for_the_share_asked_for(parts):
    digits, _, _ = parts
    data = digits.load_digits(1797, 0.05)
    assert len(data.images) == 1797 and data.images.shape[1:] == (1, 8, 8)
    assert int(data.mislabelled.sum()) == 90


def test_precision_at_top_counts_the_mislabelled(parts):
    _, uses, _ = parts
    wrong = torch.tensor([True, False, True, False])
    assert uses.precision_at_top(torch.tensor([9.0, 1.0, 8.0, 2.0]), wrong) == 1
    assert uses.precision_at_top(torch.tensor([9.0, 8.0, 1.0, 2.0]), wrong) == 0.5


def test_a_private_step_without_clipping_and_noise_is_plain_sgd(parts):
    _, uses, ways = parts
    gradients = {"w": torch.randn(6, 3), "b": torch.randn(6)}
    params = {"w": torch.zeros(3), "b": torch.zeros(())}
    step = uses.private_sgd_step(params, gradients, ways.norms({k: g.view(6, -1) for k, g in gradients.items()}), 1e6, 0.0, 1.0)
    torch.testing.assert_close(step.params["w"], -gradients["w"].mean(0))
    torch.testing.assert_close(step.params["b"], -gradients["b"].mean(0))
    assert step.clipped_share == 0 and step.noise_norm == 0


def test_no_digit_moves_the_sum_by_more_than_the_clip_norm(parts):
    _, uses, ways = parts
    gradients = {"w": torch.randn(4, 5) * 100}
    params = {"w": torch.zeros(5)}
    step = uses.private_sgd_step(params, gradients, ways.norms(gradients), 0.5, 0.0, 1.0)
    others = {"w": gradients["w"][1:]}
    without = uses.private_sgd_step(params, others, ways.norms(others), 0.5, 0.0, 1.0)
    moved = (4 * step.params["w"] - 3 * without.params["w"]).norm().item()
    assert moved == pytest.approx(0.5, rel=1e-4)
    assert step.clipped_share == 1
