#include "autodiff/linear_solvers.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <utility>

#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

Tensor regular(int64_t size) {
  return at::randn({size, size}, at::kDouble) + 2 * size * at::eye(size, at::kDouble);
}

Tensor positive(int64_t size) {
  const Tensor a = at::randn({size, size}, at::kDouble);
  return a.t().mm(a) + at::eye(size, at::kDouble);
}

TEST(LinearSolvers, SolveWhatLinalgSolves) {
  const Tensor a = regular(12), s = positive(12), b = at::randn({12}, at::kDouble);
  const auto by = [](const Tensor& matrix) {
    return [matrix](const Tensor& x) { return matrix.mv(x); };
  };
  EXPECT_CLOSE(gmres(by(a), b), at::linalg_solve(a, b));
  EXPECT_CLOSE(gmres(by(a), b, {.tol = 1e-13, .restart = 4}), at::linalg_solve(a, b));
  EXPECT_CLOSE(cg(by(s), b, {.tol = 1e-12}), at::linalg_solve(s, b));
  EXPECT_CLOSE(gmres(by(a), at::zeros({12}, at::kDouble)), at::zeros({12}, at::kDouble));
  EXPECT_EQ(gmres(by(a), at::zeros({0}, at::kDouble)).numel(), 0);
}

TEST(LinearSolvers, UnknownsAreTrees) {
  const Tensor a = regular(5), s = positive(3);
  using Pair = std::pair<Tensor, Tensor>;
  const Pair b(at::randn({5}, at::kDouble), at::randn({3, 1}, at::kDouble));
  const auto product = [&](const Pair& x) { return Pair(a.mv(x.first), s.mm(x.second)); };
  const Pair x = gmres(product, b, {.tol = 1e-13});
  EXPECT_CLOSE(x.first, at::linalg_solve(a, b.first));
  EXPECT_CLOSE(x.second, at::linalg_solve(s, b.second));
}

TEST(LinearSolvers, EveryExampleHasItsOwnSystem) {
  const Tensor a = at::randn({4, 6, 6}, at::kDouble) + 12 * at::eye(6, at::kDouble);
  const Tensor b = at::randn({4, 6}, at::kDouble);
  const auto solve = [](const Tensor& matrix, const Tensor& goal) {
    return gmres([&](const Tensor& x) { return matrix.mv(x); }, goal, {.tol = 1e-13});
  };
  EXPECT_CLOSE(vmap(solve)(a, b), at::linalg_solve(a, b));
  const Tensor s = a.mT().matmul(a);
  const auto positive_solve = [](const Tensor& matrix, const Tensor& goal) {
    return cg([&](const Tensor& x) { return matrix.mv(x); }, goal, {.tol = 1e-13});
  };
  EXPECT_CLOSE(vmap(positive_solve)(s, b), at::linalg_solve(s, b));
}

TEST(LinearSolvers, WhatIsNotSolvedIsNan) {
  const Tensor singular = at::zeros({3, 3}, at::kDouble), b = at::ones({3}, at::kDouble);
  const auto product = [&](const Tensor& x) { return singular.mv(x); };
  EXPECT_TRUE(gmres(product, b).isnan().all().item<bool>());
  EXPECT_TRUE(cg(product, b).isnan().all().item<bool>());
  const Tensor s = positive(20);
  const auto few = cg([&](const Tensor& x) { return s.mv(x); }, at::ones({20}, at::kDouble),
                      {.tol = 1e-14, .max_steps = 2});
  EXPECT_TRUE(few.isnan().all().item<bool>());
}

TEST(LinearSolvers, BadInputs) {
  const auto same = [](const Tensor& x) { return x; };
  EXPECT_THAT(error_of([&] { gmres(same, at::ones({2}, at::kLong)); }),
              HasSubstr("[gmres] the unknowns must be real tensors, got Long"));
  EXPECT_THAT(error_of([&] { cg(same, at::ones({2}, at::kComplexDouble)); }),
              HasSubstr("[cg] the unknowns must be real tensors, got ComplexDouble"));
  EXPECT_THAT(error_of([&] { gmres([](const Tensor& x) { return x.sum(); }, at::ones({2})); }),
              HasSubstr("[gmres] the product has shape [] where the unknown has shape [2]"));
}

}  // namespace
}  // namespace torchlift
