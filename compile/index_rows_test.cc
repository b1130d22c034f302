#include "compile/index_rows.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <vector>

#include "core/testing.h"

namespace torchlift::compile {
namespace {

using at::Tensor;

constexpr auto kAll = std::nullopt;

Tensor places(std::vector<int64_t> at) { return at::tensor(at, at::kLong); }

void check(const Tensor& x, const std::vector<std::optional<Tensor>>& indices) {
  Indices list;
  for (const auto& each : indices) list.push_back(each);
  const Tensor expected = at::index(x, list), got = index_rows(x, list);
  EXPECT_TRUE(at::equal(expected, got)) << x.sizes();
  EXPECT_EQ(expected.strides(), got.strides()) << x.sizes();
  EXPECT_FALSE(got.is_alias_of(x));
}

TEST(IndexRowsTest, AsIndex) {
  const Tensor i = places({3, 0, 0, 2}), j = places({1, 1, 4, 0});
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBool, at::kComplexFloat}) {
    const Tensor x = at::randn({4, 4, 5, 6}).to(dtype);
    check(x, {i});
    check(x, {kAll, i});
    check(x, {kAll, i, j});
    check(x, {kAll, kAll, j, j});
    check(x, {i, i, j, i});
    check(x[0][0][0], {i});
    check(x, {kAll, places({})});
    check(x, {i.expand({2, 4}).t().select(1, 1)});
    check(x.narrow(0, 0, 0), {kAll, i, j});
  }
}

TEST(IndexRowsTest, WhatIndexSelectDoesNotTake) {
  const Tensor x = at::randn({4, 4, 5}), i = places({3, 0, 0, 2});
  check(x, {places({-1, 2})});
  check(x, {i, kAll, i});
  check(x, {i, places({1})});
  check(x, {i.view({2, 2})});
  check(x, {i.to(at::kInt)});
  check(x, {x.select(1, 0).select(1, 0) > 0});
  check(x.transpose(0, 1), {i});
  Indices list;
  list.push_back(places({4}));
  EXPECT_THROW(index_rows(x, list), c10::Error);
}

TEST(IndexRowsTest, IsDifferentiable) {
  const Tensor x = at::randn({4, 3}).requires_grad_();
  Indices list;
  list.push_back(places({1, 1, 2}));
  index_rows(x, list).sum().backward();
  EXPECT_CLOSE(x.grad().select(1, 0), at::tensor({0.F, 2.F, 1.F, 0.F}));
}

TEST(IndexRowsTest, NonzeroPlaces) {
  const Tensor x = at::tensor({0, 3, 0, 1}).view({2, 2});
  for (const int64_t size : {1, 2, 3}) {
    EXPECT_TRUE(at::equal(nonzero_places(x, size, -1), at::nonzero_static(x, size, -1)));
  }
  EXPECT_TRUE(nonzero_places(x, 2, 0).is_contiguous());
}

}  // namespace
}  // namespace torchlift::compile
