// What functional_call costs over calling the module.

#include <benchmark/benchmark.h>
#include <torch/nn.h>

#include "nn_functional/functional_call.h"

namespace torchlift {
namespace {

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(torch::nn::Linear(4, 4), torch::nn::Tanh(), torch::nn::Linear(4, 4));
}

void BM_Module(benchmark::State& state) {
  auto net = make_net();
  const at::Tensor x = torch::randn({2, 4});
  for (auto _ : state) benchmark::DoNotOptimize(net->forward(x));
}
BENCHMARK(BM_Module);

void BM_Functional(benchmark::State& state) {
  auto net = make_net();
  const auto f = functional(net);
  const ModuleState params = extract_state(*make_net());
  const at::Tensor x = torch::randn({2, 4});
  for (auto _ : state) benchmark::DoNotOptimize(f(params, x));
}
BENCHMARK(BM_Functional);

void BM_FunctionalCall(benchmark::State& state) {
  auto net = make_net();
  const ModuleState params = extract_state(*make_net());
  const at::Tensor x = torch::randn({2, 4});
  for (auto _ : state) benchmark::DoNotOptimize(functional_call(net, params, x));
}
BENCHMARK(BM_FunctionalCall);

}  // namespace
}  // namespace torchlift
