#ifndef TORCHLIFT_CORE_MEMORY_METER_H_
#define TORCHLIFT_CORE_MEMORY_METER_H_

// File: core/memory_meter.h
//
// MemoryMeter counts what this thread allocates on one device while it lives: tensors, on CPU and
// on any device whose allocator reports to libtorch's profiler (CUDA's does). It counts what
// libtorch allocates for others too, on the threads of the autograd engine, but not what a library
// takes on its own account (MKL's and oneDNN's scratch memory).
//
//   MemoryMeter meter(c10::kCPU);
//   f(x);
//   std::cout << meter.peak() << " bytes at most, " << meter.current() << " still in use\n";
//
// Meters nest. Throws UnsupportedError while torch.profiler is at work on this thread: there is one
// place for whoever counts.

#include <c10/core/Device.h>

#include <cstdint>
#include <memory>

namespace torchlift {

class MemoryMeter {
 public:
  explicit MemoryMeter(c10::Device device);
  ~MemoryMeter();
  MemoryMeter(const MemoryMeter&) = delete;
  MemoryMeter& operator=(const MemoryMeter&) = delete;

  // Bytes allocated and not freed since the start, and the most there were at any time since the
  // start or the last restart. Memory from before that is freed counts as negative where its size
  // is known (CUDA).
  int64_t current() const;
  int64_t peak() const;

  // The peak starts again from what is in use now.
  void restart();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_MEMORY_METER_H_
