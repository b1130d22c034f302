#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randint_like.h>
#include <ATen/ops/randn_like.h>
#include <benchmark/benchmark.h>

#include <functional>

#include "batching/vmap.h"

// Random operators on [64, 1000] floats: numbers of libtorch's own generator ("different") beside
// reproducible ones.

namespace torchlift {
namespace {

using at::Tensor;

template <class F>
void run(benchmark::State& state, const F& f) {
  at::set_num_threads(1);
  const auto randomness = state.range(0) == 0 ? Randomness::kDifferent : Randomness::kReproducible;
  const auto mapped = vmap(f, {.randomness = randomness});
  const Tensor x = at::ones({64, 1000});
  for (auto _ : state) benchmark::DoNotOptimize(mapped(x));
  state.SetLabel(state.range(0) == 0 ? "different" : "reproducible");
}

void BM_Rand(benchmark::State& state) {
  run(state, [](const Tensor& x) { return at::rand_like(x); });
}
void BM_Randn(benchmark::State& state) {
  run(state, [](const Tensor& x) { return at::randn_like(x); });
}
void BM_Dropout(benchmark::State& state) {
  run(state, [](const Tensor& x) { return std::get<0>(at::native_dropout(x, 0.5, true)); });
}
void BM_Randint(benchmark::State& state) {
  run(state, [](const Tensor& x) { return at::randint_like(x, 1000); });
}
BENCHMARK(BM_Rand)->Arg(0)->Arg(1);
BENCHMARK(BM_Randn)->Arg(0)->Arg(1);
BENCHMARK(BM_Dropout)->Arg(0)->Arg(1);
BENCHMARK(BM_Randint)->Arg(0)->Arg(1);

}  // namespace
}  // namespace torchlift
