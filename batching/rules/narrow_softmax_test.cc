#include "batching/rules/narrow_softmax.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_log_softmax.h>
#include <ATen/ops/_log_softmax_backward_data.h>
#include <ATen/ops/_softmax.h>
#include <ATen/ops/_softmax_backward_data.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "batching/vmap.h"

namespace torchlift {
namespace {

using at::Tensor;
using Shape = std::vector<int64_t>;

// On both sides of what is laid out anew: few and many rows, in blocks or not, of few and many
// numbers.
std::vector<Shape> shapes() {
  std::vector<Shape> all = {{}, {7}, {0, 10}, {300, 0}};
  for (const int64_t columns : {1, 2, 3, 7, 8, 10, 15, 16, 17}) {
    for (const Shape& rows : {Shape{5}, Shape{300}, Shape{512}, Shape{3, 100}, Shape{4, 1, 256}}) {
      all.push_back(rows);
      all.back().push_back(columns);
    }
  }
  return all;
}

Tensor numbers(const Shape& shape, at::ScalarType dtype) {
  Tensor x = at::randn(shape, dtype).mul_(5);
  if (x.numel() > 700) {
    const Tensor flat = x.view({-1});
    flat[3].fill_(std::numeric_limits<double>::quiet_NaN());
    flat[200].fill_(-std::numeric_limits<double>::infinity());
    flat[201].fill_(std::numeric_limits<double>::infinity());
  }
  return x;
}

void expect_same(const Tensor& got, const Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  EXPECT_EQ(got.scalar_type(), expected.scalar_type());
  EXPECT_TRUE(got.is_contiguous());
  EXPECT_TRUE(got.allclose(expected, 1e-5, 1e-5, /*equal_nan=*/true)) << got.sizes();
}

TEST(NarrowSoftmax, IsLibtorchs) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kHalf}) {
    for (const Shape& shape : shapes()) {
      const Tensor x = numbers(shape, dtype), grad = at::randn(shape, dtype);
      const Tensor log_out = at::_log_softmax(x, -1, false), out = at::_softmax(x, -1, false);
      expect_same(log_softmax_along(x, -1, false), log_out);
      expect_same(softmax_along(x, -1, false), out);
      expect_same(log_softmax_backward_along(grad, log_out, -1, dtype),
                  at::_log_softmax_backward_data(grad, log_out, -1, dtype));
      expect_same(softmax_backward_along(grad, out, -1, dtype),
                  at::_softmax_backward_data(grad, out, -1, dtype));
    }
  }
}

TEST(NarrowSoftmax, OtherDimsAndLayouts) {
  const Tensor x = at::randn({300, 10, 4});
  for (const int64_t dim : {0, 1, 2, -1, -3}) {
    expect_same(softmax_along(x, dim, false), at::_softmax(x, dim, false));
  }
  const Tensor turned = at::randn({10, 300}).t();
  EXPECT_TRUE(log_softmax_along(turned, 1, false).equal(at::_log_softmax(turned, 1, false)));
  const Tensor out = at::randn({10, 300}).t(), grad = at::randn({300, 10});
  EXPECT_TRUE(log_softmax_backward_along(grad, out.contiguous(), 1, at::kFloat)
                  .allclose(at::_log_softmax_backward_data(grad, out, 1, at::kFloat)));
  EXPECT_TRUE(log_softmax_backward_along(out, grad, 1, at::kFloat)
                  .allclose(at::_log_softmax_backward_data(out, grad, 1, at::kFloat)));
}

TEST(NarrowSoftmax, ByExample) {
  const Tensor xs = at::randn({4, 200, 10});
  const auto by_example = [&](const auto& f) {
    std::vector<Tensor> rows;
    for (int64_t i = 0; i < xs.size(0); ++i) rows.push_back(f(xs[i]));
    return at::stack(rows);
  };
  const auto softmax = [](const Tensor& x) { return x.softmax(-1); };
  const auto log_softmax = [](const Tensor& x) { return x.log_softmax(-1); };
  expect_same(vmap(softmax)(xs), by_example(softmax));
  expect_same(vmap(log_softmax)(xs), by_example(log_softmax));
  expect_same(vmap(vmap(log_softmax))(xs), log_softmax(xs));
}

}  // namespace
}  // namespace torchlift
