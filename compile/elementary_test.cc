#include "compile/elementary.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/imag.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <ostream>
#include <string>
#include <vector>

namespace torchlift::compile {
namespace {

using torch::jit::Stack;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return x * 0.5 * std::erfc(-x * std::sqrt(0.5)); }

struct Case {
  std::string name;
  double (*exact)(double);
  double ulps;              // how much results may be off
  double absolute = 0;      // or by this
  double times_x = 0;       // or by this, of |x|
  double largest = 3.5e38;  // magnitude that is looked at
};

std::ostream& operator<<(std::ostream& out, const Case& each) { return out << each.name; }

class Elementary : public testing::Test {
 protected:
  void SetUp() override {
    if (elementary_function("aten::exp") == nullptr) GTEST_SKIP() << "no vectors of this kind";
  }
};
class ElementaryFunctions : public Elementary, public testing::WithParamInterface<Case> {};

std::vector<float> values_of(const std::string& name, const std::vector<float>& x) {
  const ElementaryFunction* function = elementary_function("aten::" + name);
  std::vector<float> y(x.size());
  const auto size = static_cast<int64_t>(x.size());
  Stack stack{at::from_blob(const_cast<float*>(x.data()), {size})};
  if (name == "gelu") stack.emplace_back("none");
  EXPECT_TRUE(function->serves(stack));
  function->write(stack, at::from_blob(y.data(), {size}));
  return y;
}

// By each kernel that this processor can run.
std::vector<std::vector<float>> values_by_each(const std::string& name,
                                               const std::vector<float>& x) {
  std::vector<std::vector<float>> all;
  for (const auto kernel : elementary_function("aten::" + name)->kernels()) {
    const float* const input = x.data();
    all.emplace_back(x.size());
    kernel(&input, all.back().data(), static_cast<int64_t>(x.size()));
  }
  return all;
}

// Every 1021st float of both signs, zeros, infinities and NaN among them.
std::vector<float> floats_of_all_magnitudes() {
  std::vector<float> all{0.0F, -0.0F, INFINITY, -INFINITY, NAN};
  for (uint64_t bits = 0; bits < (uint64_t{1} << 32); bits += 1021) {
    all.push_back(std::bit_cast<float>(static_cast<uint32_t>(bits)));
  }
  return all;
}

double ulp_of(double x) {
  const double least = std::numeric_limits<float>::denorm_min();
  if (x == 0 || !std::isfinite(x)) return least;
  return std::max(std::ldexp(1.0, std::ilogb(x) - 23), least);
}

bool is_right(const Case& each, float x, float y) {
  const double exact = each.exact(x);
  const auto nearest = static_cast<float>(exact);
  if (std::isnan(exact)) return std::isnan(y);
  if (std::isinf(nearest)) {
    return y == nearest || (std::signbit(y) == std::signbit(nearest) && std::fabs(y) > 3.4028e38F);
  }
  if (std::isinf(y)) return std::fabs(exact) > 3.4028e38;
  if (exact == 0) return y == 0 && std::signbit(y) == std::signbit(exact);
  const double error = std::fabs(y - exact);
  return error <= each.ulps * ulp_of(exact) || error <= each.absolute ||
         error <= each.times_x * std::fabs(x);
}

TEST_P(ElementaryFunctions, AreExactToTheLastBits) {
  const Case& each = GetParam();
  std::vector<float> x = floats_of_all_magnitudes();
  std::erase_if(x, [&](float t) { return std::fabs(t) > each.largest; });
  for (const std::vector<float>& y : values_by_each(each.name, x)) {
    size_t wrong = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      if (is_right(each, x[i], y[i])) continue;
      if (++wrong < 10) ADD_FAILURE() << each.name << " of " << x[i] << " is " << y[i];
    }
    EXPECT_EQ(wrong, 0);
  }
}

TEST_P(ElementaryFunctions, TakeAnyNumberOfElements) {
  for (const size_t count : {0, 1, 3, 15, 16, 17, 31, 63, 100}) {
    std::vector<float> x(count);
    for (size_t i = 0; i < count; ++i) x[i] = 0.3F + 0.01F * static_cast<float>(i);
    std::vector<std::vector<float>> all = values_by_each(GetParam().name, x);
    all.push_back(values_of(GetParam().name, x));
    for (const std::vector<float>& y : all) {
      for (size_t i = 0; i < count; ++i) {
        EXPECT_TRUE(is_right(GetParam(), x[i], y[i])) << count << ", " << i;
      }
    }
  }
}

constexpr double kLeast = 0x1p-126;  // where 1 + exp(-x) is infinite

INSTANTIATE_TEST_SUITE_P(
    All, ElementaryFunctions,
    testing::Values(Case{"exp", &std::exp, 1.1}, Case{"expm1", &std::expm1, 1.5},
                    Case{"tanh", &std::tanh, 1.5}, Case{"erf", &std::erf, 1.5},
                    Case{"log", &std::log, 1.5}, Case{"sigmoid", &sigmoid, 2.5, kLeast},
                    Case{.name = "silu", .exact = &silu, .ulps = 3, .absolute = 100 * kLeast},
                    Case{.name = "gelu", .exact = &gelu, .ulps = 2, .times_x = 0x1p-23},
                    Case{"sin", &std::sin, 1.6, 0x1p-48}, Case{"cos", &std::cos, 1.6, 0x1p-48}),
    [](const auto& info) { return info.param.name; });

// Against libtorch's kernel in double.
TEST_F(Elementary, TheGradientOfGelu) {
  const at::Tensor g = at::randn({1000}), x = at::randn({1000}).mul(3);
  // Beyond 14 it is g, or nothing.
  x.slice(0, 0, 100).mul_(10);
  x.slice(0, 100, 120).mul_(1e37);
  const ElementaryFunction* function = elementary_function("aten::gelu_backward");
  const Stack stack{g, x, "none"};
  ASSERT_TRUE(function->serves(stack));
  const at::Tensor out = at::empty_like(x);
  function->write(stack, out);
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("aten::gelu_backward", "");
  Stack exact{g.to(at::kDouble), x.to(at::kDouble), "none"};
  op.callBoxed(exact);
  const at::Tensor error = exact[0].toTensor().sub(out).abs();
  EXPECT_LE(error.div(x.abs().clamp_max(14).add(1).mul(g.abs())).max().item<double>(), 3 * 0x1p-24);
}

TEST_F(Elementary, WriteOverTheirArgument) {
  const at::Tensor x = at::randn({5, 7}), expected = x.to(at::kDouble).tanh();
  elementary_function("aten::tanh")->write({x}, x);
  EXPECT_TRUE(x.allclose(expected.to(at::kFloat), 1e-6, 1e-7));
}

TEST_F(Elementary, ServeDenseFloatsOnly) {
  const ElementaryFunction* tanh = elementary_function("aten::tanh");
  const at::Tensor x = at::randn({6, 4});
  EXPECT_TRUE(tanh->serves({x}));
  EXPECT_TRUE(tanh->serves({x.t()}));
  EXPECT_FALSE(tanh->serves({x.slice(1, 0, 3)}));
  EXPECT_FALSE(tanh->serves({x.to(at::kDouble)}));
  EXPECT_FALSE(tanh->serves({x.to(at::kComplexFloat)}));
  EXPECT_FALSE(tanh->serves({x.to(at::kMeta)}));
  EXPECT_FALSE(tanh->serves({x.to_sparse()}));
  EXPECT_FALSE(tanh->serves({at::randn({3}).requires_grad_()}));
  EXPECT_FALSE(
      tanh->serves({at::imag(at::randn({3}, at::kComplexFloat).conj())}));  // a negative one
  const ElementaryFunction* backward = elementary_function("aten::gelu_backward");
  EXPECT_FALSE(backward->serves({x, x.t().contiguous().t(), "none"}));
  EXPECT_FALSE(backward->serves({x, x.slice(0, 0, 1), "none"}));
  EXPECT_FALSE(backward->serves({x, x, "tanh"}));
  EXPECT_FALSE(elementary_function("aten::gelu")->serves({x, "tanh"}));
}

TEST_F(Elementary, OthersHaveNone) {
  EXPECT_EQ(elementary_function("aten::mul"), nullptr);
  EXPECT_EQ(elementary_function("aten::tan"), nullptr);
}

}  // namespace
}  // namespace torchlift::compile
