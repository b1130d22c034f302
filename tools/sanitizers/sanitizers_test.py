"""Negative control: each sanitizer configuration catches an error planted for it."""

import subprocess

import pytest

import bazel

CASES = [
    ("asan", "use_after_free", "heap-use-after-free"),
    ("asan", "leak", "detected memory leaks"),
    ("ubsan", "overflow", "signed integer overflow"),
    ("tsan", "race", "data race"),
]


@pytest.mark.parametrize("config,error,message", CASES)
def test_planted_error_is_caught(config, error, message):
    options = [*bazel.PLAIN, f"--config={config}"]
    bazel.run("build", *options, "//tools/sanitizers:planted")
    program = bazel.bin_dir(f"--config={config}") / "tools" / "sanitizers" / "planted"
    done = subprocess.run([program, error], stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    assert done.returncode != 0
    assert message in done.stdout
    assert subprocess.run([program]).returncode == 0
