// MAML on sinusoids, in C++: initial parameters from which one gradient step on ten points learns a
// new curve. vmap over the tasks, a gradient step inside, one gradient through all of it.
//
//   maml [iterations]

#include <torch/nn/modules/activation.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <cstdlib>
#include <iostream>
#include <numbers>
#include <tuple>

#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

constexpr int64_t kTasks = 25, kPoints = 10;
constexpr double kInnerLr = 0.01;

struct Batch {
  at::Tensor x, y;
};
TORCHLIFT_PYTREE(Batch, x, y);

// Sinusoids of random amplitude and phase: support and query points, [tasks, points, 1].
std::pair<Batch, Batch> draw_tasks() {
  const at::Tensor amplitude = torch::rand({kTasks, 1, 1}) * 4.9 + 0.1;
  const at::Tensor phase = torch::rand({kTasks, 1, 1}) * std::numbers::pi;
  const at::Tensor x = torch::rand({kTasks, 2 * kPoints, 1}) * 10 - 5;
  const at::Tensor y = amplitude * (x + phase).sin();
  return {{x.slice(1, 0, kPoints), y.slice(1, 0, kPoints)},
          {x.slice(1, kPoints), y.slice(1, kPoints)}};
}

}  // namespace

int main(int argc, char** argv) {
  const int iterations = argc > 1 ? std::atoi(argv[1]) : 1000;
  torch::manual_seed(0);
  torch::nn::Sequential net(torch::nn::Linear(1, 40), torch::nn::Tanh(), torch::nn::Linear(40, 40),
                            torch::nn::Tanh(), torch::nn::Linear(40, 1));
  const auto f = tl::functional(net);
  const auto loss = [&f](const tl::ModuleState& p, const Batch& b) {
    return (f(p, b.x) - b.y).square().mean();
  };
  const auto after_a_step = [&](const tl::ModuleState& p, const Batch& support,
                                const Batch& query) {
    const tl::optim::Sgd sgd({.lr = kInnerLr});
    return loss(sgd.update(tl::grad(loss)(p, support), sgd.init(p), p).first, query);
  };
  const auto meta_loss = [&](const tl::ModuleState& p, const Batch& support, const Batch& query) {
    return tl::vmap(after_a_step, {.in_dims = tl::in(tl::kNone, 0, 0)})(p, support, query).mean();
  };

  tl::ModuleState params = tl::extract_state(*net);
  for (auto& [name, p] : params) p = p.detach();
  const tl::optim::Adam adam({.lr = 1e-3});
  tl::optim::State state = adam.init(params);
  double first = 0.0, last = 0.0;
  for (int i = 0; i < iterations; ++i) {
    const auto [support, query] = draw_tasks();
    const auto [value, grads] = tl::value_and_grad(meta_loss)(params, support, query);
    std::tie(params, state) = adam.update(grads, state, params);
    last = i == 0 ? value.item<double>() : 0.9 * last + 0.1 * value.item<double>();
    if (i == 0) first = last;
  }
  std::cout << "loss after adapting: " << first << " at first, " << last << " after " << iterations
            << " iterations\n";
  return last < first || iterations < 50 ? 0 : 1;
}
