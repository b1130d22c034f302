// The five invariants of docs/design.md, each a test.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_make_dual.h>
#include <ATen/ops/_unpack_dual.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "autodiff/reverse.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;
using Function = std::function<at::Tensor(const at::Tensor&)>;

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// vmap over dim 0 of x.
at::Tensor vmap(const Function& f, const at::Tensor& x) {
  const LevelScope scope({.size = x.size(0)});
  const Lowered out = lower(f(lift_alias(x, 0, scope.level())), *scope.level());
  return out.bdim ? out.value.movedim(*out.bdim, 0) : out.value;
}

at::Tensor grad(const Function& f, const at::Tensor& x) {
  ReverseScope scope;
  const at::Tensor out = f(scope.primal(x));
  const Pullback pullback = scope.finish({out});
  return pullback({at::ones_like(out)}, /*free_graph=*/true)[0];
}

// The derivative of f at the scalar x, in a level of its own; `hide` brings outer tensors into that
// level.
at::Tensor isolated_jvp(const std::function<at::Tensor(const at::Tensor&, const Function&)>& f,
                        const at::Tensor& x) {
  const at::Tensor one = at::ones({}, at::kDouble), none = at::zeros_like(x);
  const LevelScope scope({.size = 1});
  const Function lift_one = [&](const at::Tensor& t) {
    return lift_alias(t, std::nullopt, scope.level());
  };
  const at::Tensor dual = at::_make_dual(lift_one(x), lift_one(one), 0);
  const at::Tensor tangent = std::get<1>(at::_unpack_dual(f(dual, lift_one), 0));
  return tangent.defined() ? lower(tangent, *scope.level()).value : none;
}

// The derivative of f at the scalar x in libtorch's own forward mode.
double outer_jvp(const Function& f, double x) {
  const auto level = torch::autograd::ForwardADLevel::get_next_idx();
  double result = 0;
  {
    const at::Tensor dual = at::_make_dual(at::scalar_tensor(x, at::kDouble),
                                           at::ones({}, at::kDouble), static_cast<int64_t>(level));
    const at::Tensor tangent = std::get<1>(at::_unpack_dual(f(dual), static_cast<int64_t>(level)));
    if (tangent.defined()) result = tangent.item<double>();
  }
  torch::autograd::ForwardADLevel::release_idx(level);
  return result;
}

// --- 1: arguments of other domains are hidden ----------------------------------------------------

TEST(InvariantsTest, TangentsOfTwoNestedDerivativesDoNotMix) {
  // d/da of a * d/db (a + b), a * d/db (a b), a * d/db (a b b) at b = a = 2.
  EXPECT_DOUBLE_EQ(
      outer_jvp(
          [](const at::Tensor& a) {
            return a * isolated_jvp([&](const at::Tensor& b, const Function&) { return a + b; }, a);
          },
          2),
      1);
  EXPECT_DOUBLE_EQ(
      outer_jvp(
          [](const at::Tensor& a) {
            return a * isolated_jvp([&](const at::Tensor& b, const Function&) { return a * b; }, a);
          },
          2),
      4);
  EXPECT_DOUBLE_EQ(
      outer_jvp(
          [](const at::Tensor& a) {
            return a *
                   isolated_jvp([&](const at::Tensor& b, const Function&) { return a * b * b; }, a);
          },
          2),
      24);
}

TEST(InvariantsTest, AnOuterTensorIsNoEdgeOfAnInnerGraph) {
  at::Tensor w = randn({5}).set_requires_grad(true);
  const at::Tensor value = randn({3, 5});
  const LevelScope scope({.size = 3});
  const at::Tensor x = lift(value, 0, scope.level()).set_requires_grad(true);
  const at::Tensor y = x * w;
  ASSERT_TRUE(y.grad_fn() != nullptr);
  // x is the one edge; w's was hidden, and is found in the value's graph instead.
  EXPECT_TRUE(y.grad_fn()->next_edge(0).is_valid());
  EXPECT_FALSE(y.grad_fn()->next_edge(1).is_valid());
  EXPECT_TRUE(lower(y, *scope.level()).value.requires_grad());
}

// --- 2: a graph of the gradient is made only if someone can see it -------------------------------

TEST(InvariantsTest, AnInnerGradientMakesNoGraphThatNobodySees) {
  const at::Tensor value = randn({3, 5});
  const LevelScope scope({.size = 3});
  const at::Tensor x = lift(value, 0, scope.level());
  const at::Tensor g = grad([](const at::Tensor& t) { return t.sin().sum(); }, x);
  EXPECT_FALSE(g.requires_grad());
  EXPECT_FALSE(lower(g, *scope.level()).value.requires_grad());
}

TEST(InvariantsTest, OuterDomainsSeeAnInnerGradientWithoutAnInnerGraph) {
  at::Tensor w = randn({5}).set_requires_grad(true);
  const at::Tensor x = randn({3, 5});
  const at::Tensor per_example = vmap(
      [&](const at::Tensor& xi) {
        const at::Tensor g = grad([&](const at::Tensor& t) { return (t * w).sin().sum(); }, xi);
        EXPECT_FALSE(g.requires_grad());  // not in the level's own domain
        return g;
      },
      x);
  ASSERT_TRUE(per_example.requires_grad());
  const at::Tensor got = torch::autograd::grad({per_example.pow(2).sum()}, {w})[0];
  // d/dx sum sin(x w) = w cos(x w), by hand.
  const at::Tensor by_hand = (w * (x * w).cos()).pow(2).sum();
  EXPECT_TRUE(at::allclose(got, torch::autograd::grad({by_hand}, {w})[0]));
}

TEST(InvariantsTest, AGradientOfAGradientHasAGraph) {
  const at::Tensor x = randn({4});
  const at::Tensor second = grad(
      [](const at::Tensor& t) {
        return grad([](const at::Tensor& u) { return u.pow(3).sum(); }, t).sum();
      },
      x);
  EXPECT_TRUE(at::allclose(second, 6 * x));
}

TEST(InvariantsTest, NoGradAroundAGradientStopsOuterDomainsOnly) {
  at::Tensor w = randn({5}).set_requires_grad(true);
  const at::Tensor x = randn({3, 5});
  const at::Tensor g = vmap(
      [&](const at::Tensor& xi) {
        const c10::NoGradGuard no_grad;
        return grad([&](const at::Tensor& t) { return (t * w).sin().sum(); }, xi);
      },
      x);
  EXPECT_FALSE(g.requires_grad());
  EXPECT_TRUE(at::allclose(g, (w * (x * w).cos()).detach()));
}

// --- 3: outputs are lowered; what escapes throws -------------------------------------------------

TEST(InvariantsTest, ATensorThatEscapedNamesItsLevel) {
  at::Tensor escaped;
  vmap([&](const at::Tensor& t) { return escaped = t.sin(); }, randn({3, 2}));
  try {
    (void)(escaped + escaped);
    FAIL() << "expected an error";
  } catch (const UnsupportedError& e) {
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("vmap level 1 (size 3)"));
  }
}

// --- 4: exceptions leave nothing behind ----------------------------------------------------------

TEST(InvariantsTest, AnExceptionThreeTransformsDeepChangesNothing) {
  const auto before = c10::impl::tls_local_dispatch_key_set();
  const at::Tensor x = randn({2, 3, 4});
  const auto nested = [&](bool fail) {
    return vmap(
        [&](const at::Tensor& row) {
          return vmap(
              [&](const at::Tensor& xi) {
                return grad(
                    [&](const at::Tensor& t) {
                      const at::Tensor y = t.sin();
                      if (fail) throw std::runtime_error("deep inside");
                      return y.sum();
                    },
                    xi);
              },
              row);
        },
        x);
  };
  EXPECT_THROW(nested(true), std::runtime_error);
  const auto after = c10::impl::tls_local_dispatch_key_set();
  EXPECT_EQ(current_level(), nullptr);
  EXPECT_EQ(current_frame(), nullptr);
  EXPECT_EQ(before.included_, after.included_);
  EXPECT_EQ(before.excluded_, after.excluded_);
  EXPECT_TRUE(c10::GradMode::is_enabled());
  EXPECT_TRUE(at::allclose(nested(false), x.cos()));
}

// --- 5: threads ----------------------------------------------------------------------------------

TEST(InvariantsTest, ThreadsRunDifferentTransformsAtOnce) {
  std::vector<std::thread> threads;
  for (int64_t k = 1; k <= 4; ++k) {
    threads.emplace_back([k] {
      for (int repeat = 0; repeat < 25; ++repeat) {
        const at::Tensor x = randn({k, 3});
        const at::Tensor g = vmap(
            [](const at::Tensor& xi) {
              return grad([](const at::Tensor& t) { return t.sin().sum(); }, xi);
            },
            x);
        EXPECT_TRUE(at::allclose(g, x.cos()));
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(InvariantsTest, BackwardNeedsNoLevelStack) {
  // As on a CUDA device, the backward pass of a level runs on a thread that never entered it.
  const at::Tensor value = randn({3, 4});
  const LevelScope scope({.size = 3});
  const at::Tensor x = lift(value, 0, scope.level()).set_requires_grad(true);
  const at::Tensor y = x.sin().sum();
  at::Tensor g;
  std::thread other([&] { g = torch::autograd::grad({y}, {x})[0]; });
  other.join();
  EXPECT_TRUE(at::allclose(lower(g, *scope.level()).value, value.cos()));
}

// --- autograd Functions --------------------------------------------------------------------------

// sin, with a backward ten times too large so that one can tell whose backward ran.
struct TenSin : torch::autograd::Function<TenSin> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x) {
    ctx->save_for_backward({x});
    return x.sin();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    return {grads[0] * ctx->get_saved_variables()[0].cos() * 10};
  }
};

TEST(AutogradFunctionTest, WorksUnchangedInsideVmapOfGrad) {
  const at::Tensor x = randn({3, 4});
  const at::Tensor g = vmap(
      [](const at::Tensor& xi) {
        return grad([](const at::Tensor& t) { return TenSin::apply(t).sum(); }, xi);
      },
      x);
  EXPECT_TRUE(at::allclose(g, 10 * x.cos()));
}

TEST(AutogradFunctionTest, NeverLosesAnOuterGradientSilently) {
  try {
    grad(
        [](const at::Tensor& t) {
          return vmap([](const at::Tensor& xi) { return TenSin::apply(xi); }, t).sum();
        },
        randn({3, 4}));
    FAIL() << "expected an error";
  } catch (const UnsupportedError& e) {
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("inside an autograd Function"));
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("vmap(grad(f))"));
  }
}

TEST(AutogradFunctionTest, NoGradInsideVmapIsStillNoGrad) {
  const at::Tensor x = randn({3, 4});
  const at::Tensor g = grad(
      [](const at::Tensor& t) {
        return vmap(
                   [](const at::Tensor& xi) {
                     at::Tensor constant;
                     {
                       const c10::NoGradGuard no_grad;
                       constant = xi.sin();
                     }
                     return xi * constant;
                   },
                   t)
            .sum();
      },
      x);
  EXPECT_TRUE(at::allclose(g, x.sin()));
}

}  // namespace
}  // namespace torchlift
