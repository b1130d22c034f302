#include "autodiff/grad.h"

#include <ATen/ops/mul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/sum.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "batching/vmap.h"
#include "core/paired_benchmark.h"

namespace torchlift {
namespace {

// As in batching/vmap_benchmark.cc.
constexpr int kSteps = 50;

at::Tensor mul_chain(const at::Tensor& x, const at::Tensor& c) {
  at::Tensor y = x;
  for (int i = 0; i < kSteps; ++i) y = at::mul(y, c);
  return y.sum();
}

at::Tensor sin_chain(const at::Tensor& x, const at::Tensor&) {
  at::Tensor y = x;
  for (int i = 0; i < kSteps; ++i) y = at::sin(y);
  return y.sum();
}

at::Tensor one_sin(const at::Tensor& x, const at::Tensor&) { return at::sin(x).sum(); }

using Loss = at::Tensor (*)(const at::Tensor&, const at::Tensor&);

// What one writes without a transform.
template <Loss kLoss>
at::Tensor plain_gradient(const at::Tensor& x, const at::Tensor& c) {
  const at::Tensor leaf = x.detach().requires_grad_();
  return torch::autograd::grad({kLoss(leaf, c)}, {leaf})[0];
}

template <Loss kLoss, class Ours>
void compare(benchmark::State& state, const Ours& ours, at::IntArrayRef shape) {
  const at::Tensor x = at::rand(shape), c = at::rand({5}).mul(0.1).add(1);
  run_by_turns(
      state, [&] { return plain_gradient<kLoss>(x, c); }, [&] { return ours(x, c); });
}

template <Loss kLoss>
void gradient(benchmark::State& state) {
  compare<kLoss>(state, grad(kLoss), {8, 5});
}

template <Loss kLoss>
void per_example(benchmark::State& state) {
  compare<kLoss>(state, vmap(grad(kLoss), {.in_dims = in(0, kNone)}), {8, 5});
}

void one_call(benchmark::State& state) { compare<one_sin>(state, grad(one_sin), {5}); }

BENCHMARK(gradient<mul_chain>)->Name("BM_GradMul")->UseManualTime();
BENCHMARK(gradient<sin_chain>)->Name("BM_GradSin")->UseManualTime();
BENCHMARK(per_example<mul_chain>)->Name("BM_VmapGradMul")->UseManualTime();
BENCHMARK(per_example<sin_chain>)->Name("BM_VmapGradSin")->UseManualTime();
BENCHMARK(one_call)->Name("BM_GradCall")->UseManualTime();

}  // namespace
}  // namespace torchlift
