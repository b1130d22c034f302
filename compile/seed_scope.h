#ifndef TORCHLIFT_COMPILE_SEED_SCOPE_H_
#define TORCHLIFT_COMPILE_SEED_SCOPE_H_

// File: compile/seed_scope.h
//
// A run of a program whose random numbers come from a seed.
//
//   const SeedScope scope(seed, {c10::kCPU});   // the default generators begin at the seed
//   ...                                         // at its end they are as they were

#include <ATen/Context.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "core/random_state.h"

namespace torchlift::compile {

class SeedScope {
 public:
  // Of CPU and of these devices.
  SeedScope(uint64_t seed, const std::vector<c10::Device>& devices) : before_(devices) {
    set(c10::kCPU, seed);
    for (const c10::Device& device : devices) {
      if (device.is_cuda()) set(device, seed);
    }
  }
  ~SeedScope() { before_.restore(); }
  SeedScope(const SeedScope&) = delete;
  SeedScope& operator=(const SeedScope&) = delete;

 private:
  static void set(c10::Device device, uint64_t seed) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_current_seed(seed);
  }

  const RandomState before_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_SEED_SCOPE_H_
