#include "autodiff/check_grads.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/view_as_complex.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "autodiff/custom_rules.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

Tensor points(at::ScalarType dtype = at::kDouble) { return at::linspace(0.2, 1.4, 4, dtype); }

TEST(CheckGrads, Right) {
  const auto product = [](const Tensor& a, const Tensor& b) {
    return std::pair(a.sin() * b, b.exp());
  };
  check_grads(product, std::tuple(points(), points()), {.order = 3});
  check_grads(product, std::tuple(points(), points()), {.modes = CheckModes::kReverse});
  check_grads(product, std::tuple(points(at::kFloat), points(at::kFloat)));
  check_grads([](const Tensor& x) { return x.sum(); }, std::tuple(points().slice(0, 0, 0)));
}

TEST(CheckGrads, ConstantsAreLeftAlone) {
  const auto f = [](const Tensor& x, const Tensor& index, double scale) {
    return std::pair(x.index_select(0, index).cos() * scale, index + 1);
  };
  check_grads(f, std::tuple(points(), at::arange(2), 0.3), {.order = 2});
}

TEST(CheckGrads, Complex) {
  const auto f = [](const Tensor& z) { return z * z; };
  check_grads(f, std::tuple(at::view_as_complex(points().reshape({2, 2}))), {.order = 2});
}

// Right in the first derivative, wrong in the second.
Tensor half_right(const Tensor& x) {
  const auto derivative =
      custom_jvp([](const Tensor& y) { return y.cos(); },
                 [](const std::tuple<Tensor>& primals, const std::tuple<Tensor>& tangents) {
                   return std::pair(std::get<0>(primals).cos(), std::get<0>(tangents) * 1);
                 });
  return custom_jvp(
      [](const Tensor& y) { return y.sin(); },
      [derivative](const std::tuple<Tensor>& primals, const std::tuple<Tensor>& tangents) {
        const auto& [y] = primals;
        return std::pair(y.sin(), derivative(y) * std::get<0>(tangents));
      })(x);
}

TEST(CheckGrads, Wrong) {
  check_grads(&half_right, std::tuple(points()));
  EXPECT_THAT(error_of<GradientMismatch>(
                  [] { check_grads(&half_right, std::tuple(points()), {.order = 2}); }),
              HasSubstr("[check_grads] the jvp of output 0 of the jvp of the function differs from "
                        "finite differences by"));
  EXPECT_THAT(error_of<GradientMismatch>([] {
                check_grads([](const Tensor& x) { return x.detach() * x; }, std::tuple(points()),
                            {.modes = CheckModes::kReverse});
              }),
              HasSubstr("vjp (in an inner product with a tangent) of the function"));
}

TEST(CheckGrads, NothingToCheck) {
  EXPECT_THAT(error_of<TransformError>([] {
                check_grads([](const Tensor& i) { return i; }, std::tuple(at::arange(3)));
              }),
              HasSubstr("no tensor of a floating-point or complex dtype among the arguments"));
  EXPECT_THAT(error_of<TransformError>([] {
                check_grads([](const Tensor& x) { return x.gt(0); }, std::tuple(points()));
              }),
              HasSubstr("the function returns no tensor"));
  EXPECT_THAT(error_of<TransformError>([] {
                check_grads([](const Tensor& x) { return x; }, std::tuple(points()), {.order = 0});
              }),
              HasSubstr("order is 0"));
}

}  // namespace
}  // namespace torchlift
