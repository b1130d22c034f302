"""Packs the Python package and the extension that Bazel built into dist/torchlift-*.whl."""

import base64
import hashlib
import importlib.metadata
import pathlib
import sys
import sysconfig
import zipfile

import bazel

PACKAGE = bazel.ROOT / "bindings" / "torchlift"
# An extension that looks for libtorch in the torch package beside it: see third_party/torch.
WHEEL_OPTIONS = ["--define=torchlift_rpath=wheel"]
# The earliest time a zip file can hold: equal contents make an equal wheel.
EPOCH = (1980, 1, 1, 0, 0, 0)


def version():
    return (bazel.ROOT / "VERSION").read_text().strip()


def torch_requirement():
    """One wheel, one torch minor: libtorch promises no binary interface across them."""
    major, minor = importlib.metadata.version("torch").split(".")[:2]
    return f"torch=={major}.{minor}.*"


def metadata():
    fields = [
        ("Metadata-Version", "2.1"),
        ("Name", "torchlift"),
        ("Version", version()),
        ("Summary", "Composable function transforms (vmap, grad, vjp) for PyTorch, in C++"),
        ("License", "BSD-3-Clause"),
        ("Requires-Python", f"=={sys.version_info.major}.{sys.version_info.minor}.*"),
        ("Requires-Dist", torch_requirement()),
        ("Requires-Dist", "optree>=0.13"),
        ("Description-Content-Type", "text/markdown"),
    ]
    readme = bazel.ROOT / "README.md"
    text = readme.read_text() if readme.exists() else ""
    return "".join(f"{key}: {value}\n" for key, value in fields) + "\n" + text


def tag():
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    return f"{python}-{python}-{platform}"


def build_binaries():
    """The extension, and the program torchlift-run."""
    targets = ["//bindings:_C.so", "//compile/artifact:torchlift-run"]
    bazel.run("build", *bazel.PLAIN, *WHEEL_OPTIONS, *targets, stdout=sys.stderr)
    folder = bazel.bin_dir(*WHEEL_OPTIONS)
    return folder / "bindings" / "_C.so", folder / "compile" / "artifact" / "torchlift-run"


def contents(extension, runner):
    """(name in the wheel, bytes) of every file but RECORD."""
    info = f"torchlift-{version()}.dist-info"
    for path in sorted(PACKAGE.rglob("*")):
        if path.suffix in (".py", ".pyi", ".typed"):
            yield f"torchlift/{path.relative_to(PACKAGE)}", path.read_bytes()
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    yield f"torchlift/_C{suffix}", extension.read_bytes()
    # Where _C is, for it finds libtorch by the same RPATH.
    yield "torchlift/torchlift-run", runner.read_bytes()
    wheel = f"Wheel-Version: 1.0\nGenerator: torchlift\nRoot-Is-Purelib: false\nTag: {tag()}\n"
    yield f"{info}/METADATA", metadata().encode()
    yield f"{info}/WHEEL", wheel.encode()
    yield f"{info}/entry_points.txt", b"[console_scripts]\ntorchlift-run = torchlift._runner:main\n"
    yield f"{info}/LICENSE", (bazel.ROOT / "LICENSE").read_bytes()


def record_line(name, data):
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{name},sha256={digest},{len(data)}\n"


def write_wheel(path, files):
    record = ""
    record_name = f"torchlift-{version()}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:

        def add(name, data):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (0o100755 if ".so" in name or name.endswith("-run") else 0o100644) << 16
            wheel.writestr(entry, data)

        for name, data in files:
            add(name, data)
            record += record_line(name, data)
        add(record_name, (record + f"{record_name},,\n").encode())


def main():
    dist = bazel.ROOT / "dist"
    dist.mkdir(exist_ok=True)
    for old in dist.glob("torchlift-*.whl"):
        old.unlink()
    path = dist / f"torchlift-{version()}-{tag()}.whl"
    partial = pathlib.Path(str(path) + ".partial")
    write_wheel(partial, contents(*build_binaries()))
    partial.rename(path)
    print(path)


if __name__ == "__main__":
    main()
