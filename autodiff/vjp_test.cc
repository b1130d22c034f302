#include "autodiff/vjp.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>
#include <optional>
#include <thread>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

at::Tensor predict(const Params& p, const at::Tensor& x) { return (p.w * x).sin() + p.b; }

class VjpTest : public ::testing::Test {
 protected:
  void TearDown() override { EXPECT_EQ(current_level(), nullptr); }
};

TEST_F(VjpTest, ValueAndGradientsOfEveryPrimal) {
  const Params p{randn({3}), randn({})};
  const at::Tensor x = randn({3}), ct = randn({3});
  const auto [y, pullback] = vjp(predict, p, x);
  EXPECT_CLOSE(y, predict(p, x));
  EXPECT_FALSE(y.requires_grad());
  const auto [gp, gx] = pullback(ct);
  EXPECT_CLOSE(gp.w, ct * (p.w * x).cos() * x);
  EXPECT_CLOSE(gp.b, ct.sum());
  EXPECT_CLOSE(gx, ct * (p.w * x).cos() * p.w);
}

TEST_F(VjpTest, OnePrimalGivesOneTree) {
  const at::Tensor x = randn({3}), ct = randn({3});
  const auto [y, pullback] = vjp([](const at::Tensor& a) { return a.exp(); }, x);
  EXPECT_CLOSE(pullback(ct), ct * x.exp());
}

TEST_F(VjpTest, TreesOfValues) {
  using Value = std::pair<std::map<std::string, at::Tensor>, std::optional<at::Tensor>>;
  const at::Tensor x = randn({3});
  const auto f = [](const at::Tensor& a) { return Value({{"s", a.sin()}, {"t", a.sum()}}, a * 2); };
  const auto [y, pullback] = vjp(f, x);
  const Value ct({{"s", randn({3})}, {"t", randn({})}}, randn({3}));
  EXPECT_CLOSE(pullback(ct), ct.first.at("s") * x.cos() + ct.first.at("t") + *ct.second * 2);
  // An undefined cotangent is zero.
  const Value partial({{"s", at::Tensor()}, {"t", ct.first.at("t")}}, at::Tensor());
  EXPECT_CLOSE(pullback(partial), ct.first.at("t").expand({3}));
  const Value none({{"s", at::Tensor()}, {"t", at::Tensor()}}, at::Tensor());
  EXPECT_CLOSE(pullback(none), at::zeros({3}, at::kDouble));
}

TEST_F(VjpTest, AfterItsScopeAndRepeatedly) {
  const at::Tensor x = randn({3});
  const auto make = [&] {
    return vjp([](const at::Tensor& a) { return a.sin(); }, at::Tensor(x * 1)).second;
  };
  const auto pullback = make();
  const auto copy = pullback;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const at::Tensor ct = randn({3});
    EXPECT_CLOSE(pullback(ct), ct * x.cos());
    EXPECT_CLOSE(copy(ct), ct * x.cos());
  }
  std::thread([&] { EXPECT_CLOSE(pullback(at::ones_like(x)), x.cos()); }).join();
}

TEST_F(VjpTest, Aux) {
  const at::Tensor x = randn({3});
  const auto f = [](const at::Tensor& a) {
    return std::pair(a.sin(), std::tuple(a * 2, 3, at::arange(2)));
  };
  const auto [y, pullback, aux] = vjp(f, kHasAux, x);
  EXPECT_CLOSE(y, x.sin());
  EXPECT_CLOSE(std::get<0>(aux), x * 2);
  EXPECT_FALSE(std::get<0>(aux).requires_grad());
  EXPECT_EQ(std::get<1>(aux), 3);
  EXPECT_CLOSE(pullback(at::ones_like(y)), x.cos());
}

TEST_F(VjpTest, JacobianByVmapOfThePullback) {
  const at::Tensor a = randn({4, 3}), x = randn({3});
  const auto f = [&](const at::Tensor& v) { return (a * v).sum(1).sin(); };
  const auto [y, pullback] = vjp(f, x);
  const at::Tensor jacobian = vmap(pullback)(at::eye(4, at::kDouble));
  EXPECT_CLOSE(jacobian, (a * x).sum(1).cos().unsqueeze(1) * a);
}

TEST_F(VjpTest, JacobianWithinVmap) {
  const at::Tensor a = randn({4, 3}), xs = randn({5, 3});
  const auto jacobian = [&](const at::Tensor& x) {
    const auto result = vjp([&](const at::Tensor& v) { return (a * v).sum(1).sin(); }, x);
    return vmap(result.second)(at::eye(4, at::kDouble));
  };
  const at::Tensor expected = (a * xs.unsqueeze(1)).sum(2).cos().unsqueeze(2) * a;
  EXPECT_CLOSE(vmap(jacobian)(xs), expected);
}

TEST_F(VjpTest, OfAVmapAndInAGrad) {
  const at::Tensor w = randn({3}), xs = randn({5, 3}), ct = randn({5, 3});
  const auto model = vmap([](const at::Tensor& v, const at::Tensor& x) { return (v * x).sin(); },
                          {.in_dims = in(kNone, 0)});
  const auto [y, pullback] = vjp(model, w, xs);
  EXPECT_CLOSE(std::get<0>(pullback(ct)), (ct * (w * xs).cos() * xs).sum(0));
  // d/dw of |vjp|^2.
  const auto norm = [&](const at::Tensor& v) {
    return vjp([](const at::Tensor& u) { return u.pow(3); }, v)
        .second(at::ones_like(v))
        .pow(2)
        .sum();
  };
  EXPECT_CLOSE(grad(norm)(w), 36 * w.pow(3));
}

TEST_F(VjpTest, ConnectedToTheOutside) {
  const at::Tensor w = randn({3}).requires_grad_(), x = randn({3}),
                   ct = randn({3}).requires_grad_();
  const auto f = [&](const at::Tensor& a) { return w * a * a; };
  const auto [y, pullback] = vjp(f, x);
  EXPECT_CLOSE(torch::autograd::grad({y.sum()}, {w}, {}, /*retain_graph=*/true)[0], x * x);
  const at::Tensor g = pullback(ct);
  const auto outer = torch::autograd::grad({g.sum()}, {w, ct});
  EXPECT_CLOSE(outer[0], (2 * x * ct).detach());
  EXPECT_CLOSE(outer[1], (2 * x * w).detach());
}

TEST_F(VjpTest, NoGradAround) {
  const at::Tensor x = randn({3}).requires_grad_();
  const c10::NoGradGuard no_grad;
  const auto [y, pullback] = vjp([](const at::Tensor& a) { return a.sin(); }, x);
  EXPECT_FALSE(y.requires_grad());
  const at::Tensor g = pullback(at::ones_like(y));
  EXPECT_CLOSE(g, x.cos());
  EXPECT_FALSE(g.requires_grad());
}

// Errors.

TEST_F(VjpTest, CotangentsThatDoNotFit) {
  const at::Tensor x = randn({3});
  const auto f = [](const at::Tensor& a) {
    return std::pair(a.sin(), std::vector{a * 2, a.sum()});
  };
  const auto [y, unbound] = vjp(f, x);
  const auto& pullback = unbound;
  EXPECT_EQ(
      error_of([&] {
        pullback({randn({3}), {randn({3})}});
      }),
      "[vjp] the cotangents must have the structure of the function's value, but do not: at [1]: "
      "expected 2 elements, got 1. Give one cotangent for each tensor of the value.");
  EXPECT_EQ(error_of([&] {
              pullback({randn({2}), {randn({3}), randn({})}});
            }),
            "[vjp] the cotangent[0] has shape [2], but the value there has shape [3]. A cotangent "
            "has the "
            "shape of the value it belongs to; to pull back many at once use vmap(pullback).");
  EXPECT_THAT(
      error_of([&] {
        pullback({randn({3}), {randn({3}), randn({1})}});
      }),
      HasSubstr(
          "the cotangent[1][1] has shape [1], but the value there has shape []. A cotangent has "
          "the shape of the value it belongs to; for a gradient pass at::ones_like(value)."));
  EXPECT_EQ(error_of([&] {
              pullback({at::ones({3}), {randn({3}), randn({})}});
            }),
            "[vjp] the cotangent[0] has dtype Float, but the value there has dtype Double. Convert "
            "it, as in "
            "cotangent.to(value.scalar_type()).");
  // And the right one still works.
  EXPECT_CLOSE(pullback({randn({3}) * 0, {at::ones({3}, at::kDouble), randn({}) * 0}}),
               at::ones({3}, at::kDouble) * 2);
}

TEST_F(VjpTest, PrimalsThatCannotBeDifferentiated) {
  bool ran = false;
  const auto f = [&](const at::Tensor& a, const auto&) {
    ran = true;
    return a;
  };
  EXPECT_THAT(
      error_of([&] { vjp(f, randn({3}), at::arange(3)); }),
      HasSubstr("[vjp] argument 1 is a tensor of dtype Long (shape [3]), but only floating-point"));
  EXPECT_THAT(error_of([&] { vjp([&](double) { return at::ones({}); }, 1.0); }),
              HasSubstr("[vjp] argument 0 has no tensor to differentiate"));
  EXPECT_FALSE(ran);
  EXPECT_THAT(error_of([&] { vjp([](const at::Tensor&) { return 1.0; }, randn({3})); }),
              HasSubstr("[vjp] the function returned no tensor, so there is nothing to pull back"));
}

}  // namespace
}  // namespace torchlift
