"""Finds GoogleTest and GoogleMock as system packages (GTEST_ROOT, /usr/local or /usr)."""

load("//third_party:find.bzl", "explain", "find_header", "find_library")

_BUILD = """# Made by torchlift's third_party/googletest/googletest.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "gtest",
    testonly = True,
    hdrs = glob(["include/gtest/**", "include/gmock/**"]),
    includes = ["include"],
    linkopts = ["-L{lib}", "-lgmock", "-lgtest", "-lpthread"],
)

cc_library(
    name = "gtest_main",
    testonly = True,
    linkopts = ["-L{lib}", "-lgmock_main"],
    deps = [":gtest"],
)
"""

def _googletest_repository_impl(ctx):
    include = find_header(ctx, "gmock/gmock.h", "GTEST_ROOT")
    lib = find_library(ctx, include, "libgmock_main.a") if include else None
    if not lib:
        explain(
            "GoogleTest with GoogleMock",
            ["GTEST_ROOT", "/usr/local", "/usr"],
            "run tools/setup, or apt-get install libgtest-dev libgmock-dev",
        )
    ctx.symlink(include + "/gtest", "include/gtest")
    ctx.symlink(include + "/gmock", "include/gmock")
    ctx.file("BUILD.bazel", _BUILD.format(lib = lib))

googletest_repository = repository_rule(
    implementation = _googletest_repository_impl,
    environ = ["GTEST_ROOT"],
    local = True,
    doc = "Makes @googletest//:gtest and :gtest_main.",
)
