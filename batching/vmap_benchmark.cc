#include "batching/vmap.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/sin.h>
#include <benchmark/benchmark.h>

#include "core/paired_benchmark.h"

namespace torchlift {
namespace {

// Chains of this many operators on small tensors: what is measured is overhead.
// tools/benchmarks/cpp.py divides by it.
constexpr int kSteps = 50;

at::Tensor mul_chain(at::Tensor x, const at::Tensor& c) {
  for (int i = 0; i < kSteps; ++i) x = at::mul(x, c);
  return x;
}

at::Tensor sin_chain(at::Tensor x, const at::Tensor&) {
  for (int i = 0; i < kSteps; ++i) x = at::sin(x);
  return x;
}

using Chain = at::Tensor (*)(at::Tensor, const at::Tensor&);

const Dims kFirstArgument = in(0, kNone);

template <class Plain, class Ours>
void compare(benchmark::State& state, const Plain& plain, const Ours& ours, at::IntArrayRef shape) {
  const at::Tensor x = at::rand(shape), c = at::rand({5}).mul(0.1).add(1);
  run_by_turns(
      state, [&] { return plain(x, c); }, [&] { return ours(x, c); });
}

template <Chain kChain>
void vmapped(benchmark::State& state) {
  compare(state, kChain, vmap(kChain, {.in_dims = kFirstArgument}), {8, 5});
}

template <Chain kChain>
void vmapped_twice(benchmark::State& state) {
  const auto examples = vmap(kChain, {.in_dims = kFirstArgument});
  compare(state, kChain, vmap(examples, {.in_dims = kFirstArgument}), {4, 8, 5});
}

at::Tensor one_sin(const at::Tensor& x, const at::Tensor&) { return at::sin(x); }

void one_call(benchmark::State& state) {
  compare(state, one_sin, vmap(one_sin, {.in_dims = kFirstArgument}), {8, 5});
}

BENCHMARK(vmapped<mul_chain>)->Name("BM_VmapMul")->UseManualTime();
BENCHMARK(vmapped<sin_chain>)->Name("BM_VmapSin")->UseManualTime();
BENCHMARK(vmapped_twice<mul_chain>)->Name("BM_VmapVmapMul")->UseManualTime();
BENCHMARK(vmapped_twice<sin_chain>)->Name("BM_VmapVmapSin")->UseManualTime();
BENCHMARK(one_call)->Name("BM_VmapCall")->UseManualTime();

}  // namespace
}  // namespace torchlift
