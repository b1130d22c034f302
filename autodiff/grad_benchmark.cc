#include "autodiff/grad.h"

#include <ATen/Parallel.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/sum.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include "batching/vmap.h"

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

template <class F>
void run(benchmark::State& state, const F& f, at::IntArrayRef shape) {
  at::set_num_threads(1);
  const at::Tensor x = at::rand(shape), c = at::rand({5}).mul(0.1).add(1);
  for (auto _ : state) benchmark::DoNotOptimize(f(x, c));
}

// What one writes without a transform.
template <Loss kLoss>
at::Tensor plain_gradient(const at::Tensor& x, const at::Tensor& c) {
  const at::Tensor leaf = x.detach().requires_grad_();
  return torch::autograd::grad({kLoss(leaf, c)}, {leaf})[0];
}

template <Loss kLoss>
void plain(benchmark::State& state) {
  run(state, plain_gradient<kLoss>, {8, 5});
}

template <Loss kLoss>
void gradient(benchmark::State& state) {
  run(state, grad(kLoss), {8, 5});
}

template <Loss kLoss>
void per_example(benchmark::State& state) {
  run(state, vmap(grad(kLoss), {.in_dims = in(0, kNone)}), {8, 5});
}

void autograd_call(benchmark::State& state) { run(state, plain_gradient<one_sin>, {5}); }

void grad_call(benchmark::State& state) { run(state, grad(one_sin), {5}); }

BENCHMARK(plain<mul_chain>)->Name("BM_AutogradMul");
BENCHMARK(plain<sin_chain>)->Name("BM_AutogradSin");
BENCHMARK(gradient<mul_chain>)->Name("BM_GradMul");
BENCHMARK(gradient<sin_chain>)->Name("BM_GradSin");
BENCHMARK(per_example<mul_chain>)->Name("BM_VmapGradMul");
BENCHMARK(per_example<sin_chain>)->Name("BM_VmapGradSin");
BENCHMARK(autograd_call)->Name("BM_AutogradCall");
BENCHMARK(grad_call)->Name("BM_GradCall");

}  // namespace
}  // namespace torchlift
