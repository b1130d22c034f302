"""torchlift's C++ rules: cc_library and friends with our warnings, test main, sizes and tags."""

load("@rules_cc//cc:defs.bzl", "cc_binary", "cc_library", "cc_test")
load("//tools:copts.bzl", "TORCHLIFT_COPTS", "TORCHLIFT_FEATURES", "TORCHLIFT_TEST_COPTS")

def tl_cc_library(name, copts = [], features = [], **kwargs):
    """A library; private unless `visibility` says otherwise. Use alwayslink = True for registrations."""
    cc_library(
        name = name,
        copts = TORCHLIFT_COPTS + copts,
        features = TORCHLIFT_FEATURES + features,
        **kwargs
    )

def tl_cc_test(name, srcs = None, deps = [], copts = [], size = "small", gpu = False, tags = [], data = [], **kwargs):
    """A GoogleTest, linked with gtest_main. `srcs` defaults to [name + ".cc"].

    gpu = True marks a test that needs a device: it is tagged "gpu", linked with CUDA where torch
    has it, and must GTEST_SKIP() with a reason where there is no device.
    """
    cc_test(
        name = name,
        srcs = srcs if srcs != None else [name + ".cc"],
        copts = TORCHLIFT_TEST_COPTS + copts,
        features = TORCHLIFT_FEATURES,
        size = size,
        tags = tags + (["gpu"] if gpu else []),
        data = data + ["//tools/sanitizers:suppressions"],
        deps = deps + ["@googletest//:gtest", "@googletest//:gtest_main"] +
               (["@torch//:torch_cuda"] if gpu else []),
        **kwargs
    )

def tl_cc_benchmark(name, srcs = None, deps = [], copts = [], tags = [], **kwargs):
    """A Google Benchmark binary, built only by name. `srcs` defaults to [name + ".cc"]."""
    cc_binary(
        name = name,
        srcs = srcs if srcs != None else [name + ".cc"],
        copts = TORCHLIFT_TEST_COPTS + copts,
        testonly = True,
        tags = tags + ["benchmark", "manual"],
        deps = deps + ["@google_benchmark//:benchmark", "@google_benchmark//:benchmark_main"],
        **kwargs
    )

def tl_cc_binary(name, copts = [], **kwargs):
    """A program."""
    cc_binary(
        name = name,
        copts = TORCHLIFT_COPTS + copts,
        **kwargs
    )

def tl_py_extension(name, copts = [], deps = [], **kwargs):
    """A Python extension module `name`.so with hidden symbols, as pybind11 asks for."""
    cc_binary(
        name = name + ".so",
        copts = TORCHLIFT_COPTS + ["-fvisibility=hidden"] + copts,
        linkshared = True,
        linkstatic = True,
        deps = deps + ["@pybind11//:pybind11", "@torch//:torch_python"],
        **kwargs
    )
