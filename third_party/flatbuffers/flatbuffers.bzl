"""Finds FlatBuffers, headers and compiler, as a system package (FLATBUFFERS_ROOT, /usr/local or /usr).

Targets carry the names they have in FlatBuffers' own build, so that a module from a registry fits too. Reading, writing
and verifying need headers alone: there is no library to link.
"""

load("//third_party:find.bzl", "explain", "find_header")

_BUILD = """# Made by torchlift's third_party/flatbuffers/flatbuffers.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "flatbuffers",
    hdrs = glob(["include/flatbuffers/**/*.h"]),
    includes = ["include"],
)

filegroup(
    name = "flatc",
    srcs = ["bin/flatc"],
)
"""

def _flatbuffers_repository_impl(ctx):
    include = find_header(ctx, "flatbuffers/flatbuffers.h", "FLATBUFFERS_ROOT")
    compiler = include[:-len("/include")] + "/bin/flatc" if include else None
    if not include or not ctx.path(compiler).exists:
        explain(
            "FlatBuffers (headers and flatc)",
            ["FLATBUFFERS_ROOT", "/usr/local", "/usr"],
            "run tools/setup, or apt-get install libflatbuffers-dev flatbuffers-compiler",
        )
    ctx.symlink(include + "/flatbuffers", "include/flatbuffers")
    ctx.symlink(compiler, "bin/flatc")
    ctx.file("BUILD.bazel", _BUILD)

flatbuffers_repository = repository_rule(
    implementation = _flatbuffers_repository_impl,
    environ = ["FLATBUFFERS_ROOT"],
    local = True,
    doc = "Makes @flatbuffers//:flatbuffers and :flatc from an installed FlatBuffers.",
)
