"""Finds Boost's headers as a system package (BOOST_ROOT, /usr/local or /usr).

The target carries the name that it has in the module boost.graph, so that the registry's fits too. Boost.Graph is
used by its headers alone; those it includes come along.
"""

load("//third_party:find.bzl", "explain", "find_header")

_BUILD = """# Made by torchlift's third_party/boost/boost.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

cc_library(
    name = "boost.graph",
    hdrs = glob(["include/boost/**"]),
    includes = ["include"],
    visibility = ["//visibility:public"],
)
"""

def _boost_graph_repository_impl(ctx):
    include = find_header(ctx, "boost/graph/push_relabel_max_flow.hpp", "BOOST_ROOT")
    if not include:
        explain(
            "Boost.Graph",
            ["BOOST_ROOT", "/usr/local", "/usr"],
            "run tools/setup, or apt-get install libboost-dev",
        )
    ctx.symlink(include + "/boost", "include/boost")
    ctx.file("BUILD.bazel", _BUILD)

boost_graph_repository = repository_rule(
    implementation = _boost_graph_repository_impl,
    environ = ["BOOST_ROOT"],
    local = True,
    doc = "Makes @boost_graph//:boost.graph from installed headers.",
)
