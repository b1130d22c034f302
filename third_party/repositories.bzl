"""All dependencies that are found on the machine, for WORKSPACE users of torchlift.

A larger workspace that already has one of them under the same name keeps its own.
"""

load("//third_party/absl:absl.bzl", "absl_repository")
load("//third_party/benchmark:benchmark.bzl", "benchmark_repository")
load("//third_party/boost:boost.bzl", "boost_graph_repository")
load("//third_party/cuda:cuda.bzl", "cuda_repository")
load("//third_party/flatbuffers:flatbuffers.bzl", "flatbuffers_repository")
load("//third_party/googletest:googletest.bzl", "googletest_repository")
load("//third_party/nlohmann_json:nlohmann_json.bzl", "nlohmann_json_repository")
load("//third_party/pybind11:pybind11.bzl", "pybind11_repository")
load("//third_party/torch:torch.bzl", "torch_repository")

def torchlift_repositories():
    rules = {
        "absl": absl_repository,
        "boost_graph": boost_graph_repository,
        "cuda": cuda_repository,
        "flatbuffers": flatbuffers_repository,
        "google_benchmark": benchmark_repository,
        "googletest": googletest_repository,
        "nlohmann_json": nlohmann_json_repository,
        "pybind11": pybind11_repository,
        "torch": torch_repository,
    }
    for name, rule in rules.items():
        if not native.existing_rule(name):
            rule(name = name)
