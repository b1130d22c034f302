// Norms of single examples' gradients: as ghost norms ("ours"), and of the gradients made
// ("plain").
//
// plain and ours are nanoseconds a call; *_MB is what the process grows by in one. glibc has to
// serve large blocks from the heap and keep them while a call runs:
//
//   MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=67108864 MALLOC_ARENA_MAX=1

#include <benchmark/benchmark.h>
#include <malloc.h>
#include <torch/nn.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <limits>
#include <string>

#include "core/paired_benchmark.h"
#include "nn_functional/per_sample.h"

namespace torchlift {
namespace {

namespace nn = torch::nn;

at::Tensor loss(const at::Tensor& out, const at::Tensor& y) {
  return nn::functional::cross_entropy(out, y);
}

// A line of /proc/self/status, in kB.
double status(const std::string& name) {
  std::ifstream lines("/proc/self/status");
  std::string word;
  double value = 0;
  while (lines >> word) {
    if (word == name + ":") lines >> value;
  }
  return value;
}

// The least of some calls: pages that are touched for the first time are not the call's.
template <class F>
double peak_megabytes(const F& f) {
  double least = std::numeric_limits<double>::infinity();
  for (int call = 0; call < 5; ++call) {
    malloc_trim(0);
    const double before = status("VmRSS");
    std::ofstream("/proc/self/clear_refs") << "5";  // resets VmHWM
    benchmark::DoNotOptimize(f());
    least = std::min(least, (status("VmHWM") - before) / 1024);
  }
  return least;
}

// A model and a batch for it.
struct Case {
  nn::Sequential net;
  at::Tensor xs, ys;
};

Case mlp(int64_t in, int64_t wide, int64_t examples) {
  nn::Sequential net(nn::Linear(in, wide), nn::ReLU(), nn::Linear(wide, wide), nn::ReLU(),
                     nn::Linear(wide, 10));
  return {net, torch::randn({examples, in}), torch::randint(0, 10, {examples})};
}

Case small_mlp() { return mlp(64, 128, 256); }
Case wide_mlp() { return mlp(512, 1024, 128); }

Case cnn() {
  nn::Sequential net(nn::Conv2d(1, 16, 3), nn::ReLU(), nn::MaxPool2d(2), nn::Conv2d(16, 32, 3),
                     nn::ReLU(), nn::MaxPool2d(2), nn::Flatten(), nn::Linear(800, 10));
  return {net, torch::randn({64, 1, 28, 28}), torch::randint(0, 10, {64})};
}

Case table() {
  nn::Sequential net(nn::Embedding(5000, 64), nn::Flatten(), nn::Linear(16 * 64, 10));
  return {net, torch::randint(0, 5000, {64, 16}), torch::randint(0, 10, {64})};
}

void norms(benchmark::State& state, Case (*make)()) {
  torch::manual_seed(0);
  const Case given = make();
  const auto ghost = per_sample_grad_norms(given.net, &loss);
  const auto made = per_sample_grad(given.net, &loss);
  const auto ours = [&] { return ghost(given.xs, given.ys); };
  const auto plain = [&] { return grad_norms(made(given.xs, given.ys)); };
  if (!torch::allclose(ours(), plain(), 1e-3, 1e-5)) state.SkipWithError("the norms differ");
  run_by_turns(state, plain, ours);
  state.counters["plain_MB"] = peak_megabytes(plain);
  state.counters["ours_MB"] = peak_megabytes(ours);
}

BENCHMARK_CAPTURE(norms, mlp_64_128_128_10_of_256, small_mlp)->UseManualTime();
BENCHMARK_CAPTURE(norms, mlp_512_1024_1024_10_of_128, wide_mlp)->UseManualTime();
BENCHMARK_CAPTURE(norms, cnn_16_32_of_64, cnn)->UseManualTime();
BENCHMARK_CAPTURE(norms, embedding_5000_64_of_64, table)->UseManualTime();

}  // namespace
}  // namespace torchlift
