#include "core/memory_meter.h"

#include <c10/core/Allocator.h>
#include <c10/util/ThreadLocalDebugInfo.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <atomic>

#include "core/error.h"

namespace torchlift {
namespace {

namespace profiler = torch::profiler::impl;

// NOTE [the place of the profiler]
// Allocators report to the thread's profiler state, if there is one. libtorch casts what it finds
// there to ProfilerStateBase, so ours is one, of a profiler that is switched off but for memory.
class Counter final : public profiler::ProfilerStateBase {
 public:
  Counter(c10::Device device, std::shared_ptr<Counter> around)
      : ProfilerStateBase(profiler::ProfilerConfig(profiler::ProfilerState::Disabled)),
        device_(device),
        around_(std::move(around)) {}

  profiler::ActiveProfilerType profilerType() override {
    return profiler::ActiveProfilerType::NONE;
  }

  bool memoryProfilingEnabled() const override { return true; }

  // On whatever thread allocates.
  void reportMemoryUsage(void* ptr, int64_t size, size_t allocated, size_t reserved,
                         c10::Device device) override {
    if (around_ != nullptr) around_->reportMemoryUsage(ptr, size, allocated, reserved, device);
    const bool same_index = !device_.has_index() || !device.has_index() || device_ == device;
    if (device.type() != device_.type() || !same_index) return;
    const int64_t now = current_.fetch_add(size) + size;
    int64_t peak = peak_.load();
    while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
    }
  }

  int64_t current() const { return current_.load(); }
  int64_t peak() const { return peak_.load(); }
  void restart() { peak_.store(current_.load()); }

 private:
  const c10::Device device_;
  const std::shared_ptr<Counter> around_;
  std::atomic<int64_t> current_{0};
  std::atomic<int64_t> peak_{0};
};

// The counter of the innermost meter of this thread.
std::shared_ptr<Counter>& innermost() {
  static thread_local std::shared_ptr<Counter> counter;
  return counter;
}

std::shared_ptr<Counter> make_counter(c10::Device device) {
  const auto* at_work = c10::ThreadLocalDebugInfo::get(c10::DebugInfoKind::PROFILER_STATE);
  if (at_work != innermost().get()) {
    unsupported_error("torchlift",
                      "memory cannot be measured while torch.profiler is at work on this thread. "
                      "Give chunk_size instead of memory_budget, or profile without it.");
  }
  return std::make_shared<Counter>(device, innermost());
}

}  // namespace

struct MemoryMeter::Impl {
  explicit Impl(c10::Device device)
      : counter(make_counter(device)),
        around(std::exchange(innermost(), counter)),
        guard(c10::DebugInfoKind::PROFILER_STATE, counter) {}
  ~Impl() { innermost() = around; }

  std::shared_ptr<Counter> counter;
  std::shared_ptr<Counter> around;
  c10::DebugInfoGuard guard;
};

MemoryMeter::MemoryMeter(c10::Device device) : impl_(new Impl(device)) {}

MemoryMeter::~MemoryMeter() = default;

int64_t MemoryMeter::current() const { return impl_->counter->current(); }

int64_t MemoryMeter::peak() const { return impl_->counter->peak(); }

void MemoryMeter::restart() { impl_->counter->restart(); }

}  // namespace torchlift
