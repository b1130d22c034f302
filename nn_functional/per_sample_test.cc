#include "nn_functional/per_sample.h"

#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn.h>
#include <torch/optim/sgd.h>

#include <vector>

#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

at::Tensor loss(const at::Tensor& out, const at::Tensor& y) {
  return torch::nn::functional::cross_entropy(out, y);
}

torch::nn::Sequential make_net() {
  torch::nn::Sequential net(torch::nn::Conv2d(torch::nn::Conv2dOptions(2, 3, 3)),
                            torch::nn::BatchNorm2d(3), torch::nn::Flatten(),
                            torch::nn::Linear(27, 4));
  net->to(torch::kDouble);
  return net;
}

ModuleState loop(torch::nn::Sequential& net, const at::Tensor& xs, const at::Tensor& ys) {
  ModuleState grads;
  for (const auto& item : net->named_parameters()) {
    if (!item.value().requires_grad()) continue;
    std::vector<at::Tensor> rows;
    for (int64_t i = 0; i < xs.size(0); ++i) {
      const at::Tensor value = loss(net->forward(xs.slice(0, i, i + 1)), ys.slice(0, i, i + 1));
      rows.push_back(torch::autograd::grad({value}, {item.value()})[0]);
    }
    grads.emplace(item.key(), torch::stack(rows));
  }
  return grads;
}

TEST(PerSample, AgreesWithALoop) {
  for (const int64_t size : {1, 5}) {
    auto net = make_net();
    net->named_parameters()["3.bias"].set_requires_grad(false);
    const at::Tensor xs = torch::randn({size, 2, 5, 5}, torch::kDouble);
    const at::Tensor ys = torch::randint(0, 4, {size});
    for (const PerSampleOptions& options :
         {PerSampleOptions{}, PerSampleOptions{.chunk_size = 2}}) {
      const ModuleState got = per_sample_grad(net, &loss, options)(xs, ys);
      EXPECT_EQ(net->named_buffers()["1.num_batches_tracked"].item<int64_t>(), 0);
      const ModuleState want = loop(net, xs, ys);
      for (auto& item : net->named_buffers()) item.value().zero_();
      ASSERT_EQ(got.size(), want.size());
      for (const auto& [name, g] : want) {
        EXPECT_TRUE(torch::allclose(got.at(name), g, 1e-6, 1e-9)) << name;
      }
    }
  }
}

TEST(PerSample, ClipsAndSums) {
  const ModuleState grads{{"a", torch::randn({6, 2, 3}, torch::kDouble)},
                          {"b", torch::randn({6}, torch::kDouble)}};
  at::Tensor first = grads.at("a");
  first[0].zero_();
  grads.at("b")[0].zero_();
  const at::Tensor norms = grad_norms(grads);
  at::Tensor want_a = torch::zeros({2, 3}, torch::kDouble),
             want_b = torch::zeros({}, torch::kDouble);
  for (int64_t i = 0; i < 6; ++i) {
    const double norm = norms[i].item<double>();
    const double factor = norm > 1.5 ? 1.5 / norm : 1.0;
    want_a += factor * grads.at("a")[i];
    want_b += factor * grads.at("b")[i];
  }
  const ModuleState got = clip_and_sum(grads, 1.5);
  EXPECT_TRUE(torch::allclose(got.at("a"), want_a));
  EXPECT_TRUE(torch::allclose(got.at("b"), want_b));

  const ModuleState quiet = dp_gradients(grads, {.max_norm = 1.5, .noise_multiplier = 0.0});
  EXPECT_TRUE(torch::allclose(quiet.at("a"), want_a / 6));
  const auto noisy = [&] {
    return dp_gradients(grads, {.max_norm = 1.5,
                                .noise_multiplier = 2.0,
                                .expected_batch_size = 10,
                                .generator = at::make_generator<at::CPUGeneratorImpl>(3)});
  };
  auto generator = at::make_generator<at::CPUGeneratorImpl>(3);
  const at::Tensor noise = torch::randn({2, 3}, generator, torch::kDouble);
  EXPECT_TRUE(torch::allclose(noisy().at("a"), (want_a + 3.0 * noise) / 10));
}

TEST(DpSgd, GhostAndMaterialisedAgree) {
  const at::Tensor xs = torch::randn({6, 2, 5, 5}, torch::kDouble);
  const at::Tensor ys = torch::randint(0, 4, {6});
  auto net = make_net();
  net->eval();
  const DpOptions quiet{.max_norm = 0.7, .noise_multiplier = 0.0};
  DpOptions materialised = quiet;
  materialised.ghost = false;
  const ModuleState got = dp_gradients(net, &loss, quiet)(xs, ys);
  const ModuleState want = dp_gradients(net, &loss, materialised)(xs, ys);
  const ModuleState by_hand = dp_gradients(per_sample_grad(net, &loss)(xs, ys), quiet);
  ASSERT_EQ(got.size(), 6U);
  for (const auto& [name, g] : want) {
    EXPECT_TRUE(torch::allclose(got.at(name), g, 1e-9, 1e-12)) << name;
    EXPECT_TRUE(torch::allclose(by_hand.at(name), g)) << name;
  }
  const at::Tensor none =
      dp_gradients(net, &loss, quiet)(xs.slice(0, 0, 0), ys.slice(0, 0, 0)).at("3.bias");
  EXPECT_TRUE(torch::equal(none, torch::zeros({4}, torch::kDouble)));
}

TEST(DpSgd, Step) {
  const at::Tensor xs = torch::randn({6, 2, 5, 5}, torch::kDouble);
  const at::Tensor ys = torch::randint(0, 4, {6});
  auto net = make_net();
  const at::Tensor before = net->named_parameters()["3.weight"].detach().clone();
  const DpOptions options{.max_norm = 0.7, .noise_multiplier = 0.0};
  const ModuleState grads = dp_gradients(net, &loss, options)(xs, ys);
  torch::optim::SGD optimizer(net->parameters(), 0.5);
  dp_sgd_step(net, &loss, optimizer, options, xs, ys);
  EXPECT_TRUE(
      torch::allclose(net->named_parameters()["3.weight"], before - 0.5 * grads.at("3.weight")));
}

TEST(DpSgd, RandomOperatorsAreRefusedWithGhost) {
  torch::nn::Sequential net(torch::nn::Linear(3, 2), torch::nn::Dropout(0.5));
  const auto sum = [](const at::Tensor& out) { return out.sum(); };
  EXPECT_THROW(dp_gradients(net, sum, {.max_norm = 1.0})(torch::randn({4, 3})), c10::Error);
  dp_gradients(net, sum, {.max_norm = 1.0, .ghost = false})(torch::randn({4, 3}));
}

TEST(PerSample, MemoryBudget) {
  torch::nn::Linear net(50, 60);
  const at::Tensor xs = torch::randn({40, 50}), ys = torch::randint(0, 60, {40});
  const ModuleState want = per_sample_grad(net, &loss)(xs, ys);
  const ModuleState got = per_sample_grad(net, &loss, {.memory_budget = 1 << 18})(xs, ys);
  for (const auto& [name, g] : want) EXPECT_TRUE(torch::allclose(got.at(name), g, 1e-4, 1e-6));
}

TEST(PerSample, Errors) {
  torch::nn::Linear net(3, 2);
  const auto vector = [](const at::Tensor& out) { return out; };
  try {
    per_sample_grad(net, vector)(torch::ones({4, 3}));
    FAIL();
  } catch (const TransformError& e) {
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("must be one number, got shape [1, 2]"));
  }
  EXPECT_THROW(clip_and_sum({{"a", torch::ones({2, 2})}}, 0.0), TransformError);
  EXPECT_THAT(error_of<TransformError>([] {
                clip_and_sum({{"a", torch::ones({2, 2})}}, 1.0, torch::ones({3}));
              }),
              HasSubstr("expected one norm for each example of 'a', got [3] norms"));
  torch::nn::ReLU relu;
  EXPECT_THAT(error_of<TransformError>([&] {
                per_sample_grad(relu, vector)(torch::ones({4, 3}));
              }),
              HasSubstr("no parameter of ReLU requires grad"));
  EXPECT_THAT(
      error_of<TransformError>([&] { per_sample_grad_norms(net, vector)(torch::ones({})); }),
      HasSubstr("[per_sample_grad_norms] the inputs must have the examples along dim 0"));
  EXPECT_THAT(error_of<TransformError>([&] { dp_gradients(net, vector, {.max_norm = -1.0}); }),
              HasSubstr("max_norm must be above 0"));
}

}  // namespace
}  // namespace torchlift
