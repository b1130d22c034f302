"""Finds Abseil as a system package (ABSL_ROOT, /usr/local or /usr).

Targets carry the names they have in Abseil's own build, so that a module from a registry fits too.
Only what torchlift uses is listed: add a row to _PACKAGES for more.
"""

load("//third_party:find.bzl", "explain", "find_header", "find_library")

# package -> {target: static libraries it needs, dependents first}
_LOGGING = ["raw_logging_internal", "log_severity"]
_PACKAGES = {
    "absl/base": {"core_headers": [], "config": []},
    "absl/container": {
        "fixed_array": ["throw_delegate"] + _LOGGING,
        "inlined_vector": ["throw_delegate"] + _LOGGING,
    },
    "absl/functional": {"function_ref": []},
    "absl/types": {"span": ["throw_delegate"] + _LOGGING},
}

_TARGET = """
cc_library(
    name = "{name}",
    linkopts = {linkopts},
    deps = ["//:headers"],
)
"""
_HEAD = """# Made by torchlift's third_party/absl/absl.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])
"""
_HEADERS = _HEAD + """
cc_library(
    name = "headers",
    hdrs = glob(["include/absl/**/*.h", "include/absl/**/*.inc"]),
    includes = ["include"],
)
"""

def _absl_repository_impl(ctx):
    include = find_header(ctx, "absl/base/config.h", "ABSL_ROOT")
    lib = find_library(ctx, include, "libabsl_base.a") if include else None
    if not lib:
        explain(
            "Abseil",
            ["ABSL_ROOT", "/usr/local", "/usr"],
            "run tools/setup, or apt-get install libabsl-dev",
        )
    ctx.symlink(include + "/absl", "include/absl")
    ctx.file("BUILD.bazel", _HEADERS)
    for package, targets in _PACKAGES.items():
        text = _HEAD
        for name, libraries in targets.items():
            # By file name: a wheel must carry this code, not need the system's shared library.
            linkopts = ["-L" + lib] + ["-l:libabsl_{}.a".format(l) for l in libraries]
            text += _TARGET.format(name = name, linkopts = repr(linkopts if libraries else []))
        ctx.file(package + "/BUILD.bazel", text)

absl_repository = repository_rule(
    implementation = _absl_repository_impl,
    environ = ["ABSL_ROOT"],
    local = True,
    doc = "Makes @absl//absl/<package>:<target> from an installed Abseil.",
)
