#include "autodiff/jvp.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;
using Function = std::function<at::Tensor(const at::Tensor&)>;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }
at::Tensor number(double x) { return at::scalar_tensor(x, at::kDouble); }

// Central differences along t.
at::Tensor difference(const Function& f, const at::Tensor& x, const at::Tensor& t) {
  constexpr double kStep = 1e-6;
  return (f(x + t * kStep) - f(x - t * kStep)) / (2 * kStep);
}

at::Tensor tangent_of(const Function& f, const at::Tensor& x, const at::Tensor& t) {
  return jvp(f, x, t).second;
}

// d/dx f at a number.
at::Tensor derivative(const Function& f, const at::Tensor& x) {
  return tangent_of(f, x, at::ones_like(x));
}

class JvpTest : public ::testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(current_level(), nullptr);
    EXPECT_TRUE(level_stack().empty());
    EXPECT_FALSE(forward_mode_open());
    EXPECT_EQ(torch::autograd::ForwardADLevel::try_get_by_idx(0), nullptr);
    EXPECT_TRUE(c10::GradMode::is_enabled());
  }
};

at::Tensor predict(const Params& p, const at::Tensor& x) { return (p.w * x).sin() + p.b; }

TEST_F(JvpTest, ValueAndTangentOfSeveralPrimals) {
  const Params p{randn({3}), randn({})}, dp{randn({3}), randn({})};
  const at::Tensor x = randn({3}), dx = randn({3});
  const auto [y, dy] = jvp(predict, std::tuple(p, x), std::tuple(dp, dx));
  EXPECT_CLOSE(y, predict(p, x));
  EXPECT_CLOSE(dy, (p.w * x).cos() * (dp.w * x + p.w * dx) + dp.b);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_FALSE(dy.requires_grad());
}

TEST_F(JvpTest, TreesOfValuesAndAux) {
  const at::Tensor x = randn({3}), t = randn({3});
  const auto f = [](const at::Tensor& a) {
    return std::pair(std::tuple(a.sin(), std::vector{a * 2, a.sum()}), a.cos());
  };
  const auto [value, tangent, aux] = jvp(f, kHasAux, x, t);
  EXPECT_CLOSE(std::get<0>(value), x.sin());
  EXPECT_CLOSE(std::get<0>(tangent), x.cos() * t);
  EXPECT_CLOSE(std::get<1>(tangent)[0], t * 2);
  EXPECT_CLOSE(std::get<1>(tangent)[1], t.sum());
  EXPECT_CLOSE(aux, x.cos());
  EXPECT_FALSE(aux._fw_grad(0).defined());
}

TEST_F(JvpTest, AnUndefinedTangentIsZero) {
  const at::Tensor a = randn({3}), b = randn({3}), t = randn({3});
  const auto f = [](const at::Tensor& x, const at::Tensor& y) { return x * y; };
  EXPECT_CLOSE(jvp(f, std::tuple(a, b), std::tuple(at::Tensor(), t)).second, a * t);
}

// --- every kind of operator, against central differences -----------------------------------------

struct OpCase {
  const char* name;
  Function f;
};

std::vector<OpCase> op_cases() {
  const at::Tensor c = randn({3, 3}), row = randn({3}), one = randn({});
  const at::Tensor positive = randn({3, 3}).abs() + 0.5;
  return {
      {"number", [](const at::Tensor& x) { return x * 2 + 1 - x / 4; }},
      {"number_left", [](const at::Tensor& x) { return (3 - x) * x; }},
      {"constant", [=](const at::Tensor& x) { return x * c + row - one * x; }},
      {"constant_left", [=](const at::Tensor& x) { return c - x + row * (one + x); }},
      {"divided", [=](const at::Tensor& x) { return x / positive + row / (x * x + 1); }},
      {"broadcast", [=](const at::Tensor& x) { return x.select(0, 0) + c * x.select(1, 1); }},
      {"matmul", [=](const at::Tensor& x) { return x.mm(c) + c.mm(x) + x.mm(x); }},
      {"addmm",
       [=](const at::Tensor& x) {
         return row.addmm(x, c) + row.addmm(c, x, 2, 3) + x.addmm(c, x) + x.addmm(c, c);
       }},
      {"mv_dot",
       [=](const at::Tensor& x) {
         return x.mv(row) + c.mv(x.select(0, 0)) + row.dot(x.select(1, 0)) +
                x.select(0, 1).dot(row);
       }},
      {"bmm",
       [=](const at::Tensor& x) {
         return at::bmm(x.unsqueeze(0), c.unsqueeze(0)) + at::bmm(c.unsqueeze(0), x.unsqueeze(0));
       }},
      {"scaled_sum",
       [=](const at::Tensor& x) {
         return x.add(c, 3) + row.add(x, 2) - c.sub(x, 2) + x.sub(row, 3);
       }},
      {"views", [](const at::Tensor& x) { return x.t().slice(0, 1).reshape({-1}).sin(); }},
      {"reductions", [](const at::Tensor& x) { return x.softmax(0).sum(1) + x.logsumexp(0); }},
      {"indexing",
       [=](const at::Tensor& x) {
         return at::cat({x, c}).index_select(0, at::zeros({2}, at::kLong)) +
                at::stack({row, x.select(0, 2)});
       }},
      {"where", [=](const at::Tensor& x) { return at::where(c > 0, x, c) + x.clamp_min(0.1); }},
      {"powers",
       [=](const at::Tensor& x) { return (x * x + 1).pow(c) + x.pow(3) + positive.pow(x); }},
      {"in_place",
       [=](const at::Tensor& x) {
         at::Tensor y = x * 2;
         y.mul_(c).add_(x).select(0, 1).sin_();
         return y;
       }},
      {"fresh_buffer",
       [](const at::Tensor& x) {
         at::Tensor z = at::zeros({3, 3}, at::kDouble);
         z.select(0, 1).copy_(x.select(0, 0));
         return z.sin();
       }},
      {"write_into_view",
       [=](const at::Tensor& x) {
         at::Tensor y = x.clone();
         y.t().select(0, 0).mul_(row);
         return y * y;
       }},
      {"constant_overwritten",
       [=](const at::Tensor& x) {
         at::Tensor y = c.clone();
         y.mul_(x);
         return y + c;
       }},
  };
}

TEST_F(JvpTest, OperatorsAgainstDifferences) {
  for (const OpCase& op : op_cases()) {
    SCOPED_TRACE(op.name);
    const at::Tensor x = randn({3, 3}) + 0.3, t = randn({3, 3});
    const auto [y, dy] = jvp(op.f, x, t);
    EXPECT_CLOSE(y, op.f(x));
    EXPECT_TRUE(at::allclose(dy, difference(op.f, x, t), 1e-5, 1e-7)) << dy;
  }
}

// Every composition of two and of three of these.
struct Transform {
  const char* name;
  std::function<Function(Function)> apply;  // functions [3, 3] -> anything to [3, 3] -> [...]
};

std::vector<Transform> transforms() {
  const at::Tensor t = randn({3, 3});
  return {
      {"jvp",
       [=](Function f) -> Function {
         return [=](const at::Tensor& x) { return tangent_of(f, x, t); };
       }},
      {"grad",
       [](Function f) -> Function {
         return grad([=](const at::Tensor& x) { return f(x).sin().sum(); });
       }},
      {"vmap",
       [](Function f) -> Function {
         return [=](const at::Tensor& x) {
           return vmap([&](const at::Tensor& s) { return f(x * s); })(
               at::ones({2}, at::kDouble).cumsum(0));
         };
       }},
  };
}

// An exception keeps the trace that says where.
void check_tangent(const Function& f, const at::Tensor& x, const at::Tensor& t, double tolerance) {
  try {
    EXPECT_TRUE(at::allclose(tangent_of(f, x, t), difference(f, x, t), tolerance, tolerance / 10));
  } catch (const std::exception& error) {
    ADD_FAILURE() << error.what();
  }
}

TEST_F(JvpTest, CompositionsOfTwoAndThreeAgainstDifferences) {
  const at::Tensor x = randn({3, 3}) + 0.3, t = randn({3, 3});
  const auto all = transforms();
  for (const OpCase& op : op_cases()) {
    // Writing into a plain tensor is not possible under vmap or in a nested jvp.
    const std::string name = op.name;
    if (name == "fresh_buffer" || name == "constant_overwritten") continue;
    for (const Transform& inner : all) {
      const Function once = inner.apply(op.f);
      SCOPED_TRACE(name + " " + inner.name);
      check_tangent(once, x, t, 1e-4);
      for (const Transform& outer : all) {
        SCOPED_TRACE(outer.name);
        const Function twice = outer.apply(once);
        check_tangent(twice, x, t, 1e-3);
      }
    }
  }
}

// --- nested jvps do not mix ----------------------------------------------------------------------

TEST_F(JvpTest, NestedDerivativesDoNotMix) {
  // d/da of a * d/db (a + b), a * d/db (a b), a * d/db (a b b) at b = a = 2.
  const auto nested = [](const std::function<at::Tensor(const at::Tensor&, const at::Tensor&)>& g) {
    return derivative(
               [&](const at::Tensor& a) {
                 return a * derivative([&](const at::Tensor& b) { return g(a, b); }, a);
               },
               number(2))
        .item<double>();
  };
  EXPECT_DOUBLE_EQ(nested([](const at::Tensor& a, const at::Tensor& b) { return a + b; }), 1);
  EXPECT_DOUBLE_EQ(nested([](const at::Tensor& a, const at::Tensor& b) { return a * b; }), 4);
  EXPECT_DOUBLE_EQ(nested([](const at::Tensor& a, const at::Tensor& b) { return a * b * b; }), 24);
}

TEST_F(JvpTest, HighDerivativesOfAPower) {
  Function f = [](const at::Tensor& x) { return x * x * x * x * x; };
  const double expected[] = {405, 540, 540, 360, 120, 0};
  for (const double value : expected) {
    f = [g = f](const at::Tensor& x) { return derivative(g, x); };
    EXPECT_DOUBLE_EQ(f(number(3)).item<double>(), value);
  }
}

TEST_F(JvpTest, InsideAndOutsideOfTorchsOwnDualLevel) {
  // d/da (a * d/db (a b)) at 2 = 2 a = 4, the outer one by torch's API.
  const auto level = torch::autograd::ForwardADLevel::get_next_idx();
  double got = 0;
  {
    const at::Tensor a = number(2)._fw_primal(0);
    a._set_fw_grad(number(1), 0, false);
    const at::Tensor y = a * derivative([&](const at::Tensor& b) { return a * b; }, a);
    got = y._fw_grad(0).item<double>();
  }
  torch::autograd::ForwardADLevel::release_idx(level);
  EXPECT_DOUBLE_EQ(got, 4);
}

// --- no_grad and detach --------------------------------------------------------------------------

// Functions with constant parts, and the same written with a constant.
TEST_F(JvpTest, NoGradAndDetachMakeConstantsInBothModes) {
  const at::Tensor x = number(2);
  const std::vector<std::pair<std::string, Function>> cases = {
      {"product",
       [](const at::Tensor& a) {
         at::Tensor square;
         {
           const c10::NoGradGuard no_grad;
           square = a * a;
         }
         return a * square;
       }},
      {"view",
       [](const at::Tensor& a) {
         at::Tensor same;
         {
           const c10::NoGradGuard no_grad;
           same = a.view({1});
         }
         return (a * a * same).sum();
       }},
      {"detach", [](const at::Tensor& a) { return a * (a * a).detach(); }},
      {"detached_view", [](const at::Tensor& a) { return a * a.detach().view({1}).sum() * a; }},
      {"in_place",
       [](const at::Tensor& a) {
         at::Tensor y = a * 1;
         {
           const c10::NoGradGuard no_grad;
           y.mul_(3);
         }
         return y * a.detach();
       }},
      {"under_vmap",
       [](const at::Tensor& a) {
         return vmap([&](const at::Tensor& s) {
                  at::Tensor constant;
                  {
                    const c10::NoGradGuard no_grad;
                    constant = a * s;
                  }
                  return constant * a;
                })(at::ones({2}, at::kDouble))
             .sum();
       }},
      {"gradient_inside",
       [](const at::Tensor& a) {
         at::Tensor g;
         {
           const c10::NoGradGuard no_grad;
           g = grad([&](const at::Tensor& b) { return b * b * a; })(a);
         }
         return g * a;
       }},
      {"jvp_inside",
       [](const at::Tensor& a) {
         at::Tensor g;
         {
           const c10::NoGradGuard no_grad;
           g = derivative([&](const at::Tensor& b) { return b * b * a; }, a);
         }
         return g * a;
       }},
      {"engine_inside",
       [](const at::Tensor& a) {
         const at::Tensor b = (a * 1).detach().set_requires_grad(true);
         return a * torch::autograd::grad({b * b * b}, {b})[0];
       }},
  };
  for (const auto& [name, f] : cases) {
    SCOPED_TRACE(name);
    const at::Tensor reverse = grad(f)(x);
    EXPECT_CLOSE(derivative(f, x), reverse);
    // As the inner of two.
    const Function outer = [f = f](const at::Tensor& a) { return derivative(f, a) * a; };
    const Function outer_reverse = [f = f](const at::Tensor& a) { return grad(f)(a) * a; };
    EXPECT_CLOSE(derivative(outer, x), grad(outer_reverse)(x));
  }
}

TEST_F(JvpTest, NoGradAroundItOnlyDisconnects) {
  const at::Tensor w = randn({3}).set_requires_grad(true), x = randn({3}), t = randn({3});
  const c10::AutoGradMode no_grad(false);
  const auto [y, dy] = jvp([&](const at::Tensor& a) { return (a * w).sin(); }, x, t);
  EXPECT_CLOSE(dy, (x * w).cos() * w * t);
  EXPECT_FALSE(y.requires_grad());
  EXPECT_FALSE(dy.requires_grad());
  const at::Tensor hvp =
      tangent_of(grad([&](const at::Tensor& a) { return (a * w).sin().sum(); }), x, t);
  EXPECT_CLOSE(hvp, -(x * w).sin() * w * w * t);
  c10::GradMode::set_enabled(true);
}

// --- what is connected to the outside ------------------------------------------------------------

TEST_F(JvpTest, ReverseOverForwardSeesPrimalsTangentsAndWeights) {
  const at::Tensor w = randn({3}).set_requires_grad(true);
  const at::Tensor x = randn({3}).set_requires_grad(true), t = randn({3}).set_requires_grad(true);
  const auto f = [&](const at::Tensor& a) { return (a * a * w).sin(); };
  const at::Tensor dy = tangent_of(f, x, t);
  const at::Tensor by_hand = (x * x * w).cos() * 2 * x * w * t;
  const auto got = torch::autograd::grad({dy.sum()}, {w, x, t});
  const auto expected = torch::autograd::grad({by_hand.sum()}, {w, x, t});
  for (size_t i = 0; i < 3; ++i) EXPECT_CLOSE(got[i], expected[i]);
}

TEST_F(JvpTest, TheTangentOfAGradientIsConnectedToTheTangent) {
  // H t, differentiated by t alone: H is symmetric.
  const at::Tensor x = randn({3}), t = randn({3}).set_requires_grad(true), u = randn({3});
  const auto energy = [](const at::Tensor& a) { return (a * a).sum().sin(); };
  const at::Tensor product = tangent_of(grad(energy), x, t);
  ASSERT_TRUE(product.requires_grad());
  EXPECT_CLOSE(torch::autograd::grad({product.dot(u)}, {t})[0], tangent_of(grad(energy), x, u));
}

TEST_F(JvpTest, UnderVmapOverTangentsPrimalsAndBoth) {
  const at::Tensor xs = randn({4, 3}), ts = randn({4, 3}), w = randn({3, 3});
  const auto f = [&](const at::Tensor& x) { return w.mv(x).tanh() * x; };
  const auto push = [&](const at::Tensor& x, const at::Tensor& t) { return tangent_of(f, x, t); };
  for (const bool batch_x : {true, false}) {
    for (const bool batch_t : {true, false}) {
      if (!batch_x && !batch_t) continue;
      const at::Tensor x = batch_x ? xs : xs[0], t = batch_t ? ts : ts[0];
      const at::Tensor got = vmap(push, {.in_dims = in(batch_x ? Dims(0) : Dims(kNone),
                                                       batch_t ? Dims(0) : Dims(kNone))})(x, t);
      for (int64_t i = 0; i < 4; ++i) {
        EXPECT_CLOSE(got[i], difference(f, batch_x ? x[i] : x, batch_t ? t[i] : t));
      }
    }
  }
}

TEST_F(JvpTest, OfABatchOfNoneInAnyDim) {
  const auto push = [](const at::Tensor& x, const at::Tensor& t) {
    const at::Tensor column = x.select(-1, 0);
    return tangent_of([&](const at::Tensor& y) { return y * column; }, x, t);
  };
  for (const int64_t dim : {0, 1, 2}) {
    std::vector<int64_t> sizes{5, 5};
    sizes.insert(sizes.begin() + dim, 0);
    const at::Tensor x = randn(sizes);
    const at::Tensor got = vmap(push, {.in_dims = in(Dims(dim), Dims(dim))})(x, x);
    EXPECT_EQ(got.sizes(), at::IntArrayRef({0, 5, 5}));
  }
}

// --- outputs -------------------------------------------------------------------------------------

TEST_F(JvpTest, OutputsThatDoNotDependOnThePrimals) {
  const at::Tensor x = randn({3}), c = randn({2});
  EXPECT_CLOSE(tangent_of([&](const at::Tensor&) { return c; }, x, x), at::zeros_like(c));
  const auto [y, dy] = jvp([&](const at::Tensor& a) { return a > 0; }, x, x);
  EXPECT_EQ(dy.scalar_type(), at::kBool);
  EXPECT_FALSE(dy.any().item<bool>());
  EXPECT_THAT(
      error_of([&] { jvp([&](const at::Tensor&) { return c; }, x, x, {.strict = true}); }),
      HasSubstr("strict: output 0 of the function (shape [2]) does not depend on any primal"));
}

TEST_F(JvpTest, AnIdentityReturnsItsArguments) {
  const at::Tensor x = randn({3}), t = randn({3});
  const auto [y, dy] = jvp([](const at::Tensor& a) { return a; }, x, t);
  EXPECT_CLOSE(y, x);
  EXPECT_CLOSE(dy, t);
  EXPECT_FALSE(y._fw_grad(0).defined());
}

TEST_F(JvpTest, TangentsAreNotWritten) {
  const at::Tensor x = randn({3}), t = randn({3}), before = t.clone();
  jvp([](const at::Tensor& a) { return a.mul_(2); }, x, t);
  EXPECT_CLOSE(t, before);
}

TEST_F(JvpTest, ComplexPrimals) {
  const at::Tensor z = at::randn({3}, at::kComplexDouble), t = at::randn({3}, at::kComplexDouble);
  EXPECT_CLOSE(tangent_of([](const at::Tensor& a) { return a * a; }, z, t), z * t * 2);
}

// --- errors, exceptions, threads -----------------------------------------------------------------

TEST_F(JvpTest, BadInputs) {
  const at::Tensor x = randn({3});
  const auto f = [](const at::Tensor& a) { return a.sin(); };
  EXPECT_THAT(error_of([&] { jvp(f, x, randn({2})); }),
              HasSubstr("the tangent of argument 0 has shape [2], but the primal has shape [3]"));
  EXPECT_THAT(error_of([&] { jvp(f, x, at::ones({3})); }),
              HasSubstr("has dtype Float, but the primal has dtype Double. Convert it, as in "
                        "tangent.to(primal.scalar_type())"));
  EXPECT_THAT(error_of([&] { jvp(f, at::ones({3}, at::kLong), at::ones({3}, at::kLong)); }),
              HasSubstr("only floating-point and complex tensors can be differentiated"));
  EXPECT_THAT(error_of([&] {
                jvp([](const std::vector<at::Tensor>& v) { return v[0]; }, std::vector{x},
                    std::vector{x, x});
              }),
              HasSubstr("the tangents must have the structure of the primals, but do not: at "
                        "[0]: expected 1 elements, got 2"));
  EXPECT_THAT(error_of([&] { jvp([](double a) { return a; }, 1.0, 1.0); }),
              HasSubstr("argument 0 has no tensor"));
}

TEST_F(JvpTest, AnExceptionLeavesNothingBehind) {
  const at::Tensor x = randn({3});
  const Function thrower = [](const at::Tensor&) -> at::Tensor { throw std::runtime_error("no"); };
  EXPECT_THROW(derivative(thrower, x), std::runtime_error);
  EXPECT_THROW(derivative([&](const at::Tensor& a) { return derivative(thrower, a); }, x),
               std::runtime_error);
}

TEST_F(JvpTest, ATensorThatEscapesHasNoTangent) {
  at::Tensor escaped;
  const at::Tensor x = randn({3});
  derivative([&](const at::Tensor& a) { return escaped = a.sin(); }, x);
  EXPECT_FALSE(escaped._fw_grad(0).defined());
  EXPECT_CLOSE(derivative([&](const at::Tensor& a) { return a * escaped; }, x), x.sin());
  derivative(
      [&](const at::Tensor& a) {
        return derivative([&](const at::Tensor& b) { return escaped = b.sin(); }, a);
      },
      x);
  EXPECT_THAT(error_of([&] { (void)escaped.sin(); }), HasSubstr("A tensor of jvp level 1"));
}

TEST_F(JvpTest, ManyThreads) {
  const at::Tensor x = randn({50});
  const auto f = [](const at::Tensor& a) { return (a.sin() * a).exp(); };
  const Function second = [&](const at::Tensor& a) { return derivative(f, a); };
  const at::Tensor first_expected = derivative(f, x), second_expected = derivative(second, x);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < 50; ++round) {
        if (!at::allclose(derivative(f, x), first_expected)) ++wrong[i];
        if (!at::allclose(derivative(second, x), second_expected)) ++wrong[i];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, ::testing::Each(0));
}

}  // namespace
}  // namespace torchlift
