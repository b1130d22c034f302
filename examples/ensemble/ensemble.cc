// An ensemble of small networks, in C++, fitted to noisy samples of a sine: all members take each
// step together, and disagree where there is no data.
//
//   ensemble [steps]

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cstdlib>
#include <iostream>
#include <tuple>
#include <vector>

#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(torch::nn::Linear(1, 32), torch::nn::Tanh(),
                               torch::nn::Linear(32, 32), torch::nn::Tanh(),
                               torch::nn::Linear(32, 1));
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 500;
  constexpr int64_t kMembers = 10;
  torch::manual_seed(0);
  std::vector<torch::nn::Sequential> nets;
  for (int64_t i = 0; i < kMembers; ++i) nets.push_back(make_net());
  auto [stacked, buffers] = tl::stack_module_state(nets);
  tl::ModuleState params = tl::tree_map(stacked, [](const at::Tensor& t) { return t.detach(); });

  // Samples in [-2, 0] only.
  const at::Tensor x = torch::rand({64, 1}) * 2 - 2;
  const at::Tensor y = (x * 3).sin() + 0.1 * torch::randn_like(x);
  const auto f = tl::functional(nets[0]);
  const auto loss = [&](const tl::ModuleState& p) { return (f(p, x) - y).square().mean(); };
  const tl::optim::Adam adam({.lr = 5e-3});
  const auto step = [&](const tl::ModuleState& p, const tl::optim::State& s) {
    return adam.update(tl::grad(loss)(p), s, p);
  };
  const auto init = [&](const tl::ModuleState& p) { return adam.init(p); };
  tl::optim::State state = tl::vmap(init)(params);
  for (int i = 0; i < steps; ++i) std::tie(params, state) = tl::vmap(step)(params, state);

  const auto spread = [&](double at) {
    const at::Tensor point = torch::full({1, 1}, at);
    const auto predict = [&](const tl::ModuleState& p) { return f(p, point); };
    return tl::vmap(predict)(params).std().item<double>();
  };
  const at::Tensor losses = tl::vmap(loss)(params);
  const double inside = spread(-1.0), outside = spread(2.0);
  std::cout << "mean loss " << losses.mean().item<double>() << "; members differ by " << inside
            << " where there is data, by " << outside << " where there is none\n";
  return inside < outside || steps < 50 ? 0 : 1;
}
