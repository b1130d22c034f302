// The transforms on a CUDA device: rules, derivatives (whose backward runs on the engine's own
// thread for the device), random numbers, moves between devices. Each compares with the same on
// the CPU, or with a loop.

#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <thread>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/level.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

const c10::Device kGpu(c10::kCUDA, 0);

class TransformsGpuTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!at::hasCUDA()) GTEST_SKIP() << "there is no CUDA device";
  }
  void TearDown() override { EXPECT_EQ(current_level(), nullptr); }
};

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

void expect_same(const at::Tensor& on_gpu, const at::Tensor& on_cpu) {
  ASSERT_EQ(on_gpu.device(), kGpu);
  ASSERT_EQ(on_gpu.sizes(), on_cpu.sizes());
  EXPECT_TRUE(at::allclose(on_gpu.cpu(), on_cpu, 1e-8, 1e-10));
}

// f, mapped over dim 0 of its second argument, on the device and on the CPU.
template <class F>
void expect_same_on_both(const F& f, const at::Tensor& shared, const at::Tensor& mapped) {
  const auto batched = vmap(f, {.in_dims = in(kNone, 0)});
  expect_same(batched(shared.to(kGpu), mapped.to(kGpu)), batched(shared, mapped));
}

at::Tensor mlp_loss(const at::Tensor& w, const at::Tensor& x) {
  const at::Tensor hidden = at::layer_norm(at::linear(x, w), {w.size(0)}).tanh();
  return (hidden * hidden).sum();
}

TEST_F(TransformsGpuTest, PerSampleGradientsOfAnMlp) {
  expect_same_on_both(grad(mlp_loss), randn({4, 3}), randn({7, 3}));
}

TEST_F(TransformsGpuTest, PerSampleGradientsOfAConvolution) {
  const auto loss = [](const at::Tensor& w, const at::Tensor& x) {
    return at::relu(at::conv2d(x.unsqueeze(0), w)).square().sum();
  };
  expect_same_on_both(grad(loss), randn({2, 3, 3, 3}), randn({5, 3, 8, 8}));
}

TEST_F(TransformsGpuTest, AttentionWithOwnQueries) {
  const auto attend = [](const at::Tensor& kv, const at::Tensor& q) {
    return at::scaled_dot_product_attention(q, kv, kv);
  };
  expect_same_on_both(attend, randn({2, 6, 8}), randn({3, 2, 5, 8}));
}

TEST_F(TransformsGpuTest, LossesWithOwnTargets) {
  const at::Tensor logits = randn({6, 4, 5});
  const at::Tensor targets = at::randint(0, 5, {6, 4}, at::kLong);
  const auto loss = [](const at::Tensor& x, const at::Tensor& y) {
    return at::cross_entropy_loss(x, y);
  };
  const auto losses = vmap(grad(loss));
  expect_same(losses(logits.to(kGpu), targets.to(kGpu)), losses(logits, targets));
}

TEST_F(TransformsGpuTest, NestedTwice) {
  const auto outer = vmap(vmap(grad(mlp_loss), {.in_dims = in(kNone, 0)}), {.in_dims = in(0, 0)});
  const at::Tensor w = randn({2, 4, 3});
  const at::Tensor x = randn({2, 5, 3});
  expect_same(outer(w.to(kGpu), x.to(kGpu)), outer(w, x));
}

TEST_F(TransformsGpuTest, SecondDerivativesUnderVmap) {
  const auto energy = [](const at::Tensor& x) { return (x.sin() * x.exp()).sum(); };
  const auto second = [&](const at::Tensor& x) {
    return grad([&](const at::Tensor& t) { return grad(energy)(t).square().sum(); })(x);
  };
  const at::Tensor x = randn({4, 3});
  expect_same(vmap(second)(x.to(kGpu)), vmap(second)(x));
}

TEST_F(TransformsGpuTest, WeightsOutsideKeepTheirGradients) {
  at::Tensor w = randn({4, 3}).to(kGpu).set_requires_grad(true);
  const at::Tensor x = randn({5, 3}).to(kGpu);
  const at::Tensor per_example = vmap([&](const at::Tensor& xi) {
    return grad([&](const at::Tensor& t) { return mlp_loss(w, t); })(xi);
  })(x);
  per_example.square().sum().backward();
  at::Tensor looped = w.detach().clone().set_requires_grad(true);
  std::vector<at::Tensor> rows;
  for (int64_t i = 0; i < x.size(0); ++i) {
    rows.push_back(grad([&](const at::Tensor& t) { return mlp_loss(looped, t); })(x[i]));
  }
  at::stack(rows).square().sum().backward();
  EXPECT_TRUE(at::allclose(w.grad(), looped.grad()));
}

TEST_F(TransformsGpuTest, APullbackIsCalledLater) {
  const at::Tensor w = randn({4, 3});
  const at::Tensor x = randn({3});
  const at::Tensor cotangent = randn({});
  auto [value, pullback] = vjp(mlp_loss, w.to(kGpu), x.to(kGpu));
  auto [value_cpu, pullback_cpu] = vjp(mlp_loss, w, x);
  expect_same(value, value_cpu);
  expect_same(std::get<0>(pullback(cotangent.to(kGpu))), std::get<0>(pullback_cpu(cotangent)));
}

TEST_F(TransformsGpuTest, RandomNumbersOfTheDevice) {
  const at::Tensor x = randn({4, 1000}).to(kGpu);
  const auto draw = [](const at::Tensor& t) { return at::rand_like(t); };
  const at::Tensor different = vmap(draw, {.randomness = Randomness::kDifferent})(x);
  const at::Tensor same = vmap(draw, {.randomness = Randomness::kSame})(x);
  EXPECT_EQ(different.device(), kGpu);
  EXPECT_FALSE(different[0].equal(different[1]));
  EXPECT_TRUE(same[0].equal(same[1]));
}

TEST_F(TransformsGpuTest, MovesBetweenDevices) {
  const at::Tensor x = randn({3, 4});
  const auto there_and_back = [](const at::Tensor& t) { return t.to(kGpu).sin().cpu(); };
  const at::Tensor result =
      vmap(grad([&](const at::Tensor& t) { return there_and_back(t).sum(); }))(x);
  EXPECT_TRUE(at::allclose(result, x.cos()));
}

TEST_F(TransformsGpuTest, TwoThreadsAtOnce) {
  const at::Tensor w = randn({4, 3}).to(kGpu);
  const at::Tensor x = randn({7, 3}).to(kGpu);
  const auto job = vmap(grad(mlp_loss), {.in_dims = in(kNone, 0)});
  const at::Tensor expected = job(w, x);
  std::vector<at::Tensor> results(2);
  std::vector<std::thread> threads;
  for (at::Tensor& result : results) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) result = job(w, x);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const at::Tensor& result : results) EXPECT_TRUE(at::allclose(result, expected));
}

}  // namespace
}  // namespace torchlift
