"""Finds libtorch: $TORCHLIFT_LIBTORCH (an unpacked libtorch), else the torch package of a Python."""

load("//third_party:find.bzl", "PYTHON_ENVIRON", "ask_python", "explain", "find_python")

_WHERE = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0])"

# NOTE [linking libtorch where it lies]
# libtorch_cpu.so of a pip package finds its CUDA companions relative to its own place ($ORIGIN), so
# a copy or a symbolic link of it in a runfiles tree cannot be loaded. Headers are linked into the
# repository (Bazel must see them as inputs); libraries are named by -L and -rpath only.

def _libtorch(ctx):
    named = ctx.os.environ.get("TORCHLIFT_LIBTORCH", "")
    if named:
        if not ctx.path(named + "/include/ATen").exists:
            explain(
                "libtorch",
                ["TORCHLIFT_LIBTORCH=" + named + " (no include/ATen there)"],
                "point TORCHLIFT_LIBTORCH to a folder that holds include/ and lib/",
            )
        return named
    python = find_python(ctx)
    found = ask_python(ctx, python, _WHERE)
    if not found:
        explain(
            "torch",
            ["TORCHLIFT_LIBTORCH (not set)", "the torch package of " + str(python)],
            "run tools/setup, or set TORCHLIFT_PYTHON to a Python with torch, or TORCHLIFT_LIBTORCH " +
            "to an unpacked libtorch",
        )
    return found

def _version(ctx, root):
    """Version numbers as [major, minor, patch], read from libtorch's own header."""
    header = root + "/include/torch/headeronly/version.h"
    if not ctx.path(header).exists:
        header = root + "/include/torch/csrc/api/include/torch/version.h"
    numbers = {}
    for line in ctx.read(header).split("\n"):
        words = [w for w in line.split(" ") if w]
        if len(words) == 3 and words[0] == "#define":
            numbers[words[1]] = words[2]
    return [numbers["TORCH_VERSION_" + part] for part in ["MAJOR", "MINOR", "PATCH"]]

def _torch_repository_impl(ctx):
    root = _libtorch(ctx)
    ctx.symlink(root + "/include", "include")
    version = _version(ctx, root)
    ctx.template("BUILD.bazel", ctx.attr._build_template, {
        "{LIB}": root + "/lib",
        "{VERSION}": ".".join(version),
        "{HAS_CUDA}": str(ctx.path(root + "/lib/libtorch_cuda.so").exists),
        "{HAS_PYTHON}": str(ctx.path(root + "/lib/libtorch_python.so").exists),
    })
    ctx.file("version.bzl", "TORCH_VERSION = \"{}\"\n".format(".".join(version)))

torch_repository = repository_rule(
    implementation = _torch_repository_impl,
    attrs = {"_build_template": attr.label(default = "//third_party/torch:torch.BUILD.tpl")},
    environ = PYTHON_ENVIRON + ["TORCHLIFT_LIBTORCH"],
    local = True,
    doc = "Makes @torch//:torch (and :headers, :torch_python, :torch_cuda) from an installed libtorch.",
)
