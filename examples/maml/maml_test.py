"""The example in a small form."""

import subprocess

import bazel  # tools/bazel.py


def test_python(example, tmp_path):
    loss, params, losses, model = example.run(iterations=60)
    assert sum(losses[-10:]) < sum(losses[:10])
    example.draw(tmp_path / "picture.png", loss, params, losses, model)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_cpp():
    bazel.run("build", *bazel.PLAIN, "//examples/maml:maml")
    subprocess.run([bazel.bin_dir() / "examples" / "maml" / "maml", "100"], check=True)
