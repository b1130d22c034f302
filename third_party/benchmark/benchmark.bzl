"""Finds Google Benchmark as a system package (BENCHMARK_ROOT, /usr/local or /usr)."""

load("//third_party:find.bzl", "explain", "find_header", "find_library")

_BUILD = """# Made by torchlift's third_party/benchmark/benchmark.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "benchmark",
    hdrs = glob(["include/benchmark/**"]),
    includes = ["include"],
    linkopts = ["-L{lib}", "-lbenchmark", "-lpthread"],
)

cc_library(
    name = "benchmark_main",
    linkopts = ["-L{lib}", "-lbenchmark_main"],
    deps = [":benchmark"],
)
"""

def _benchmark_repository_impl(ctx):
    include = find_header(ctx, "benchmark/benchmark.h", "BENCHMARK_ROOT")
    lib = find_library(ctx, include, "libbenchmark_main.a") if include else None
    if not lib:
        explain(
            "Google Benchmark",
            ["BENCHMARK_ROOT", "/usr/local", "/usr"],
            "run tools/setup, or apt-get install libbenchmark-dev",
        )
    ctx.symlink(include + "/benchmark", "include/benchmark")
    ctx.file("BUILD.bazel", _BUILD.format(lib = lib))

benchmark_repository = repository_rule(
    implementation = _benchmark_repository_impl,
    environ = ["BENCHMARK_ROOT"],
    local = True,
    doc = "Makes @google_benchmark//:benchmark and :benchmark_main.",
)
