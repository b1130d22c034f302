"""torchlift_library: a cc_library with a typed header, out of a saved artifact.

    load("@torchlift//compile:torchlift_library.bzl", "torchlift_library")

    torchlift_library(
        name = "loss",
        graph = "loss.tlc",
        namespace = "my_project::loss",
    )

    # #include "my_package/loss.h"
    # my_project::loss::Outputs outputs = my_project::loss::run({.x = x});
"""

load("@rules_cc//cc:defs.bzl", "cc_library")

def _library_source_impl(ctx):
    header = ctx.actions.declare_file(ctx.attr.library + ".h")
    source = ctx.actions.declare_file(ctx.attr.library + ".cc")
    package = ctx.label.package
    ctx.actions.run(
        executable = ctx.executable._tool,
        arguments = [
            ctx.file.graph.path,
            ctx.attr.namespace,
            (package + "/" if package else "") + header.basename,
            header.path,
            source.path,
        ],
        inputs = [ctx.file.graph],
        outputs = [header, source],
        # Under the address sanitizer: what libtorch never frees is no reason to fail.
        env = {"ASAN_OPTIONS": "detect_leaks=0"},
        mnemonic = "TorchliftLibrary",
        progress_message = "Making C++ of " + ctx.file.graph.short_path,
    )
    return [
        DefaultInfo(files = depset([header, source])),
        OutputGroupInfo(header = depset([header]), source = depset([source])),
    ]

_library_source = rule(
    implementation = _library_source_impl,
    attrs = {
        "graph": attr.label(allow_single_file = [".tlc"], mandatory = True),
        "library": attr.string(mandatory = True),
        "namespace": attr.string(mandatory = True),
        # Not cfg = "exec": libtorch is that of this machine in any case, and torchlift would be built twice.
        "_tool": attr.label(
            default = "//compile/artifact:make_library",
            executable = True,
            cfg = "target",
        ),
    },
)

def torchlift_library(name, graph, namespace = None, visibility = None, testonly = None, tags = None):
    """Makes the cc_library `name`, whose header is <name>.h, in the package's folder.

    Args:
      name: of the target, the header and, unless `namespace` is given, the C++ namespace.
      graph: the artifact, a .tlc file. It becomes a part of the library: nothing is read at run time.
      namespace: of the structs Inputs and Outputs and of the function run.
      visibility: of the library.
      testonly: of the library.
      tags: of the library.
    """
    _library_source(
        name = name + "_made",
        graph = graph,
        library = name,
        namespace = namespace or name,
        testonly = testonly,
        tags = tags,
        visibility = ["//visibility:private"],
    )
    for part in ["header", "source"]:
        native.filegroup(
            name = name + "_" + part,
            srcs = [":" + name + "_made"],
            output_group = part,
            testonly = testonly,
            tags = tags,
            visibility = ["//visibility:private"],
        )
    cc_library(
        name = name,
        srcs = [":" + name + "_source"],
        hdrs = [":" + name + "_header"],
        # For designated initializers: run({.x = x}).
        copts = ["-std=c++20"],
        testonly = testonly,
        tags = tags,
        visibility = visibility,
        deps = [
            Label("//compile/artifact:library_runtime"),
            Label("@torch//:torch"),
        ],
    )
