#include "autodiff/reverse.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

TEST(ReverseScope, PullsBackAsOftenAsAsked) {
  const at::Tensor x = randn({3});
  ReverseScope scope;
  const at::Tensor p = scope.primal(x);
  EXPECT_EQ(p.data_ptr(), x.data_ptr());
  const Pullback pullback = scope.finish({p.sin(), p * p});
  EXPECT_EQ(pullback.outputs().size(), 2);
  EXPECT_CLOSE(pullback({at::ones_like(x), {}})[0], x.cos());
  EXPECT_CLOSE(pullback({{}, at::ones_like(x)})[0], 2 * x);
  EXPECT_CLOSE(pullback({at::ones_like(x), at::ones_like(x)})[0], x.cos() + 2 * x);
  EXPECT_CLOSE(pullback({{}, {}})[0], 0 * x);
}

TEST(ReverseScope, PullsBackToSomeOfThePrimals) {
  const at::Tensor x = randn({3}), y = randn({3}), z = randn({3});
  ReverseScope scope;
  const at::Tensor p = scope.primal(x), q = scope.primal(y);
  scope.primal(z);
  const at::Tensor product = p * q;
  const Pullback pullback = scope.finish({product * p});
  const std::vector<at::Tensor> grads = pullback.of_primals({2, 0}, {at::ones_like(x)});
  ASSERT_EQ(grads.size(), 2);
  EXPECT_CLOSE(grads[0], 0 * z);
  EXPECT_CLOSE(grads[1], 2 * x * y);
  EXPECT_TRUE(pullback.of_primals({}, {at::ones_like(x)}).empty());
}

TEST(ReverseScope, NothingOutsideSeesTheGraph) {
  const at::Tensor x = randn({3});
  ReverseScope scope;
  const at::Tensor p = scope.primal(x);
  const Pullback pullback = scope.finish({p.sin()});
  EXPECT_FALSE(pullback.outputs()[0].requires_grad());
  EXPECT_FALSE(pullback({at::ones_like(x)})[0].requires_grad());
  EXPECT_FALSE(x.requires_grad());
}

TEST(ReverseScope, TrackedPrimalsAndClosures) {
  const at::Tensor x = randn({3}).requires_grad_(), w = randn({3}).requires_grad_();
  ReverseScope scope;
  const at::Tensor p = scope.primal(x);
  const Pullback pullback = scope.finish({w * p * p});
  const at::Tensor y = pullback.outputs()[0], g = pullback({at::ones_like(x)})[0];
  EXPECT_CLOSE(torch::autograd::grad({y.sum()}, {w}, {}, true)[0], (x * x).detach());
  const auto outer = torch::autograd::grad({g.sum()}, {x, w});
  EXPECT_CLOSE(outer[0], (2 * w).detach());
  EXPECT_CLOSE(outer[1], (2 * x).detach());
}

TEST(ReverseScope, ATrackedCotangentIsEnough) {
  const at::Tensor x = randn({3}), ct = randn({3}).requires_grad_();
  ReverseScope scope;
  const at::Tensor p = scope.primal(x);
  const Pullback pullback = scope.finish({p.sin()});
  EXPECT_CLOSE(torch::autograd::grad({pullback({ct})[0].sum()}, {ct})[0], x.cos());
}

TEST(ReverseScope, GradModeIsRestored) {
  const c10::NoGradGuard no_grad;
  {
    ReverseScope scope;
    EXPECT_TRUE(c10::GradMode::is_enabled());
    const Pullback pullback = scope.finish({scope.primal(randn({})).sin()});
    EXPECT_FALSE(c10::GradMode::is_enabled());
  }
  try {
    ReverseScope scope;
    throw std::runtime_error("from f");
  } catch (const std::runtime_error&) {
  }
  EXPECT_FALSE(c10::GradMode::is_enabled());
}

TEST(ReverseScope, TheLevelsOuterGradModeIsRestored) {
  const LevelScope level({.size = 2});
  const c10::NoGradGuard no_grad;
  try {
    ReverseScope scope;
    EXPECT_EQ(current_level()->outer_grad_mode(), OuterGradMode::kOff);
    throw std::runtime_error("from f");
  } catch (const std::runtime_error&) {
  }
  EXPECT_EQ(current_level()->outer_grad_mode(), OuterGradMode::kInherit);
}

TEST(ReverseScope, APlainPrimalWithinALevel) {
  // In the level's domain it is a leaf of its own; the outer domain goes on recording.
  const at::Tensor w = randn({3}).requires_grad_(), x = randn({4, 3});
  at::Tensor g;
  {
    const LevelScope level({.size = 4});
    const at::Tensor a = lift_alias(x, 0, level.level());
    ReverseScope scope;
    const at::Tensor p = scope.primal(w);
    const Pullback pullback = scope.finish({(p * p * a).sum()});
    const Lowered lowered =
        lower(pullback({at::ones({}, at::kDouble)}, /*free_graph=*/true)[0], *level.level());
    ASSERT_TRUE(lowered.bdim.has_value());
    g = lowered.value.movedim(*lowered.bdim, 0);
  }
  EXPECT_CLOSE(g, 2 * w * x);
  EXPECT_CLOSE(torch::autograd::grad({g.sum()}, {w})[0], 2 * x.sum(0));
}

}  // namespace
}  // namespace torchlift
