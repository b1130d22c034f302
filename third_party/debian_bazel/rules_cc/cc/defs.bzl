"""The rules of rules_cc that Bazel 4.2.3 has built in, and the provider that later versions export here."""

load("//cc:providers.bzl", "BUILTIN_CC_INFO")

CcInfo = BUILTIN_CC_INFO
cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
fdo_prefetch_hints = native.fdo_prefetch_hints
fdo_profile = native.fdo_profile
objc_library = native.objc_library
