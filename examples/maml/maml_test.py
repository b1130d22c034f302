"""The example in a small form."""

import importlib.util
import pathlib
import subprocess

import bazel  # tools/bazel.py

HERE = pathlib.Path(__file__).resolve().parent


def load():
    spec = importlib.util.spec_from_file_location("maml_example", HERE / "maml.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_python(tmp_path):
    example = load()
    loss, params, losses, model = example.run(iterations=60)
    assert sum(losses[-10:]) < sum(losses[:10])
    example.draw(tmp_path / "picture.png", loss, params, losses, model)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_cpp():
    bazel.run("build", *bazel.PLAIN, "//examples/maml:maml")
    subprocess.run([bazel.bin_dir() / "examples" / "maml" / "maml", "100"], check=True)
