"""The example in a small form."""

import math
import subprocess

import bazel  # tools/bazel.py
import pytest
import torch


def test_python(example, tmp_path):
    found = example.run(starts=20)
    assert found["dimer"][-1].item() == pytest.approx(math.sqrt(144 / 2 ** (1 / 3)), abs=1e-9)
    # Three translations, two rotations, of a molecule on a line; one more of another.
    assert found["dimer"][:5].abs().max() < 1e-4
    assert found["water"][:6].abs().max() < 1e-2
    for computed, exact in zip(found["water"][6:].tolist(), example.exact_water_frequencies()):
        assert computed == pytest.approx(exact, abs=1e-6)
    assert len(found["energies"]) > 10
    known = torch.tensor(example.SEVEN_ATOMS, dtype=torch.float64)
    assert (found["energies"][:, None] - known).abs().amin(1).max() < 1e-5
    assert found["forces"].max() < 1e-8
    assert found["cluster"][:, :6].abs().max() < 1e-2
    example.draw(tmp_path / "picture.png", found)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_hessian_is_the_difference_of_forces(example):
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64) * 1.5
    hessian = example.hessian(example.lennard_jones)(x)
    for atom, axis in ((0, 0), (3, 2)):
        shift = torch.zeros_like(x)
        shift[atom, axis] = 1e-5
        forces = example.grad(example.lennard_jones)
        difference = (forces(x + shift) - forces(x - shift)) / 2e-5
        torch.testing.assert_close(hessian[atom, axis], difference, rtol=1e-4, atol=1e-4)


def test_cpp(example):
    bazel.run("build", *bazel.PLAIN, "//examples/normal_modes:normal_modes")
    binary = bazel.bin_dir() / "examples" / "normal_modes" / "normal_modes"
    done = subprocess.run([binary, "20"], check=True, stdout=subprocess.PIPE, text=True)
    rows = [line.split() for line in done.stdout.splitlines()]
    computed = {row[0]: float(row[1]) for row in rows if len(row) == 3}
    assert computed["dimer"] == pytest.approx(example.exact_dimer_frequency(), abs=1e-8)
    names = ["water_bend", "water_symmetric", "water_antisymmetric"]
    for name, exact in zip(names, example.exact_water_frequencies()):
        assert computed[name] == pytest.approx(exact, abs=1e-6)
    energies = [float(row[1]) for row in rows if row[0] == "cluster_energy"]
    assert len(energies) >= 2
    assert all(min(abs(e - known) for known in example.SEVEN_ATOMS) < 1e-5 for e in energies)
