# Made by torchlift's third_party/torch/torch.bzl.
load("@rules_cc//cc:defs.bzl", "cc_library")

package(default_visibility = ["//visibility:public"])

LIB = "{LIB}"

# See NOTE [linking libtorch where it lies]. A wheel finds torch beside itself instead
# (--define=torchlift_rpath=wheel), and an SDK leaves the choice to its user (=none).
config_setting(
    name = "rpath_wheel",
    define_values = {"torchlift_rpath": "wheel"},
)

config_setting(
    name = "rpath_none",
    define_values = {"torchlift_rpath": "none"},
)

RPATH = select({
    ":rpath_wheel": ["-Wl,-rpath,$$ORIGIN/../torch/lib"],
    ":rpath_none": [],
    # DT_RPATH, unlike DT_RUNPATH, also serves the libraries that a test loads.
    "//conditions:default": [
        "-Wl,--disable-new-dtags",
        "-Wl,-rpath," + LIB,
    ],
})

cc_library(
    name = "headers",
    hdrs = glob(
        ["include/**"],
        exclude = ["include/**/*.cuh"],
    ),
    # "includes" are -isystem: the warnings of these headers are not ours.
    includes = [
        "include",
        "include/torch/csrc/api/include",
    ],
    defines = ["_GLIBCXX_USE_CXX11_ABI=1"],
)

cc_library(
    name = "torch",
    linkopts = [
        "-L" + LIB,
        "-Wl,--push-state,--no-as-needed",
        "-ltorch_cpu",
        "-lc10",
        "-Wl,--pop-state",
    ] + RPATH,
    deps = [":headers"],
)

# The version these headers are of, for the check at load: TORCHLIFT_BUILT_FOR_TORCH is a string.
cc_library(
    name = "version",
    defines = ['TORCHLIFT_BUILT_FOR_TORCH=\\"{VERSION}\\"'],
)

[
    cc_library(
        name = "torch_python",
        linkopts = [
            "-Wl,--push-state,--no-as-needed",
            "-ltorch_python",
            "-Wl,--pop-state",
        ],
        deps = [":torch"],
    )
    for present in [{HAS_PYTHON}]
    if present
]

# With a CPU build of torch this is :torch alone, so that a GPU test still links (and then skips).
cc_library(
    name = "torch_cuda",
    linkopts = [
        "-Wl,--push-state,--no-as-needed",
        "-ltorch_cuda",
        "-lc10_cuda",
        "-Wl,--pop-state",
    ] if {HAS_CUDA} else [],
    deps = [":torch"],
)
