#include "batching/rules/narrow_kernel.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/randn.h>
#include <ATen/record_function.h>
#include <gtest/gtest.h>

#include <memory>

namespace torchlift {
namespace {

using at::Tensor;

class NarrowKernel : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!narrow_product(at::randn({16, 4}), at::randn({4, 3})).has_value()) {
      GTEST_SKIP() << "this processor has no AVX-512";
    }
  }
};

// Against the product in float64.
void expect_served(const Tensor& a, const Tensor& b, const Tensor& row = {}) {
  const auto got = narrow_product(a, b, row);
  ASSERT_TRUE(got.has_value()) << a.sizes() << b.sizes();
  Tensor expected = at::matmul(a.to(at::kDouble), b.to(at::kDouble));
  if (row.defined()) expected = at::add(expected, row);
  EXPECT_EQ(got->sizes(), expected.sizes());
  EXPECT_TRUE(got->is_contiguous());
  // As far as float goes: a hundred products, whose sum may cancel.
  const double error = expected.numel() == 0 ? 0 : expected.sub(*got).abs().max().item<double>();
  EXPECT_LT(error, 2e-4) << a.sizes() << b.sizes();
}

TEST_F(NarrowKernel, AllSizes) {
  for (const int64_t rows : {16, 17, 31, 32, 200}) {
    for (const int64_t terms : {0, 1, 2, 3, 4, 7, 100}) {
      for (int64_t columns = 3; columns <= 15; ++columns) {
        expect_served(at::randn({rows, terms}), at::randn({terms, columns}));
        for (const int64_t batch : {0, 1, 5}) {
          expect_served(at::randn({batch, rows, terms}), at::randn({batch, terms, columns}),
                        at::randn({batch, 1, columns}));
        }
      }
    }
  }
}

TEST_F(NarrowKernel, AllLayouts) {
  const int64_t batch = 3, rows = 40, terms = 21, columns = 6;
  const Tensor a[] = {at::randn({batch, rows, terms}),
                      at::randn({batch, rows, terms + 5}).narrow(2, 2, terms),
                      at::randn({rows, batch, terms}).transpose(0, 1),
                      at::randn({rows, terms}).expand({batch, rows, terms})};
  const Tensor b[] = {at::randn({batch, terms, columns}), at::randn({batch, columns, terms}).mT(),
                      at::randn({terms, columns}).expand({batch, terms, columns}),
                      at::randn({batch, columns, 2 * terms}).narrow(2, 1, terms).mT()};
  const Tensor row[] = {{},
                        at::randn({columns}),
                        at::randn({1}),
                        at::randn({1, columns}),
                        at::randn({batch, 1, columns}),
                        at::randn({batch, 1, 1}),
                        at::randn({batch, columns}).unsqueeze(1).expand({batch, rows, columns}),
                        at::randn({columns, batch}).t().unsqueeze(1)};
  for (const Tensor& left : a) {
    for (const Tensor& right : b) {
      for (const Tensor& added : row) expect_served(left, right, added);
    }
  }
}

// One call after the other: vectors of 16 rows, and rests, on several threads.
TEST_F(NarrowKernel, LargeOnes) {
  expect_served(at::randn({20, 333, 128}), at::randn({20, 10, 128}).mT(), at::randn({10}));
}

TEST_F(NarrowKernel, WhatItDoesNotServe) {
  const Tensor a = at::randn({2, 32, 8}), b = at::randn({2, 8, 5});
  const auto served = [](const Tensor& a, const Tensor& b, const Tensor& row = {}) {
    return narrow_product(a, b, row).has_value();
  };
  EXPECT_TRUE(served(a, b));
  EXPECT_FALSE(served(a.to(at::kDouble), b.to(at::kDouble)));
  EXPECT_FALSE(served(a.narrow(1, 0, 15), b));
  EXPECT_FALSE(served(a, b.narrow(2, 0, 2)));
  EXPECT_FALSE(served(a, at::randn({2, 8, 16})));
  EXPECT_FALSE(served(at::randn({2, 8, 32}).mT(), b));
  EXPECT_FALSE(served(a, b, at::randn({32, 1})));
  EXPECT_FALSE(served(a, b, at::randn({2, 32, 5})));
  // Misfits, which libtorch words.
  EXPECT_FALSE(served(a, at::randn({2, 7, 5})));
  EXPECT_FALSE(served(a, at::randn({3, 8, 5})));
  EXPECT_FALSE(served(a, b[0]));
  EXPECT_FALSE(served(a, b, at::randn({4})));
  EXPECT_FALSE(served(a[0], b[0], at::randn({2, 1, 5})));
}

TEST_F(NarrowKernel, WhoLooksOn) {
  const Tensor a = at::randn({32, 8}), b = at::randn({8, 5});
  EXPECT_FALSE(narrow_product(a, at::randn({8, 5}).set_requires_grad(true)).has_value());
  const auto handle = at::addThreadLocalCallback(at::RecordFunctionCallback(
      [](const at::RecordFunction& /*call*/) -> std::unique_ptr<at::ObserverContext> {
        return nullptr;
      }));
  EXPECT_FALSE(narrow_product(a, b).has_value());
  at::removeCallback(handle);
  EXPECT_TRUE(narrow_product(a, b).has_value());
}

}  // namespace
}  // namespace torchlift
