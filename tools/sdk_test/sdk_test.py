"""The SDK archive serves a CMake project, and the checkout serves an external Bazel workspace."""

import importlib.util
import os
import pathlib
import shlex
import subprocess
import sys
import tarfile

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def run(*command, **kwargs):
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs
    )
    return done.returncode, done.stdout


def succeed(*command, **kwargs):
    code, output = run(*command, **kwargs)
    assert code == 0, output
    return output


@pytest.fixture(scope="module")
def sdk(tmp_path_factory):
    """The newest archive, unpacked in a place it was not built in."""
    archives = sorted(ROOT.glob("dist/torchlift-sdk-*.tar.gz"))
    assert archives, "no SDK archive: run tools/build_sdk"
    where = tmp_path_factory.mktemp("sdk")
    with tarfile.open(archives[-1]) as archive:
        archive.extractall(where)
    return next(where.iterdir())


def configure(sdk, build, *options):
    return run(
        *["cmake", "-S", HERE / "cmake_project", "-B", build, "-G", "Ninja"],
        *[f"-Dtorchlift_ROOT={sdk}", f"-DPython3_EXECUTABLE={sys.executable}", *options],
    )


@pytest.fixture(scope="module")
def build(sdk, tmp_path_factory):
    where = tmp_path_factory.mktemp("build")
    code, output = configure(sdk, where)
    assert code == 0, output
    succeed("cmake", "--build", where)
    return where


@pytest.mark.parametrize("program", ["with_shared", "with_static"])
def test_cmake_program_runs(build, program):
    assert "per-sample gradients are right" in succeed(build / program)


def test_shared_library_names_no_folder_of_the_build(sdk):
    dynamic = succeed("readelf", "-d", sdk / "lib" / "libtorchlift.so")
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, dynamic


def test_runner_of_the_sdk_runs_with_any_libtorch(sdk):
    runner = sdk / "bin" / "torchlift-run"
    dynamic = succeed("readelf", "-d", runner)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic, dynamic
    libtorch = pathlib.Path(importlib.util.find_spec("torch").submodule_search_locations[0])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(libtorch / "lib")}
    graph = ROOT / "compile" / "artifact" / "testdata" / "loss_v1.tlc"
    assert "valid (3 operators" in succeed(runner, "validate", graph, env=environment)


def test_cmake_explains_a_missing_libtorch(sdk, tmp_path):
    code, output = configure(sdk, tmp_path / "build", f"-DTORCHLIFT_LIBTORCH={tmp_path}")
    assert code != 0
    assert "libtorch was not found" in output
    assert "TORCHLIFT_LIBTORCH" in output


def test_cmake_refuses_another_torch(sdk, tmp_path):
    header = tmp_path / "include/torch/headeronly/version.h"
    header.parent.mkdir(parents=True)
    header.write_text('#define TORCH_VERSION \\\n  "2.9.1"\n')
    code, output = configure(sdk, tmp_path / "build", f"-DTORCHLIFT_LIBTORCH={tmp_path}")
    assert code != 0
    assert "this is torch" in output and "2.9.1" in output.replace("\n", "")


@pytest.mark.parametrize(
    "workspace, target, said",
    [
        (HERE / "external_workspace", "//:consumer", "batched dot products are right"),
        (ROOT / "examples" / "compiled_library", "//:compiled_library", "the compiled gradients are right"),
    ],
    ids=["consumer", "compiled_library"],
)
def test_external_bazel_workspace(workspace, target, said):
    # The machine's own settings are the checkout's. fastbuild: the other mode is tested by everything else.
    rc = ROOT / ".bazelrc.setup"
    startup = [f"--bazelrc={rc}"] if rc.exists() else []
    if os.environ.get("TORCHLIFT_BAZEL_STARTUP"):
        # Never the output base of the checkout itself.
        startup += [
            word + "-external" if word.startswith("--output_base=") else word
            for word in shlex.split(os.environ["TORCHLIFT_BAZEL_STARTUP"])
        ]
    options = ["--color=no", "--curses=no", "--spawn_strategy=local", "--compilation_mode=fastbuild"]
    options += ["--experimental_convenience_symlinks=ignore"]  # Links in the checkout would be its packages.
    try:
        output = succeed("bazel", *startup, "run", *options, target, cwd=workspace)
    finally:
        run("bazel", *startup, "shutdown", cwd=workspace)
    assert said in output
