"""The example in a small form."""

import math

import bazel  # tools/bazel.py
import pytest
import torch
import torch.nn.functional as F


def test_python_and_cpp(example, tmp_path):
    noises, steps, count = [0.5, 30], 60, 900
    found = example.run(noises, steps, seeds=1, count=count)
    bazel.run("build", *bazel.PLAIN, "//examples/dp_sgd:dp_sgd")
    found["cpp"] = example.run_cpp(bazel.bin_dir() / "examples" / "dp_sgd" / "dp_sgd", noises, steps, count)
    little, much = found["accuracies"][:, 0].tolist()
    assert little > 0.6 and much < little - 0.2
    assert found["cpp"][0.5] > 0.6 and found["cpp"][30] < found["cpp"][0.5] - 0.2
    assert found["epsilons"][0] > 10 > 1 > found["epsilons"][1] > 0
    example.draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize("order", [2, 7])
def test_the_divergence_is_that_of_the_integral(example, order):
    # Of (1 - q) N(0, s) + q N(1, s) from N(0, s), by a Riemann sum.
    q, s = 0.1, 1.3
    x = torch.linspace(-40, 60, 400_001, dtype=torch.float64)
    density = torch.exp(-x.square() / (2 * s**2)) / math.sqrt(2 * math.pi) / s
    ratio = 1 - q + q * torch.exp((2 * x - 1) / (2 * s**2))
    expected = torch.trapezoid(density * ratio**order, x).log().item() / (order - 1)
    assert example.renyi_divergence(order, q, s) == pytest.approx(expected, rel=1e-6)


def test_more_noise_and_fewer_steps_guarantee_more(example):
    bounds = [example.epsilon(noise, 100) for noise in (0, 0.5, 1, 2, 4)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] == math.inf
    assert example.epsilon(1, 50) < example.epsilon(1, 100)


def test_no_digit_moves_the_sum_by_more_than_the_clip_norm(example):
    images, labels, _, _ = example.load(90)
    torch.manual_seed(0)
    model = example.make_model()
    options = {"max_norm": 0.5, "noise_multiplier": 0.0, "expected_batch_size": 1}
    step = example.torchlift.dp_gradients(model, F.cross_entropy, **options)
    with_it, without = step(images, labels), step(images[1:], labels[1:])
    moved = torch.cat([(with_it[name] - without[name]).flatten() for name in with_it]).norm().item()
    assert moved == pytest.approx(0.5, rel=1e-3)  # its gradient is longer than that
