// Formulas of reverse mode that libtorch has wrong: each against finite differences, by itself,
// under and over grad, jvp and vmap.

#include "autodiff/reverse_formulas.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_batch_norm_with_update.h>
#include <ATen/ops/_native_batch_norm_legit.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cholesky_inverse.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/index_reduce.h>
#include <ATen/ops/native_batch_norm.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/scatter_reduce.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cctype>
#include <functional>
#include <optional>
#include <ostream>
#include <string>
#include <tuple>
#include <vector>

#include "autodiff/checkpoint.h"
#include "autodiff/grad.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

using at::Tensor;
using Function = std::function<Tensor(const Tensor&)>;

struct Case {
  std::string name;
  Function f;
  Tensor x;
};

std::ostream& operator<<(std::ostream& out, const Case& c) { return out << c.name; }

Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

Tensor with_a_zero(at::IntArrayRef sizes) {
  Tensor x = randn(sizes);
  x.flatten()[-2].zero_();
  return x;
}

// A number that depends on all that a normalization returns.
template <class Results>
Tensor loss_of(const Results& results) {
  const auto& [output, mean, rstd] = results;
  return (output.sin() * mean.sum()).sum() + (mean * rstd).exp().sum() + (rstd * rstd).sum();
}

std::vector<Case> cases() {
  std::vector<Case> cases;
  for (const bool upper : {false, true}) {
    const std::string name = upper ? " (upper)" : " (lower)";
    const auto inverse = [=](const Tensor& x) {
      // Not triangular: the other triangle is not read.
      return at::cholesky_inverse(x * 0.3 + at::eye(3, x.options()) * 2, upper);
    };
    cases.push_back({"cholesky_inverse" + name, inverse, randn({3, 3})});
    cases.push_back({"cholesky_inverse, batch" + name, inverse, randn({2, 3, 3})});
  }
  const Tensor weight = at::rand({3}, at::kDouble) + 0.5, bias = randn({3});
  // In the function, since each example has statistics of its own.
  const auto mean = [](const Tensor& x) { return x.new_zeros({3}); };
  const auto variance = [](const Tensor& x) { return x.new_ones({3}); };
  cases.push_back({"native_batch_norm",
                   [=](const Tensor& x) {
                     return loss_of(at::native_batch_norm(x, weight, bias, mean(x), variance(x),
                                                          true, 0.1, 1e-2));
                   },
                   randn({4, 3, 2})});
  cases.push_back({"native_batch_norm without running statistics",
                   [](const Tensor& x) {
                     return loss_of(at::native_batch_norm(x, {}, {}, {}, {}, true, 0.1, 1e-2));
                   },
                   randn({4, 3})});
  cases.push_back({"_native_batch_norm_legit",
                   [=](const Tensor& x) {
                     Tensor m = mean(x), v = variance(x);
                     return loss_of(
                         at::_native_batch_norm_legit(x, weight, bias, m, v, true, 0.1, 1e-2));
                   },
                   randn({4, 3, 2})});
  cases.push_back({"_native_batch_norm_legit without running statistics",
                   [=](const Tensor& x) {
                     return loss_of(at::_native_batch_norm_legit(x, weight, bias, true, 0.1, 1e-2));
                   },
                   randn({4, 3, 2, 2})});
  cases.push_back({"_batch_norm_with_update",
                   [=](const Tensor& x) {
                     Tensor m = mean(x), v = variance(x);
                     const auto [output, saved_mean, rstd, reserve] =
                         at::_batch_norm_with_update(x, weight, bias, m, v, 0.1, 1e-2);
                     return loss_of(std::tuple(output, saved_mean, rstd));
                   },
                   randn({4, 3, 2})});
  cases.push_back(
      {"native_layer_norm",
       [=](const Tensor& x) { return loss_of(at::native_layer_norm(x, {3}, weight, bias, 1e-2)); },
       randn({4, 3})});
  cases.push_back({"the mean alone",
                   [](const Tensor& x) {
                     return std::get<1>(at::native_layer_norm(x, {2, 3}, {}, {}, 1e-2)).exp();
                   },
                   randn({2, 2, 3})});
  const Tensor places = at::tensor({0, 2, 2, 0}, at::kLong);
  const Tensor rows = at::tensor({0, 1, 0, 2, 1, 1}, at::kLong).view({2, 3});
  for (const bool include_self : {true, false}) {
    const std::string name = include_self ? "" : " (without self)";
    // The start of x is reduced into by its end.
    cases.push_back({"index_reduce" + name,
                     [=](const Tensor& x) {
                       return at::index_reduce(x.slice(1, 0, 3), 1, places, x.slice(1, 1, 5),
                                               "prod", include_self);
                     },
                     with_a_zero({2, 5})});
    cases.push_back({"scatter_reduce" + name,
                     [=](const Tensor& x) {
                       return at::scatter_reduce(x.slice(0, 0, 3), 0, rows, x.slice(0, 2, 4),
                                                 "prod", include_self);
                     },
                     with_a_zero({4, 3})});
  }
  return cases;
}

Tensor difference(const Function& f, const Tensor& x, const Tensor& t) {
  constexpr double kStep = 1e-6;
  return (f(x + t * kStep) - f(x - t * kStep)) / (2 * kStep);
}

// The gradient of <c, f>, number by number.
Tensor slopes(const Function& f, const Tensor& x, const Tensor& c) {
  std::vector<double> found;
  const Tensor units = at::eye(x.numel(), at::kDouble);
  for (const Tensor& unit : units.unbind()) {
    const Tensor t = unit.reshape(x.sizes());
    found.push_back((difference(f, x, t) * c).sum().item<double>());
  }
  return at::tensor(found, at::kDouble).reshape(x.sizes());
}

void expect_close(const Tensor& got, const Tensor& expected) {
  ASSERT_EQ(got.sizes(), expected.sizes());
  EXPECT_TRUE(at::allclose(got, expected, 1e-4, 1e-5)) << got << expected;
}

void check_gradient(const Function& f, const Tensor& x) {
  const Tensor c = randn(f(x).sizes());
  expect_close(vjp(f, x).second(c), slopes(f, x, c));
}

class ReverseFormulas : public ::testing::TestWithParam<Case> {};

TEST_P(ReverseFormulas, Gradient) { check_gradient(GetParam().f, GetParam().x); }

// The gradient of <c, f> as a function of x.
Function gradient_of(const Function& f, const Tensor& c) {
  return [=](const Tensor& x) { return vjp(f, x).second(c); };
}

TEST_P(ReverseFormulas, GradientOfTheGradient) {
  const Case& p = GetParam();
  check_gradient(gradient_of(p.f, randn(p.f(p.x).sizes())), p.x);
}

TEST_P(ReverseFormulas, TangentOfTheGradient) {
  const Case& p = GetParam();
  const Function gradient = gradient_of(p.f, randn(p.f(p.x).sizes()));
  const Tensor t = randn(p.x.sizes());
  const auto [value, tangent] = jvp(gradient, p.x, t);
  expect_close(value, gradient(p.x));
  expect_close(tangent, difference(gradient, p.x, t));
}

TEST_P(ReverseFormulas, GradientOfATangent) {
  const Case& p = GetParam();
  const Tensor t = randn(p.x.sizes());
  check_gradient([&](const Tensor& x) { return jvp(p.f, x, t).second; }, p.x);
}

// Batches of one and three.
TEST_P(ReverseFormulas, UnderVmap) {
  const Case& p = GetParam();
  const Function gradient = gradient_of(p.f, randn(p.f(p.x).sizes()));
  const Tensor second = randn(p.x.sizes());
  const Function twice = gradient_of(gradient, second);
  for (const int64_t size : {1, 3}) {
    std::vector<at::IntArrayRef::value_type> sizes = {size};
    sizes.insert(sizes.end(), p.x.sizes().begin(), p.x.sizes().end());
    const Tensor xs = randn(sizes);
    for (const Function& f : {gradient, twice}) {
      const Tensor got = vmap(f)(xs);
      for (int64_t i = 0; i < size; ++i) expect_close(got[i], f(xs[i]));
    }
  }
}

TEST_P(ReverseFormulas, OverVmap) {
  const Case& p = GetParam();
  check_gradient(
      [&](const Tensor& x) {
        return vmap([&](const Tensor& s) { return p.f(x * s); })(
            at::arange(1, 3, at::kDouble) * 0.5 + 0.3);
      },
      p.x);
}

TEST_P(ReverseFormulas, OverVmapOfTheGradient) {
  const Case& p = GetParam();
  const Function gradient = gradient_of(p.f, randn(p.f(p.x).sizes()));
  check_gradient(
      [&](const Tensor& x) {
        return vmap([&](const Tensor& s) { return gradient(x * s); })(
            at::arange(1, 3, at::kDouble) * 0.5 + 0.3);
      },
      p.x);
}

TEST_P(ReverseFormulas, InACheckpoint) {
  const Case& p = GetParam();
  check_gradient([&](const Tensor& x) { return checkpoint(p.f, x); }, p.x);
}

std::string name_of(const ::testing::TestParamInfo<Case>& info) {
  std::string name;
  for (const char c : info.param.name) name += std::isalnum(c) != 0 ? c : '_';
  return name;
}

INSTANTIATE_TEST_SUITE_P(All, ReverseFormulas, ::testing::ValuesIn(cases()), name_of);

// Outside of transforms everything is as libtorch has it.
TEST(ReverseFormulasOfPlainCode, AreThoseOfLibtorch) {
  const Function f = [](const Tensor& x) { return at::cholesky_inverse(x).sum(); };
  grad(f)(at::eye(2, at::kDouble));
  const Tensor x = randn({4, 3}).set_requires_grad(true);
  const auto [output, mean, rstd] = at::native_batch_norm(x, {}, {}, {}, {}, true, 0.1, 1e-2);
  EXPECT_TRUE(output.requires_grad());
  EXPECT_FALSE(mean.requires_grad());
  EXPECT_FALSE(rstd.requires_grad());
  EXPECT_FALSE(reverse_formulas_open());
}

TEST(ReverseFormulasOfPlainCode, AfterAnError) {
  const auto fails = [](const Tensor& x) -> Tensor {
    TORCH_CHECK(false, "no");
    return x;
  };
  EXPECT_ANY_THROW(grad(fails)(at::ones({})));
  EXPECT_FALSE(reverse_formulas_open());
}

// Statistics of low precision are kept in a higher one.
TEST(ReverseFormulasOfHalfPrecision, Statistics) {
  const Tensor x = randn({4, 6});
  const Function loss = [](const Tensor& y) {
    const auto [output, mean, rstd] = at::native_layer_norm(y, {6}, {}, {}, 1e-2);
    return (output * output).sum().to(at::kFloat) + (mean * rstd).sum().to(at::kFloat);
  };
  const Tensor got = grad(loss)(x.to(at::kBFloat16));
  EXPECT_EQ(got.scalar_type(), at::kBFloat16);
  EXPECT_TRUE(at::allclose(got.to(at::kFloat), grad(loss)(x.to(at::kFloat)), 5e-2, 5e-2)) << got;
}

// A gradient has a formula, and its own derivative none.
TEST(Products, OfSeveralZeros) {
  const Tensor index = at::tensor({0, 1, 1}, at::kLong),
               factors = at::tensor({2.0, 0.0, 0.0}, at::kDouble);
  const Function f = [=](const Tensor& src) {
    return at::scatter_reduce(at::ones({2}, at::kDouble), 0, index, src, "prod").sum();
  };
  expect_close(grad(f)(factors), at::tensor({1.0, 0.0, 0.0}, at::kDouble));
  const auto message = [&](const Function& g, const Tensor& x) -> std::string {
    try {
      g(x);
    } catch (const c10::Error& error) {
      return error.what_without_backtrace();
    }
    return "no error";
  };
  const Function second = grad([=](const Tensor& src) { return grad(f)(src).sum(); });
  EXPECT_NE(message(second, factors).find("Double backward is unsupported"), std::string::npos);
  const Tensor batch = at::stack({factors + 1, factors});
  EXPECT_NE(message(vmap(second), batch).find("Double backward is unsupported"), std::string::npos);
  expect_close(vmap(second)(batch + 1), at::stack({second(factors + 2), second(factors + 1)}));
}

TEST(Products, InPlace) {
  const Tensor index = at::tensor({0, 1, 1}, at::kLong);
  for (const bool scatter : {false, true}) {
    const Function in_place = [=](const Tensor& x) {
      Tensor y = x.slice(0, 0, 2).sin();
      return (scatter ? y.scatter_reduce_(0, index, x, "prod")
                      : y.index_reduce_(0, index, x, "prod"))
          .sin();
    };
    const Function out_of_place = [=](const Tensor& x) {
      const Tensor y = x.slice(0, 0, 2).sin();
      return (scatter ? y.scatter_reduce(0, index, x, "prod") : y.index_reduce(0, index, x, "prod"))
          .sin();
    };
    const Tensor x = with_a_zero({3}), c = randn({2});
    expect_close(vjp(in_place, x).second(c), vjp(out_of_place, x).second(c));
    expect_close(vmap(gradient_of(in_place, c))(x.unsqueeze(0))[0], vjp(in_place, x).second(c));
    check_gradient(gradient_of(in_place, c), x);
  }
}

// x[mask] = v, with a mask for each example, against where.
TEST(PutsByMask, GradientsOfBoth) {
  const Tensor x = randn({3, 4, 2}), v = randn({3, 2});
  const Tensor masks = (at::arange(12).remainder(5) < 2).view({3, 4});
  const auto cube = [](const Tensor& y) { return (y * y * y).sum(); };
  for (const bool accumulate : {false, true}) {
    for (const bool in_place : {false, true}) {
      const auto put = [=](const Tensor& x, const Tensor& v, const Tensor& mask) {
        const c10::List<std::optional<Tensor>> places({std::optional<Tensor>(mask)});
        Tensor y = x.sin();
        y = in_place ? y.index_put_(places, v * v, accumulate)
                     : y.index_put(places, v * v, accumulate);
        return cube(y);
      };
      const auto chosen = [=](const Tensor& x, const Tensor& v, const Tensor& mask) {
        const Tensor y = x.sin();
        return cube(at::where(mask.unsqueeze(-1), accumulate ? y + v * v : v * v, y));
      };
      const auto [x_got, v_got] = vmap(grad<0, 1>(put))(x, v, masks);
      const auto [x_expected, v_expected] = vmap(grad<0, 1>(chosen))(x, v, masks);
      EXPECT_TRUE(at::allclose(x_got, x_expected)) << accumulate << in_place;
      EXPECT_TRUE(at::allclose(v_got, v_expected)) << accumulate << in_place;
      const auto second = [](const auto& f) {
        return vmap(grad<1>([f](const Tensor& x, const Tensor& v, const Tensor& mask) {
          return grad<1>(f)(x, v, mask).sin().sum();
        }));
      };
      EXPECT_TRUE(at::allclose(second(put)(x, v, masks), second(chosen)(x, v, masks)));
    }
  }
}

}  // namespace
}  // namespace torchlift
