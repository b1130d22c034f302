"""The example in a small form."""

import math
import subprocess

import bazel  # tools/bazel.py
import pytest
import torch


def test_python(example, tmp_path):
    found = example.run(widths=(16, 128), networks=8, trained=3)
    narrow, wide = (found["distances"][width].mean().item() for width in (16, 128))
    assert 1.5 < narrow / wide < 6  # the square root of 8, and chance
    assert wide < 0.35
    assert all(prediction["fit"] < 1e-3 for prediction in found["predictions"])
    differences = [prediction["difference"] for prediction in found["predictions"]]
    assert differences[1] < differences[0] < 1
    example.draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_closed_form_on_the_diagonal_and_opposite(example):
    # Each hidden layer keeps the size and adds one to the kernel of a point with itself.
    points = example.on_circle(torch.tensor([0.3, 0.3 + math.pi], dtype=torch.float64))
    kernel = example.closed_form(points, points)
    assert kernel.diagonal().tolist() == pytest.approx([3, 3], abs=1e-6)
    # Opposite: cosines -1, then 0, then 1 / pi; kernels -1, then 0 + (-1) * 0, then 1 / pi.
    assert kernel[0, 1].item() == pytest.approx(1 / math.pi, abs=1e-6)


def test_the_kernel_is_that_of_plain_autograd(example):
    params = example.make_params(8, torch.Generator().manual_seed(0))
    points = example.on_circle(torch.tensor([0.1, 1.0, 2.5], dtype=torch.float64))
    leaves = [p.requires_grad_() for p in params.values()]
    rows = [torch.autograd.grad(example.network(params, x)[0], leaves) for x in points]
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    params = {name: p.detach() for name, p in params.items()}
    kernel = example.empirical_ntk(example.network, params, points, compute="trace")
    torch.testing.assert_close(kernel, flat @ flat.T)


def test_cpp():
    bazel.run("build", *bazel.PLAIN, "//examples/ntk:ntk")
    binary = bazel.bin_dir() / "examples" / "ntk" / "ntk"
    done = subprocess.run([binary, "8"], check=True, stdout=subprocess.PIPE, text=True)
    assert float(done.stdout.splitlines()[0].split()[-1]) < 1e-10  # the two ways to the kernel
    rows = [[float(word) for word in line.split()] for line in done.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == [16, 64, 128]
    assert 1.5 < rows[0][1] / rows[-1][1] < 6
    assert rows[-1][2] < rows[0][2]
