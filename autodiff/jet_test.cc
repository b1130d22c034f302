#include "autodiff/jet.h"

#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/lgamma.h>
#include <ATen/ops/linalg_inv.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jet_rules.h"
#include "autodiff/jvp.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using Fn = std::function<Tensor(const Tensor&)>;

constexpr auto kDouble = at::kDouble;

Tensor random(at::IntArrayRef sizes) { return at::randn(sizes, kDouble); }

// x + s_1 t + s_2 t^2 / 2 + ...
Tensor curve(const Tensor& x, const Tensor& series, const Tensor& t) {
  Tensor sum = at::zeros(x.sizes(), kDouble);
  for (int64_t j = series.size(0); j > 0; --j) {
    sum = (sum + series[j - 1] / std::tgamma(static_cast<double>(j) + 1)) * t;
  }
  return x + sum;
}

// The derivatives of f along the curve, by a nest of jvps.
Tensor nested(const Fn& f, const Tensor& x, const Tensor& series) {
  Fn along = [=](const Tensor& t) { return f(curve(x, series, t)); };
  std::vector<Tensor> derivatives;
  const Tensor zero = at::zeros({}, kDouble);
  for (int64_t j = 0; j < series.size(0); ++j) {
    along = [inner = along](const Tensor& t) { return jvp(inner, t, at::ones_like(t)).second; };
    derivatives.push_back(along(zero));
  }
  return at::stack(derivatives);
}

void check(const Fn& f, const Tensor& x, int64_t order) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.insert(sizes.begin(), order);
  const Tensor series = random(sizes) * 0.5;
  const auto [value, derivatives] = jet(f, x, series);
  EXPECT_CLOSE(value, f(x));
  EXPECT_CLOSE(derivatives, nested(f, x, series));
}

Tensor mixture(const Tensor& x) {
  const Tensor y = x.tanh() * x.prod() + at::softmax(x * x, 0) + at::lgamma(x.exp() + 1);
  return y.clamp_min(0.3) + x.cumsum(0).sin() / (x * x + 1);
}

struct Params {
  Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

Fn jet_of(const Fn& f) {
  return [f](const Tensor& x) {
    auto [value, series] = jet(f, x, at::stack({x.cos(), x * x}));
    return value + series.sum(0);
  };
}

Fn nest_of(const Fn& f) {
  return [f](const Tensor& x) { return f(x) + nested(f, x, at::stack({x.cos(), x * x})).sum(0); };
}

Fn grad_of(const Fn& f) {
  return grad([f](const Tensor& x) { return f(x).sum(); });
}

class JetTest : public ::testing::Test {
 protected:
  JetTest() { at::manual_seed(0); }
};

TEST_F(JetTest, KnownSeries) {
  const Tensor x = at::zeros({}, kDouble);
  Tensor v = at::zeros({5}, kDouble);
  v[0] = 1;
  const auto [value, series] = jet([](const Tensor& t) { return t.sin(); }, x, v);
  EXPECT_EQ(value.item<double>(), 0);
  EXPECT_CLOSE(series,
               at::cat({at::eye(1, kDouble)[0], at::zeros({1}, kDouble), -at::ones({1}, kDouble),
                        at::zeros({1}, kDouble), at::ones({1}, kDouble)}));
}

TEST_F(JetTest, AgreesWithNestedJvps) {
  for (int64_t order = 1; order <= 4; ++order) check(mixture, random({3}), order);
  const Tensor w = random({3, 3});
  check([=](const Tensor& x) { return at::layer_norm((x.matmul(w)).tanh(), {3}).matmul(x.t()); },
        random({2, 3}), 3);
  check([](const Tensor& x) { return at::linalg_inv(x.matmul(x.t()) + at::eye(3, kDouble)); },
        random({3, 3}), 3);
}

TEST_F(JetTest, OrderZeroIsTheValue) {
  const Tensor x = random({3});
  const auto [value, series] = jet(mixture, x, at::zeros({0, 3}, kDouble));
  EXPECT_CLOSE(value, mixture(x));
  EXPECT_EQ(series.sizes(), (at::IntArrayRef{0, 3}));
}

// Nested jvps cannot write into a tensor that was made without looking at an argument.
TEST_F(JetTest, InPlace) {
  const auto writes = [](const Tensor& x) {
    Tensor z = at::zeros({4}, kDouble);
    z.narrow(0, 0, 3).copy_(x);
    z[3] = x[0] * x[1];
    z.narrow(0, 1, 2).mul_(x[2]).exp_();
    return at::ones({4}, kDouble).mul_(z).mul_(z);
  };
  const auto functional = [](const Tensor& x) {
    const Tensor ends = at::stack({x[0], x[0] * x[1]}), middle = (x.narrow(0, 1, 2) * x[2]).exp();
    const Tensor z = at::cat({ends.narrow(0, 0, 1), middle, ends.narrow(0, 1, 1)});
    return z * z;
  };
  const Tensor x = random({3}), series = random({3, 3});
  EXPECT_CLOSE(jet(writes, x, series).second, nested(functional, x, series));
  const auto pulled = jet(grad_of(writes), x, series).second;
  EXPECT_CLOSE(pulled, nested(grad_of(functional), x, series));
}

TEST_F(JetTest, TreesAndConstants) {
  const Params params{random({3, 3}), random({3})};
  const Params series{random({2, 3, 3}), Tensor()};
  const Tensor x = random({3});
  const auto f = [](const Params& p, const Tensor& x) {
    return std::pair(p.w.matmul(x) + p.b, p.b.sum());
  };
  const auto [value, derivatives] = jet(f, std::tuple(params, x), std::tuple(series, Tensor()));
  EXPECT_CLOSE(value.first, params.w.matmul(x) + params.b);
  EXPECT_CLOSE(derivatives.first, series.w.matmul(x));
  EXPECT_CLOSE(derivatives.second, at::zeros({2}, kDouble));
}

TEST_F(JetTest, Aux) {
  const Tensor x = random({3});
  const auto f = [](const Tensor& x) { return std::pair(x * x, std::tuple(x.sin(), 7)); };
  const auto [value, series, aux] = jet(f, kHasAux, x, random({2, 3}));
  EXPECT_CLOSE(value, x * x);
  EXPECT_EQ(series.size(0), 2);
  EXPECT_CLOSE(std::get<0>(aux), x.sin());
  EXPECT_EQ(std::get<1>(aux), 7);
}

TEST_F(JetTest, Nests) {
  const Tensor x = random({3}), xs = random({2, 3});
  check(grad_of(mixture), x, 3);
  check([](const Tensor& x) { return vmap(mixture)(x); }, xs, 3);
  check([](const Tensor& x) { return jvp(mixture, x, x.cos()).second; }, x, 3);
  check(jet_of(mixture), x, 2);
  EXPECT_CLOSE(grad_of(jet_of(mixture))(x), grad_of(nest_of(mixture))(x));
  EXPECT_CLOSE(jvp(jet_of(mixture), x, xs[0]).second, jvp(nest_of(mixture), x, xs[0]).second);
  EXPECT_CLOSE(jet_of(jet_of(mixture))(x), nest_of(nest_of(mixture))(x));
  EXPECT_CLOSE(vmap(jet_of(mixture))(xs),
               at::stack({nest_of(mixture)(xs[0]), nest_of(mixture)(xs[1])}));
  EXPECT_CLOSE(vmap(grad_of(jet_of(mixture)))(xs)[1], grad_of(nest_of(mixture))(xs[1]));
}

// Every row is of an operator that libtorch has.
TEST_F(JetTest, RulesAreOfOperators) {
  for (const jet_internal::JetRule& rule : jet_internal::jet_rules()) {
    const size_t dot = rule.name.find('.');
    const std::string base = rule.name.substr(0, dot);
    const std::string overload = dot == std::string::npos ? "" : rule.name.substr(dot + 1);
    auto& dispatcher = c10::Dispatcher::singleton();
    EXPECT_TRUE(dispatcher.findSchema({base, overload}).has_value() ||
                dispatcher.findSchema({base + "_", overload}).has_value())
        << rule.name;
  }
}

TEST_F(JetTest, Errors) {
  const Tensor x = random({3});
  const auto error = [&](const Tensor& primal, const Tensor& series) {
    return error_of<TransformError>([&] { jet(mixture, primal, series); });
  };
  EXPECT_THAT(error(x, random({3})),
              HasSubstr("[jet] the series of argument 0 has shape [3], but the primal has shape "
                        "[3]. Stack the derivatives of order 1, 2, ..., K in a new first dim"));
  EXPECT_THAT(error(x, at::ones({2, 3}, at::kFloat)), HasSubstr("has dtype Float, but the primal"));
  EXPECT_THAT(error(x, Tensor()), HasSubstr("there is no series, so the order is not known"));
  EXPECT_THAT(error(at::arange(3), at::ones({2, 3})), HasSubstr("tensor of dtype Long"));
  EXPECT_THAT(error(Tensor(), Tensor()), HasSubstr("has no tensor to differentiate"));
  const auto two = [](const Tensor& a, const Tensor& b) { return a * b; };
  EXPECT_THAT(error_of<TransformError>([&] {
                jet(two, std::tuple(x, x), std::tuple(random({2, 3}), random({3, 3})));
              }),
              HasSubstr("the series of argument 1 has 3 derivatives, but the series of argument 0 "
                        "has 2. All series must have the same order"));
  const auto sum = [](const std::vector<Tensor>& all) { return all[0] + all[1]; };
  EXPECT_THAT(error_of<TransformError>([&] {
                jet(sum, std::vector<Tensor>{x, x}, std::vector<Tensor>{random({2, 3})});
              }),
              HasSubstr("the series must have the structure of the primals"));
  EXPECT_THAT(error_of<TransformError>([&] {
                jet([](const Tensor&) { return 3; }, x, random({2, 3}));
              }),
              HasSubstr("the function returned no tensor"));
}

}  // namespace
}  // namespace torchlift
