#include <ATen/core/Tensor.h>
#include <ATen/ops/_linalg_solve_ex.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/det.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky.h>
#include <ATen/ops/linalg_cross.h>
#include <ATen/ops/linalg_eigh.h>
#include <ATen/ops/linalg_householder_product.h>
#include <ATen/ops/linalg_inv.h>
#include <ATen/ops/linalg_lu.h>
#include <ATen/ops/linalg_lu_factor.h>
#include <ATen/ops/linalg_lu_solve.h>
#include <ATen/ops/linalg_matrix_exp.h>
#include <ATen/ops/linalg_qr.h>
#include <ATen/ops/linalg_slogdet.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/linalg_solve_triangular.h>
#include <ATen/ops/linalg_svdvals.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using testing::check_rule;
using testing::randn;
using testing::RuleCase;
using testing::Tensors;

// Well conditioned square matrices first, then whatever shapes are given.
RuleCase square(const char* name, std::function<at::Tensor(const Tensors&)> f,
                std::vector<int64_t> matrix, std::vector<std::vector<int64_t>> others = {}) {
  return {.name = name,
          .f = [f = std::move(f)](const Tensors& in) { return Tensors{f(in)}; },
          .make =
              [matrix, others](int64_t) {
                Tensors in{randn(matrix).mul(0.3).add(at::eye(matrix.back(), at::kDouble), 2)};
                for (const auto& shape : others) in.push_back(randn(shape));
                return in;
              },
          .tolerance = 1e-7};
}

at::Tensor symmetric(const at::Tensor& a) { return a.add(a.mT()); }

TEST(LinalgRules, Factors) {
  check_rule(square("inv", [](const Tensors& in) { return at::linalg_inv(in[0]); }, {3, 3}));
  check_rule(
      square("inv of several", [](const Tensors& in) { return at::linalg_inv(in[0]); }, {2, 3, 3}));
  check_rule(square("det", [](const Tensors& in) { return at::det(in[0]); }, {3, 3}));
  check_rule(square(
      "slogdet", [](const Tensors& in) { return std::get<1>(at::linalg_slogdet(in[0])); }, {3, 3}));
  check_rule(square(
      "cholesky", [](const Tensors& in) { return at::linalg_cholesky(symmetric(in[0])); }, {3, 3}));
  check_rule(square(
      "eigh", [](const Tensors& in) { return std::get<0>(at::linalg_eigh(symmetric(in[0]))); },
      {3, 3}));
  check_rule(
      square("svdvals", [](const Tensors& in) { return at::linalg_svdvals(in[0]); }, {3, 3}));
  check_rule(
      square("qr", [](const Tensors& in) { return std::get<1>(at::linalg_qr(in[0])); }, {3, 3}));
  check_rule(
      square("lu", [](const Tensors& in) { return std::get<2>(at::linalg_lu(in[0])); }, {3, 3}));
  check_rule(
      square("matrix_exp", [](const Tensors& in) { return at::linalg_matrix_exp(in[0]); }, {3, 3}));
}

TEST(LinalgRules, Solve) {
  const auto solve = [](const Tensors& in) { return at::linalg_solve(in[0], in[1]); };
  check_rule(square("solve, matrix", solve, {3, 3}, {{3, 2}}));
  check_rule(square("solve, vector", solve, {3, 3}, {{3}}));
  check_rule(square("solve, several vectors", solve, {2, 3, 3}, {{2, 3}}));
  check_rule(square("solve, broadcast", solve, {2, 3, 3}, {{3, 4}}));
  // As many rows and columns as there are examples: not to be taken for a batch of vectors.
  check_rule(square("solve, all sizes 3", solve, {3, 3}, {{3, 3}}));
  for (const std::vector<int64_t>& right : std::vector<std::vector<int64_t>>{{3}, {3, 2}}) {
    RuleCase factors = square("_linalg_solve_ex", solve, {3, 3}, {right});
    factors.f = [](const Tensors& in) {
      const auto [x, lu, pivots, info] = at::_linalg_solve_ex(in[0], in[1]);
      return Tensors{x, lu, pivots, info};
    };
    factors.differentiable = false;
    check_rule(factors);
  }
  check_rule(square(
      "triangular",
      [](const Tensors& in) { return at::linalg_solve_triangular(in[0], in[1], /*upper=*/true); },
      {3, 3}, {{3, 2}}));
  check_rule(square("lu_solve",
                    [](const Tensors& in) {
                      const auto [lu, pivots] = at::linalg_lu_factor(in[0]);
                      return at::linalg_lu_solve(lu, pivots, in[1]);
                    },
                    {3, 3}, {{3, 2}}));
  check_rule(square("cholesky_solve",
                    [](const Tensors& in) {
                      return at::cholesky_solve(in[1], at::linalg_cholesky(symmetric(in[0])));
                    },
                    {3, 3}, {{3, 2}}));
}

TEST(LinalgRules, Vectors) {
  check_rule({.name = "cross",
              .f = [](const Tensors& in) { return Tensors{at::linalg_cross(in[0], in[1], 0)}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({3, 2}), randn({3, 2})};
                  }});
  check_rule(
      {.name = "householder_product",
       .f = [](const Tensors& in) { return Tensors{at::linalg_householder_product(in[0], in[1])}; },
       .make =
           [](int64_t) {
             return Tensors{randn({4, 3}), randn({3})};
           },
       .differentiable = false});
}

TEST(LinalgRules, AVectorIsNotABatchOfNumbers) {
  LevelScope scope({.size = 3});
  const at::Tensor x = lift(at::eye(3), 0, scope.level());
  try {
    at::det(x);
    FAIL() << "nothing was thrown";
  } catch (const c10::Error& e) {
    EXPECT_THAT(e.what_without_backtrace(), ::testing::HasSubstr("at least 2 dimensions"));
  }
}

TEST(LinalgRules, SingularMatricesAreReported) {
  LevelScope scope({.size = 2});
  const at::Tensor x = lift(at::zeros({2, 3, 3}), 0, scope.level());
  EXPECT_THROW(at::linalg_inv(x), c10::Error);
}

}  // namespace
}  // namespace torchlift
