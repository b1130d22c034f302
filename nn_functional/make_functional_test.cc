#include "nn_functional/make_functional.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/linear.h>

#include <string>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

torch::nn::Sequential make_net() {
  return torch::nn::Sequential(torch::nn::Linear(3, 4), torch::nn::BatchNorm1d(4),
                               torch::nn::Linear(4, 2));
}

TEST(MakeFunctional, CallsWithOtherParameters) {
  torch::nn::Linear net(3, 2);
  auto [f, params] = make_functional(net);
  ASSERT_EQ(params.size(), 2U);
  EXPECT_TRUE(params[0].requires_grad() && !params[0].is_same(net->weight));
  const at::Tensor x = torch::randn({5, 3});
  EXPECT_TRUE(torch::allclose(f(params, x), net->forward(x)));
  const TensorVector zeros{torch::zeros({2, 3}), torch::ones({2})};
  EXPECT_TRUE(torch::equal(f(zeros, x), torch::ones({5, 2})));
  EXPECT_FALSE(make_functional(net, {.disable_autograd_tracking = true}).second[0].requires_grad());
}

TEST(MakeFunctional, PerSampleGradients) {
  torch::nn::Linear net(3, 2);
  auto [f, params] = make_functional(net, {.disable_autograd_tracking = true});
  const at::Tensor xs = torch::randn({4, 3});
  const auto loss = [f = f](const TensorVector& p, const at::Tensor& x) {
    return f(p, x).square().sum();
  };
  const TensorVector got = vmap(grad(loss), {.in_dims = in(kNone, 0)})(params, xs);
  for (int64_t i = 0; i < 4; ++i) {
    const at::Tensor y = net->forward(xs[i]).detach();
    EXPECT_TRUE(torch::allclose(got[0][i], 2 * torch::outer(y, xs[i])));
    EXPECT_TRUE(torch::allclose(got[1][i], 2 * y));
  }
}

TEST(MakeFunctional, WithBuffers) {
  auto net = make_net();
  auto [f, params, buffers] = make_functional_with_buffers(net);
  ASSERT_EQ(params.size(), 6U);
  ASSERT_EQ(buffers.size(), 3U);
  const at::Tensor x = torch::randn({5, 3});
  const at::Tensor y = f(params, buffers, x);
  EXPECT_EQ(buffers[2].item<int64_t>(), 1);  // num_batches_tracked, written in place
  EXPECT_EQ(net->named_buffers()["1.num_batches_tracked"].item<int64_t>(), 0);
  EXPECT_TRUE(torch::allclose(net->forward(x), y));
}

TEST(MakeFunctional, TiedWeightsAreOneParameter) {
  struct Tied : torch::nn::Module {
    Tied() { register_parameter("b", register_parameter("a", torch::ones({2}))); }
    at::Tensor forward(const at::Tensor& x) { return x * parameters_["a"] * parameters_["b"]; }
  };
  Tied net;
  auto [f, params] = make_functional(net);
  ASSERT_EQ(params.size(), 1U);
  const at::Tensor x = torch::ones({2});
  EXPECT_TRUE(torch::equal(f(TensorVector{x * 3}, x), x * 9));
}

TEST(MakeFunctional, Ensembles) {
  std::vector<torch::nn::Sequential> nets;
  std::vector<at::Tensor> want;
  const at::Tensor x = torch::randn({5, 3});
  for (int i = 0; i < 3; ++i) {
    nets.push_back(make_net());
    nets.back()->eval();
    want.push_back(nets.back()->forward(x));
  }
  auto [f, params, buffers] = combine_state_for_ensemble(nets);
  EXPECT_FALSE(params[0].requires_grad());
  const at::Tensor got = vmap(f, {.in_dims = in(0, 0, kNone)})(params, buffers, x);
  EXPECT_TRUE(torch::allclose(got, torch::stack(want), 1e-5, 1e-6));

  const auto [stacked, stacked_buffers] = stack_module_state(nets);
  EXPECT_TRUE(stacked.at("0.weight").requires_grad() && stacked.at("0.weight").is_leaf());
  const auto one = [g = functional(nets[0])](const ModuleState& p, const ModuleState& b,
                                             const at::Tensor& v) { return g(std::tie(p, b), v); };
  const at::Tensor again = vmap(one, {.in_dims = in(0, 0, kNone)})(stacked, stacked_buffers, x);
  EXPECT_TRUE(torch::equal(again, got));
}

TEST(MakeFunctional, Errors) {
  EXPECT_THAT(error_of<TransformError>([] { make_functional(make_net()); }),
              HasSubstr("Sequential has buffers, such as '1.running_mean'. Use "
                        "make_functional_with_buffers"));
  torch::nn::Linear net(3, 2);
  auto made = make_functional(net);
  EXPECT_THAT(
      error_of<TransformError>([&] { made.first(TensorVector{made.second[0]}, torch::ones({3})); }),
      HasSubstr("Linear has 2 parameters and 0 buffers; got 1 and 0"));
  std::vector<torch::nn::Linear> none;
  EXPECT_THAT(error_of<TransformError>([&] { stack_module_state(none); }),
              HasSubstr("at least one model"));
  std::vector<torch::nn::Linear> different{torch::nn::Linear(3, 2), torch::nn::Linear(3, 1)};
  EXPECT_THAT(error_of<TransformError>([&] { stack_module_state(different); }),
              HasSubstr("'bias' is a tensor of shape [2], Float in model 0, and of shape [1]"));
  different = {torch::nn::Linear(3, 2), torch::nn::Linear(3, 2)};
  different[1]->eval();
  EXPECT_THAT(error_of<TransformError>([&] { stack_module_state(different); }),
              HasSubstr("all in eval mode"));
  different[0]->eval();
  different[1]->weight.set_requires_grad(false);
  EXPECT_THAT(error_of<TransformError>([&] { stack_module_state(different); }),
              HasSubstr("'weight' requires grad in some models"));
}

}  // namespace
}  // namespace torchlift
