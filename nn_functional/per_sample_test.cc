#include "nn_functional/per_sample.h"

#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/functional/loss.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>
#include <string>
#include <vector>

#include "core/error.h"

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
}

}  // namespace
}  // namespace torchlift
