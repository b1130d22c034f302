"""Packs what Bazel built into out/sdk and dist/torchlift-sdk-*.tar.gz."""

import importlib.util
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tarfile

import bazel

# The user of an SDK says where libtorch is: see third_party/torch.
OPTIONS = ["--define=torchlift_rpath=none"]
STAGE = bazel.ROOT / "out" / "sdk"
RUNNER = "compile/artifact/torchlift-run"


def version():
    return (bazel.ROOT / "VERSION").read_text().strip()


def libtorch():
    named = os.environ.get("TORCHLIFT_LIBTORCH")
    spec = None if named else importlib.util.find_spec("torch")
    return pathlib.Path(named or spec.submodule_search_locations[0])


def torch_version(root):
    header = root / "include/torch/headeronly/version.h"
    if not header.exists():
        header = root / "include/torch/csrc/api/include/torch/version.h"
    return re.search(r'"(\d+\.\d+\.\d+)', header.read_text()).group(1)


def build():
    """(headers, archives, runner) as paths in the checkout and in Bazel's output folder."""
    targets = ["//:sdk_manifest", "//compile/artifact:torchlift-run"]
    bazel.run("build", *bazel.PLAIN, *OPTIONS, *targets, stdout=sys.stderr)
    bin_dir = bazel.bin_dir(*OPTIONS)
    # Manifest paths begin with bazel-out/<configuration>/bin: they count from the execution root.
    execution_root = bin_dir.parent.parent.parent
    lines = [line.split(" ", 1) for line in (bin_dir / "sdk_manifest.txt").read_text().splitlines()]
    headers = [pathlib.Path(path) for kind, path in lines if kind == "header"]
    archives = [execution_root / path for kind, path in lines if kind == "archive"]
    return headers, archives, bin_dir / RUNNER


def write_static(path, archives):
    script = [f"CREATE {path}"] + [f"ADDLIB {a}" for a in archives] + ["SAVE", "END"]
    subprocess.run(["ar", "-M"], input="\n".join(script) + "\n", text=True, check=True)


def write_shared(path, static, torch_lib):
    # -z defs: a symbol from anywhere but libtorch would be the user's puzzle.
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-shared", "-o", path, f"-Wl,-soname,{path.name}"]
        + ["-Wl,--whole-archive", static, "-Wl,--no-whole-archive", "-Wl,-z,defs"]
        + [f"-L{torch_lib}", "-ltorch_cpu", "-lc10", "-lpthread"],
        check=True,
    )


def write_template(name, target, values):
    text = (bazel.ROOT / "tools" / "sdk" / name).read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    target.write_text(text)


def stage(headers, archives, runner, torch):
    shutil.rmtree(STAGE, ignore_errors=True)
    include, lib = STAGE / "include" / "torchlift", STAGE / "lib"
    (STAGE / "bin").mkdir(parents=True)
    # It has no RPATH: whoever runs it says by LD_LIBRARY_PATH where libtorch is.
    shutil.copy(runner, STAGE / "bin" / runner.name)
    cmake = lib / "cmake" / "torchlift"
    cmake.mkdir(parents=True)
    for header in headers:
        (include / header).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bazel.ROOT / header, include / header)
    write_static(lib / "libtorchlift.a", archives)
    write_shared(lib / "libtorchlift.so", lib / "libtorchlift.a", torch / "lib")
    values = {
        "VERSION": version(),
        "MINOR": ".".join(version().split(".")[:2]),
        "TORCH_VERSION": torch_version(torch),
    }
    for name in ["torchliftConfig.cmake", "torchliftConfigVersion.cmake"]:
        write_template(f"{name}.in", cmake / name, values)
    shutil.copyfile(bazel.ROOT / "LICENSE", STAGE / "LICENSE")


def pack():
    dist = bazel.ROOT / "dist"
    dist.mkdir(exist_ok=True)
    for old in dist.glob("torchlift-sdk-*.tar.gz"):
        old.unlink()
    name = f"torchlift-sdk-{version()}-linux-{platform.machine()}"
    path = dist / f"{name}.tar.gz"
    partial = dist / f"{name}.partial"
    with tarfile.open(partial, "w:gz") as archive:
        archive.add(STAGE, arcname=name)
    partial.rename(path)
    return path


def main():
    headers, archives, runner = build()
    stage(headers, archives, runner, libtorch())
    print(pack())


if __name__ == "__main__":
    main()
