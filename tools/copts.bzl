"""Compiler options of torchlift's own code (third-party headers are -isystem and not held to them)."""

TORCHLIFT_COPTS = [
    "-std=c++20",
    "-Wall",
    "-Wextra",
    "-Werror",
    # Braced options such as {.in_dims = 0} leave the rest at their defaults: that is their point.
    "-Wno-missing-field-initializers",
]

TORCHLIFT_TEST_COPTS = TORCHLIFT_COPTS

TORCHLIFT_FEATURES = [
    "layering_check",
    "parse_headers",
]
