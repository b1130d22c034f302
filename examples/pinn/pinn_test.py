"""The example in a small form."""

import subprocess

import bazel  # tools/bazel.py
import pytest
import torch


def test_python(example, tmp_path):
    found = example.run(steps=12, adam_steps=20)
    assert found["error"][0] < 1e-4 < 1e-2 < found["before"][0]
    assert found["log"][-1][1] < 1e-4 * found["log"][0][1]
    example.draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_boundary_values_are_the_solution(example):
    problem, side = example.Problem(), torch.linspace(0, 1, 7, dtype=torch.float64)
    for points in (
        torch.stack([side, torch.zeros_like(side)], 1),
        torch.stack([side, torch.ones_like(side)], 1),
        torch.stack([torch.zeros_like(side), side], 1),
        torch.stack([torch.ones_like(side), side], 1),
    ):
        assert problem.error(problem.params, points)[0] < 1e-14


def test_the_residual_of_the_solution_is_zero(example):
    problem = example.Problem()
    problem.u = lambda params, point: example.exact(point)
    for point in example.grid(3):
        assert abs(problem.residual(problem.params, point).item()) < 1e-12


def test_the_residual_is_that_of_finite_differences(example):
    problem, point, h = example.Problem(seed=1), torch.tensor([0.3, 0.6], dtype=torch.float64), 1e-4
    u = lambda a, b: problem.u(problem.params, point + h * torch.tensor([a, b])).item()  # noqa: E731
    uxx, uyy = (u(1, 0) - 2 * u(0, 0) + u(-1, 0)) / h**2, (u(0, 1) - 2 * u(0, 0) + u(0, -1)) / h**2
    uxy = (u(1, 1) - u(1, -1) - u(-1, 1) + u(-1, -1)) / (4 * h**2)
    expected = uxx * uyy - uxy**2 - example.right_side(point).item()
    assert problem.residual(problem.params, point).item() == pytest.approx(expected, abs=1e-5)


def test_cpp():
    bazel.run("build", *bazel.PLAIN, "//examples/pinn:pinn")
    binary = bazel.bin_dir() / "examples" / "pinn" / "pinn"
    done = subprocess.run([binary, "12"], check=True, stdout=subprocess.PIPE, text=True)
    first, last = (line.split() for line in (done.stdout.splitlines()[i] for i in (1, -1)))
    assert last[0] == "12" and float(last[2]) < 1e-4 < 1e-2 < float(first[2])
