"""torchlift-run, as the wheel brings it, on files that NumPy writes and reads."""

import pathlib
import subprocess

import numpy
import pytest
import torchlift

PROGRAM = pathlib.Path(torchlift.__file__).with_name("torchlift-run")
TESTDATA = pathlib.Path(__file__).resolve().parents[2] / "compile" / "artifact" / "testdata"


def run(*words):
    done = subprocess.run([PROGRAM, *map(str, words)], capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("order", ["C", "F"])
def test_runs_on_arrays_of_numpy(tmp_path, order):
    x = numpy.random.default_rng(0).standard_normal((5, 3), dtype=numpy.float32)
    numpy.save(tmp_path / "x.npy", numpy.array(x, order=order))
    code, _, errors = run("run", TESTDATA / "rows_v1.tlc", "--inputs", tmp_path / "x.npy", "--output", tmp_path)
    assert code == 0, errors
    numpy.testing.assert_allclose(numpy.load(tmp_path / "mean.npy"), x.mean(0), rtol=1e-6)
    numpy.testing.assert_array_equal(numpy.load(tmp_path / "last.npy"), x[-1])


def test_constants_of_all_dtypes_are_read_by_numpy(tmp_path):
    code, _, errors = run("run", TESTDATA / "constants_v1.tlc", "--output", tmp_path)
    # NumPy has no bfloat16, which is said.
    assert code == 1 and "NumPy has no bfloat16. Write a .safetensors file" in errors
    numpy.testing.assert_array_equal(numpy.load(tmp_path / "weight.npy"), numpy.arange(12).reshape(3, 4))
    special = numpy.load(tmp_path / "special.npy")
    assert numpy.isnan(special[0]) and numpy.signbit(special[3]) and special[4] == 5e-324


def test_wrong_arrays_are_refused(tmp_path):
    numpy.save(tmp_path / "x.npy", numpy.zeros((5, 3), dtype=">f4"))
    code, _, errors = run("run", TESTDATA / "rows_v1.tlc", "--inputs", tmp_path / "x.npy")
    assert code == 1 and "its numbers are big endian" in errors
    numpy.save(tmp_path / "x.npy", numpy.array([object()]), allow_pickle=True)
    code, _, errors = run("run", TESTDATA / "rows_v1.tlc", "--inputs", tmp_path / "x.npy")
    assert code == 1 and "it holds Python objects" in errors


def test_a_wrong_command_line_is_explained():
    code, _, errors = run("frobnicate")
    assert code == 2 and "there is no command 'frobnicate'" in errors


def test_a_shape_of_other_numbers_is_an_error(tmp_path):
    import torch

    torchlift.save(lambda x: x[x > 0] * 2, str(tmp_path / "f.tlc"), torch.tensor([1.0, -1.0, 2.0]))
    for numbers, status in (([-1, 5, 6], 0), ([1, 5, 6], 1)):
        numpy.save(tmp_path / "x.npy", numpy.array(numbers, dtype=numpy.float32))
        code, printed, errors = run("run", tmp_path / "f.tlc", "--inputs", tmp_path / "x.npy")
        assert code == status
        assert ("10" in printed) if code == 0 else ("was 2 when the function was traced, and is 3 in this run" in errors)
