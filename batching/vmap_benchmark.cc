#include "batching/vmap.h"

#include <ATen/Parallel.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/sin.h>
#include <benchmark/benchmark.h>

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

template <class F>
void run(benchmark::State& state, const F& f, at::IntArrayRef shape) {
  at::set_num_threads(1);
  const at::Tensor x = at::rand(shape), c = at::rand({5}).mul(0.1).add(1);
  for (auto _ : state) benchmark::DoNotOptimize(f(x, c));
}

template <Chain kChain>
void plain(benchmark::State& state) {
  run(state, kChain, {8, 5});
}

template <Chain kChain>
void vmapped(benchmark::State& state) {
  run(state, vmap(kChain, {.in_dims = kFirstArgument}), {8, 5});
}

template <Chain kChain>
void plain_nested(benchmark::State& state) {
  run(state, kChain, {4, 8, 5});
}

template <Chain kChain>
void vmapped_twice(benchmark::State& state) {
  run(state, vmap(vmap(kChain, {.in_dims = kFirstArgument}), {.in_dims = kFirstArgument}),
      {4, 8, 5});
}

at::Tensor one_sin(const at::Tensor& x, const at::Tensor&) { return at::sin(x); }

void plain_call(benchmark::State& state) { run(state, one_sin, {8, 5}); }

void vmap_call(benchmark::State& state) {
  run(state, vmap(one_sin, {.in_dims = kFirstArgument}), {8, 5});
}

BENCHMARK(plain<mul_chain>)->Name("BM_PlainMul");
BENCHMARK(plain<sin_chain>)->Name("BM_PlainSin");
BENCHMARK(vmapped<mul_chain>)->Name("BM_VmapMul");
BENCHMARK(vmapped<sin_chain>)->Name("BM_VmapSin");
BENCHMARK(plain_nested<mul_chain>)->Name("BM_PlainMulNested");
BENCHMARK(plain_nested<sin_chain>)->Name("BM_PlainSinNested");
BENCHMARK(vmapped_twice<mul_chain>)->Name("BM_VmapVmapMul");
BENCHMARK(vmapped_twice<sin_chain>)->Name("BM_VmapVmapSin");
BENCHMARK(plain_call)->Name("BM_PlainCall");
BENCHMARK(vmap_call)->Name("BM_VmapCall");

}  // namespace
}  // namespace torchlift
