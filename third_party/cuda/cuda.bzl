"""Finds a CUDA toolkit (CUDA_HOME or /usr/local/cuda). CUDA is optional: without it, stubs say so."""

_FOUND = """# Made by torchlift's third_party/cuda/cuda.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "cuda_headers",
    hdrs = glob(["include/**/*.h", "include/**/*.hpp"]),
    includes = ["include"],
    defines = ["TORCHLIFT_HAVE_CUDA=1"],
)
"""

# An empty library instead of a failure: code guards itself by TORCHLIFT_HAVE_CUDA.
_ABSENT = """# Made by torchlift's third_party/cuda/cuda.bzl: no CUDA toolkit was found.
# To get one: install it and set CUDA_HOME to its folder (the one that holds include/cuda.h).
load("@rules_cc//cc:defs.bzl", "cc_library")

cc_library(
    name = "cuda_headers",
    visibility = ["//visibility:public"],
)
"""

def _cuda_repository_impl(ctx):
    named = ctx.os.environ.get("CUDA_HOME", "")
    home = named if named else "/usr/local/cuda"
    found = ctx.path(home + "/include/cuda.h").exists
    if named and not found:
        fail("\n\ntorchlift: CUDA_HOME={} holds no include/cuda.h.\n".format(named) +
             "  To get it: install the CUDA toolkit there, or unset CUDA_HOME to build without.\n")
    if found:
        ctx.symlink(home + "/include", "include")
    ctx.file("BUILD.bazel", _FOUND if found else _ABSENT)

cuda_repository = repository_rule(
    implementation = _cuda_repository_impl,
    environ = ["CUDA_HOME"],
    local = True,
    doc = "Makes @cuda//:cuda_headers, empty where there is no toolkit.",
)
