"""Finds pybind11 and the headers of Python: the ones that belong to the torch that is built for."""

load("//third_party:find.bzl", "PYTHON_ENVIRON", "ask_python", "explain", "find_python")

# NOTE [which pybind11]
# libtorch ships the pybind11 headers it was made with, and torch/csrc/utils/pybind.h (the casters of
# tensors) is written for those. Two versions on one include path would be a matter of luck, so
# @pybind11 is the pybind11 of @torch; the repository adds the headers of Python.

_BUILD = """# Made by torchlift's third_party/pybind11/pybind11.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "python_headers",
    hdrs = glob(["python/**/*.h"]),
    includes = ["python"],
)

cc_library(
    name = "pybind11",
    deps = [":python_headers", "@torch//:headers"],
)
"""

_ABOUT = "import sysconfig as s; print(s.get_path('include')); print(s.get_config_var('EXT_SUFFIX'))"

def _pybind11_repository_impl(ctx):
    python = find_python(ctx)
    answer = ask_python(ctx, python, _ABOUT)
    include, suffix = answer.split("\n") if answer else ("", "")
    if not answer or not ctx.path(include + "/Python.h").exists:
        explain(
            "Python.h",
            [include if include else "the answer of " + str(python)],
            "run tools/setup, or apt-get install python3-dev (the one that fits your interpreter)",
        )
    ctx.symlink(include, "python")
    ctx.file("BUILD.bazel", _BUILD)
    ctx.file("python.bzl", "PYTHON = \"{}\"\nEXT_SUFFIX = \"{}\"\n".format(python, suffix))

pybind11_repository = repository_rule(
    implementation = _pybind11_repository_impl,
    environ = PYTHON_ENVIRON,
    local = True,
    doc = "Makes @pybind11//:pybind11 and :python_headers.",
)
