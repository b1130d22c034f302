#include "core/memory_meter.h"

#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>
#include <torch/csrc/profiler/orchestration/observer.h>

#include <optional>
#include <thread>

#include "core/error.h"

namespace torchlift {
namespace {

// 8 bytes each.
at::Tensor doubles(int64_t count) { return at::empty({count}, at::kDouble); }

TEST(MemoryMeter, CountsWhatIsAllocatedAndFreed) {
  const MemoryMeter meter(c10::kCPU);
  EXPECT_EQ(meter.current(), 0);
  {
    const at::Tensor a = doubles(1000);
    EXPECT_EQ(meter.current(), 8000);
    const at::Tensor b = doubles(500);
    EXPECT_EQ(meter.current(), 12000);
  }
  EXPECT_EQ(meter.current(), 0);
  EXPECT_EQ(meter.peak(), 12000);
}

TEST(MemoryMeter, Restarts) {
  MemoryMeter meter(c10::kCPU);
  const at::Tensor kept = doubles(100);
  { const at::Tensor large = doubles(10000); }
  meter.restart();
  EXPECT_EQ(meter.peak(), 800);
  { const at::Tensor small = doubles(50); }
  EXPECT_EQ(meter.peak(), 1200);
}

TEST(MemoryMeter, MemoryFromBeforeCountsForNothing) {
  std::optional<at::Tensor> before = doubles(1000);
  const MemoryMeter meter(c10::kCPU);
  before.reset();
  EXPECT_EQ(meter.current(), 0);
}

TEST(MemoryMeter, Nests) {
  const MemoryMeter outer(c10::kCPU);
  const at::Tensor a = doubles(10);
  {
    const MemoryMeter inner(c10::kCPU);
    { const at::Tensor b = doubles(100); }
    EXPECT_EQ(inner.peak(), 800);
  }
  { const at::Tensor c = doubles(20); }
  EXPECT_EQ(outer.peak(), 880);
  EXPECT_EQ(outer.current(), 80);
}

TEST(MemoryMeter, OtherThreadsAndDevicesAreNotCounted) {
  const MemoryMeter meter(c10::kCPU);
  const MemoryMeter other_device(c10::Device(c10::kCUDA, 0));
  const at::Tensor a = doubles(10);
  std::thread([] { doubles(1000); }).join();
  EXPECT_EQ(meter.peak(), 80);
  EXPECT_EQ(other_device.peak(), 0);
}

TEST(MemoryMeter, TheProfilerIsOffWhileItLives) {
  const MemoryMeter meter(c10::kCPU);
  EXPECT_FALSE(torch::profiler::impl::profilerEnabled());
  EXPECT_EQ(torch::profiler::impl::profilerType(), torch::profiler::impl::ActiveProfilerType::NONE);
}

// Stands for torch.profiler.
struct Profiler final : torch::profiler::impl::ProfilerStateBase {
  Profiler()
      : ProfilerStateBase(
            torch::profiler::impl::ProfilerConfig(torch::profiler::impl::ProfilerState::CPU)) {}
  torch::profiler::impl::ActiveProfilerType profilerType() override {
    return torch::profiler::impl::ActiveProfilerType::LEGACY;
  }
  void reportMemoryUsage(void*, int64_t, size_t, size_t, c10::Device) override {}
};

TEST(MemoryMeter, RefusesBesideTheProfiler) {
  const c10::DebugInfoGuard profiling(c10::DebugInfoKind::PROFILER_STATE,
                                      std::make_shared<Profiler>());
  EXPECT_THROW(MemoryMeter(c10::kCPU), UnsupportedError);
}

}  // namespace
}  // namespace torchlift
