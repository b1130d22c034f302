#include "batching/rules/narrow_products.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/baddbmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>

#include <cmath>
#include <utility>
#include <vector>

#include "batching/vmap.h"

namespace torchlift {
namespace {

using at::Tensor;

// Numbers of the shape that lie in memory as they are, or transposed.
Tensor matrix(std::vector<int64_t> sizes, at::ScalarType dtype, bool transposed) {
  if (!transposed) return at::randn(sizes, dtype);
  std::swap(sizes[sizes.size() - 1], sizes[sizes.size() - 2]);
  return at::randn(sizes, dtype).mT();
}

void expect_close(const Tensor& got, const Tensor& expected) {
  EXPECT_EQ(got.sizes(), expected.sizes());
  EXPECT_TRUE(got.is_contiguous());
  EXPECT_TRUE(got.to(at::kDouble).allclose(expected, 1e-4, 1e-4)) << got.sizes();
}

// Against the same product in float64, in libtorch's order.
TEST(NarrowProducts, AreProducts) {
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    for (const int64_t batch : {0, 1, 5}) {
      for (const int64_t columns : {1, 2, 3, 7, 8, 10, 15, 16, 17}) {
        for (const bool left : {false, true}) {
          for (const bool right : {false, true}) {
            const bool many = batch > 0;
            const auto sizes = [&](int64_t n, int64_t m) {
              return many ? std::vector<int64_t>{batch, n, m} : std::vector<int64_t>{n, m};
            };
            const Tensor a = matrix(sizes(200, 100), dtype, left);
            const Tensor b = matrix(sizes(100, columns), dtype, right);
            const Tensor wide_a = a.to(at::kDouble), wide_b = b.to(at::kDouble);
            const Tensor expected = wide_a.matmul(wide_b);
            expect_close(product(a, b), expected);
            for (const auto& shape : {sizes(1, columns), sizes(200, 1), sizes(200, columns),
                                      std::vector<int64_t>{columns}}) {
              const Tensor self = at::randn(shape, dtype);
              expect_close(product_added_to(self, a, b, 0.5, 2),
                           expected.mul(2).add(self.to(at::kDouble), 0.5));
              expect_close(product_added_to(self, a, b, 1, 1), expected.add(self.to(at::kDouble)));
            }
          }
        }
      }
    }
  }
}

// A beta of 0 does not read self.
TEST(NarrowProducts, AnUnreadSelf) {
  const Tensor a = at::randn({200, 100}), b = at::randn({100, 10});
  const Tensor self = at::full({10}, NAN);
  expect_close(product_added_to(self, a, b, 0, 1), a.to(at::kDouble).mm(b.to(at::kDouble)));
}

class NarrowProductsOf : public ::testing::TestWithParam<at::ScalarType> {};
INSTANTIATE_TEST_SUITE_P(Dtypes, NarrowProductsOf, ::testing::Values(at::kFloat, at::kDouble));

TEST_P(NarrowProductsOf, HaveGradients) {
  const Tensor a = at::randn({2, 64, 64}, GetParam()).set_requires_grad(true);
  const Tensor b = at::randn({2, 64, 6}, GetParam()).set_requires_grad(true);
  const Tensor self = at::randn({2, 1, 6}, GetParam()).set_requires_grad(true);
  const auto gradients = [&](const Tensor& out) {
    out.square().sum().backward();
    std::vector<Tensor> found;
    for (const Tensor& t : {a, b, self}) {
      found.push_back(t.grad().clone());
      t.mutable_grad().reset();
    }
    return found;
  };
  const auto got = gradients(product_added_to(self, a, b, 1, 1));
  const auto expected = gradients(at::baddbmm(self, a, b));
  for (size_t i = 0; i < got.size(); ++i) EXPECT_TRUE(got[i].allclose(expected[i], 1e-4, 1e-4));
}

// Layers with few outputs, as functions of one example use them: weights that differ, rows that
// differ, both, and twice.
TEST(NarrowProducts, OfExamples) {
  const Tensor x = at::randn({4, 64, 50}), w = at::randn({4, 7, 50}), b = at::randn({4, 7});
  const auto layer = [](const Tensor& x, const Tensor& w, const Tensor& b) {
    return at::linear(x, w, b);
  };
  const auto looped = [&](auto x_of, auto w_of) {
    std::vector<Tensor> rows;
    for (int64_t i = 0; i < 4; ++i) rows.push_back(layer(x_of(i), w_of(i), b[i]));
    return at::stack(rows);
  };
  const auto each = [](const Tensor& t) { return [t](int64_t i) { return t[i]; }; };
  const auto first = [](const Tensor& t) { return [t](int64_t) { return t[0]; }; };
  const auto expect = [](const Tensor& got, const Tensor& expected) {
    EXPECT_TRUE(got.is_contiguous());
    EXPECT_TRUE(got.allclose(expected, 1e-4, 1e-4));
  };
  expect(vmap(layer)(x, w, b), looped(each(x), each(w)));
  expect(vmap(layer, {.in_dims = in(kNone, 0, 0)})(x[0], w, b), looped(first(x), each(w)));
  expect(vmap(layer, {.in_dims = in(0, kNone, 0)})(x, w[0], b), looped(each(x), first(w)));
  const auto inner = vmap(layer, {.in_dims = in(kNone, 0, 0)});
  const Tensor pairs = vmap(inner, {.in_dims = in(0, kNone, kNone)})(x, w, b);
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) {
      EXPECT_TRUE(pairs[i][j].allclose(layer(x[i], w[j], b[j]), 1e-4, 1e-4));
    }
  }
}

}  // namespace
}  // namespace torchlift
