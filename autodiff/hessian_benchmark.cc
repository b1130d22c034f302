// What a small Hessian costs, beside the same by libtorch's autograd twice.

#include <ATen/core/Tensor.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/stack.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

#include "autodiff/jacobian.h"
#include "core/paired_benchmark.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

at::Tensor product(const at::Tensor& x) { return x.select(0, 0) * x.select(0, 1).pow(2); }

// (1 - a)^2 + 100 (b - a^2)^2
at::Tensor rosenbrock(const at::Tensor& x) {
  const at::Tensor a = x.select(0, 0), b = x.select(0, 1);
  return (1 - a).pow(2) + 100 * (b - a.pow(2)).pow(2);
}

using Function = at::Tensor (*)(const at::Tensor&);

// What one writes without a transform: a backward pass for each row.
template <Function kFunction>
at::Tensor plain_hessian(const at::Tensor& x) {
  const at::Tensor leaf = x.detach().requires_grad_();
  const at::Tensor gradient = torch::autograd::grad({kFunction(leaf)}, {leaf}, {}, true, true)[0];
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < x.numel(); ++i) {
    rows.push_back(torch::autograd::grad({gradient.select(0, i)}, {leaf}, {}, true)[0]);
  }
  return at::stack(rows);
}

template <Function kFunction>
void of_two_inputs(benchmark::State& state) {
  const at::Tensor x = at::rand({2});
  const auto ours = hessian(kFunction);
  run_by_turns(
      state, [&] { return plain_hessian<kFunction>(x); }, [&] { return ours(x); });
}

BENCHMARK(of_two_inputs<product>)->Name("BM_HessianProduct")->UseManualTime();
BENCHMARK(of_two_inputs<rosenbrock>)->Name("BM_HessianRosenbrock")->UseManualTime();

}  // namespace
}  // namespace torchlift
