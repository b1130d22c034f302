#include <ATen/core/Tensor.h>
#include <ATen/ops/cummax.h>
#include <ATen/ops/cummin.h>
#include <ATen/ops/cumprod.h>
#include <ATen/ops/cumprod_backward.h>
#include <ATen/ops/cumsum.h>
#include <ATen/ops/logcumsumexp.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

void check_shapes(const char* name, const std::function<Tensors(const at::Tensor&)>& f,
                  bool always_batched = false) {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{}, {4}, {3, 2}}) {
    check_rule({.name = name,
                .f = [&](const Tensors& in) { return f(in[0]); },
                .make = [&](int64_t) { return Tensors{randn(shape)}; },
                .always_batched = always_batched ? std::vector<size_t>{0} : std::vector<size_t>{}});
  }
}

TEST(CumulativeRules, SumsAndProducts) {
  check_shapes("cumsum", [](const at::Tensor& x) { return Tensors{x.cumsum(0)}; });
  check_shapes("cumsum -1", [](const at::Tensor& x) { return Tensors{x.cumsum(-1, at::kDouble)}; });
  check_shapes("cumprod", [](const at::Tensor& x) { return Tensors{x.cumprod(-1)}; });
  check_shapes("logcumsumexp", [](const at::Tensor& x) { return Tensors{x.logcumsumexp(0)}; });
}

TEST(CumulativeRules, Extrema) {
  check_shapes("cummax", [](const at::Tensor& x) {
    auto [values, indices] = x.cummax(0);
    return Tensors{values, indices};
  });
  check_shapes("cummin", [](const at::Tensor& x) {
    auto [values, indices] = x.cummin(-1);
    return Tensors{values, indices};
  });
}

TEST(CumulativeRules, InPlace) {
  check_shapes(
      "cumsum_ and cumprod_",
      [](const at::Tensor& x) {
        at::Tensor y = x.clone();
        return Tensors{y.cumsum_(-1).cumprod_(0)};
      },
      true);
}

// In levels, by NOTE [gradients of running products]; without them, by libtorch's formula.
TEST(CumulativeRules, GradientOfProducts) {
  for (const int64_t n : {1, 2, 3, 5, 8}) {
    for (const int64_t dim : {0, 1}) {
      for (const int64_t zeros : {0, 2}) {
        check_rule({.name = "cumprod_backward of " + std::to_string(n),
                    .f =
                        [&](const Tensors& in) {
                          return Tensors{
                              at::cumprod_backward(in[0], in[1], dim, in[1].cumprod(dim))};
                        },
                    .make =
                        [&](int64_t) {
                          at::Tensor x = randn({n, n, 2});
                          for (int64_t k = 0; k < zeros; ++k) {
                            x.select(0, n / (k + 2)).zero_();
                            x.select(1, n / (k + 2)).zero_();
                          }
                          return Tensors{randn({n, n, 2}), x};
                        }});
      }
    }
  }
}

}  // namespace
}  // namespace torchlift::testing
