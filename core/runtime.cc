#include "core/runtime.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/version.h>

#include <mutex>

#include "core/error.h"
#include "core/keys.h"
#include "core/registry.h"

#ifndef TORCHLIFT_VERSION
#define TORCHLIFT_VERSION "0.1.0"
#endif

namespace torchlift {
namespace {

// major.minor of the two must agree: libtorch's C++ interface changes between minor releases.
void check_torch_version() {
  const uint64_t running = aoti_torch_abi_version();
  const auto major = static_cast<int>(running >> 56);
  const auto minor = static_cast<int>((running >> 48) & 0xff);
  if (major != TORCH_VERSION_MAJOR || minor != TORCH_VERSION_MINOR) {
    unsupported_error("torchlift", "this build of torchlift was made for torch ", TORCH_VERSION,
                      ", but torch ", major, ".", minor,
                      " is loaded. Install the torchlift that matches, or rebuild it "
                      "(tools/build_wheel) against this torch.");
  }
}

void check_key_is_free(c10::DispatchKey key) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const bool fallback = dispatcher.hasBackendFallbackForDispatchKey(key);
  const auto kernels = dispatcher.getAllOpNamesForDispatchKey(key);
  if (!fallback && kernels.empty()) return;
  unsupported_error("torchlift", "the dispatch key ", toString(key),
                    " is already taken by another library (",
                    fallback ? std::string("it has a fallback kernel")
                             : "it has kernels, for one for " + toString(kernels.front()),
                    "). torchlift needs it to itself: torchdistX, which uses DeferredInit, or an "
                    "out-of-tree backend on PrivateUse3, cannot be loaded in the same process.");
}

}  // namespace

void initialize_runtime() {
  static std::once_flag once;
  std::call_once(once, [] {
    check_torch_version();
    check_key_is_free(kFrontKey);
    check_key_is_free(kBackKey);
    check_key_is_free(kModeKey);
    install_rules();
  });
}

std::string built_for_torch() { return TORCH_VERSION; }

std::string version() { return TORCHLIFT_VERSION; }

}  // namespace torchlift
