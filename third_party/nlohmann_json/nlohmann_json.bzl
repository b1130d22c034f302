"""Finds JSON for Modern C++ as a system package (NLOHMANN_JSON_ROOT, /usr/local or /usr)."""

load("//third_party:find.bzl", "explain", "find_header")

_BUILD = """# Made by torchlift's third_party/nlohmann_json/nlohmann_json.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

cc_library(
    name = "json",
    hdrs = glob(["include/nlohmann/**"]),
    includes = ["include"],
)
"""

def _nlohmann_json_repository_impl(ctx):
    include = find_header(ctx, "nlohmann/json.hpp", "NLOHMANN_JSON_ROOT")
    if not include:
        explain(
            "nlohmann/json.hpp",
            ["NLOHMANN_JSON_ROOT", "/usr/local", "/usr"],
            "run tools/setup, or apt-get install nlohmann-json3-dev",
        )
    ctx.symlink(include + "/nlohmann", "include/nlohmann")
    ctx.file("BUILD.bazel", _BUILD)

nlohmann_json_repository = repository_rule(
    implementation = _nlohmann_json_repository_impl,
    environ = ["NLOHMANN_JSON_ROOT"],
    local = True,
    doc = "Makes @nlohmann_json//:json from an installed nlohmann/json.hpp.",
)
