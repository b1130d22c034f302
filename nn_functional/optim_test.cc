#include "nn_functional/optim.h"

#include <gtest/gtest.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/sgd.h>

#include <map>
#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/error.h"

namespace torchlift::optim {
namespace {

using Params = std::map<std::string, at::Tensor>;

class Optim : public ::testing::Test {
 protected:
  Optim() {
    torch::manual_seed(5);
    params = {{"w", torch::randn({3, 2}, torch::kDouble)},
              {"b", torch::randn({2}, torch::kDouble)}};
    x = torch::randn({8, 3}, torch::kDouble);
    y = torch::randn({8, 2}, torch::kDouble);
  }

  at::Tensor loss(const Params& p) const {
    return (x.mm(p.at("w")) + p.at("b") - y).square().mean();
  }

  template <class Optimizer>
  void check(const Optimizer& ours, torch::optim::Optimizer& theirs,
             const std::vector<at::Tensor>& leaves) {
    Params p = params;
    State state = ours.init(p);
    const auto f = [this](const Params& q) { return loss(q); };
    for (int step = 0; step < 4; ++step) {
      theirs.zero_grad();
      loss({{"b", leaves[0]}, {"w", leaves[1]}}).backward();
      theirs.step();
      std::tie(p, state) = ours.update(grad(f)(p), state, p);
      EXPECT_TRUE(torch::allclose(p.at("b"), leaves[0]));
      EXPECT_TRUE(torch::allclose(p.at("w"), leaves[1]));
    }
  }

  std::vector<at::Tensor> leaves() const {
    return {params.at("b").clone().requires_grad_(), params.at("w").clone().requires_grad_()};
  }

  Params params;
  at::Tensor x, y;
};

TEST_F(Optim, Sgd) {
  const std::vector<SgdOptions> all{
      {.lr = 0.1},
      {.lr = 0.1, .weight_decay = 0.2},
      {.lr = 0.1, .momentum = 0.9, .dampening = 0.5},
      {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.1, .nesterov = true}};
  for (const SgdOptions& o : all) {
    const auto own = leaves();
    torch::optim::SGD theirs(own, torch::optim::SGDOptions(o.lr)
                                      .momentum(o.momentum)
                                      .dampening(o.dampening)
                                      .weight_decay(o.weight_decay)
                                      .nesterov(o.nesterov));
    check(Sgd(o), theirs, own);
  }
}

TEST_F(Optim, Adam) {
  const auto own = leaves();
  torch::optim::Adam theirs(
      own, torch::optim::AdamOptions(0.1).betas({0.5, 0.9}).eps(1e-3).weight_decay(0.2));
  check(Adam({.lr = 0.1, .beta1 = 0.5, .beta2 = 0.9, .eps = 1e-3, .weight_decay = 0.2}), theirs,
        own);
  const auto again = leaves();
  torch::optim::AdamW decoupled(again, torch::optim::AdamWOptions(0.1).weight_decay(0.5));
  check(adamw({.lr = 0.1, .weight_decay = 0.5}), decoupled, again);
}

TEST_F(Optim, MappedOverAndDifferentiated) {
  const Adam adam({.lr = 0.1});
  const auto f = [this](const Params& p) { return loss(p); };
  const auto after = [&](const Params& p) {
    return loss(adam.update(grad(f)(p), adam.init(p), p).first);
  };
  Params stacked;
  for (const auto& [name, p] : params) stacked.emplace(name, torch::stack({p, p * 2, p * 3}));
  const Params got = vmap(grad(after))(stacked);
  for (int64_t i = 0; i < 3; ++i) {
    Params one;
    for (const auto& [name, p] : params) one.emplace(name, p * (i + 1));
    for (const auto& [name, g] : grad(after)(one)) EXPECT_TRUE(torch::allclose(got.at(name)[i], g));
  }
  // Finite differences along one direction.
  const double h = 1e-6;
  const at::Tensor d = torch::randn({2}, torch::kDouble);
  Params plus = params, minus = params;
  plus["b"] = params["b"] + d * h;
  minus["b"] = params["b"] - d * h;
  const at::Tensor slope = (after(plus) - after(minus)) / (2 * h);
  EXPECT_TRUE(torch::allclose(grad(after)(params).at("b").dot(d), slope, 1e-5, 1e-7));
}

TEST_F(Optim, Errors) {
  EXPECT_THROW(Sgd({.lr = -1}), TransformError);
  EXPECT_THROW(Sgd({.lr = 1, .nesterov = true}), TransformError);
  EXPECT_THROW(Adam({.beta1 = 1.5}), TransformError);
  const Adam adam;
  EXPECT_THROW(adam.update(params, adam.init(Params{{"w", x}}), params), TransformError);
  EXPECT_THROW(adam.init(torch::ones({2}, torch::kComplexDouble)), TransformError);
}

}  // namespace
}  // namespace torchlift::optim
