#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/geqrf.h>
#include <ATen/ops/linalg_ldl_factor.h>
#include <ATen/ops/linalg_ldl_solve.h>
#include <ATen/ops/linalg_lstsq.h>
#include <ATen/ops/linalg_matrix_rank.h>
#include <ATen/ops/linalg_pinv.h>
#include <ATen/ops/ormqr.h>
#include <ATen/ops/rand.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

TEST(MoreLinalgRules, Ormqr) {
  for (const bool transpose : {false, true}) {
    check_rule({.name = "ormqr",
                .f =
                    [=](const Tensors& in) {
                      return Tensors{at::ormqr(in[0], in[1], in[2], /*left=*/true, transpose)};
                    },
                .make =
                    [](int64_t) {
                      const auto [a, tau] = at::geqrf(randn({4, 3}));
                      return Tensors{a, tau, randn({4, 2})};
                    },
                .tolerance = 1e-7});
  }
}

TEST(MoreLinalgRules, LdlSolve) {
  for (const std::vector<int64_t>& leading : std::vector<std::vector<int64_t>>{{}, {2}}) {
    std::vector<int64_t> left = leading;
    left.insert(left.end(), {3, 3});
    std::vector<int64_t> right = leading;
    right.insert(right.end(), {3, 2});
    check_rule({.name = "ldl_solve",
                .f =
                    [](const Tensors& in) {
                      const auto [factors, pivots] = at::linalg_ldl_factor(in[0].add(in[0].mT()));
                      return Tensors{at::linalg_ldl_solve(factors, pivots, in[1])};
                    },
                .make =
                    [left, right](int64_t) {
                      return Tensors{randn(left), randn(right)};
                    },
                .differentiable = false,
                .tolerance = 1e-7});
  }
}

TEST(MoreLinalgRules, Pinv) {
  check_rule({.name = "pinv",
              .f = [](const Tensors& in) { return Tensors{at::linalg_pinv(in[0])}; },
              .make =
                  [](int64_t) {
                    return Tensors{randn({4, 3})};
                  },
              .tolerance = 1e-6});
  check_rule(
      {.name = "pinv with tolerances",
       .f =
           [](const Tensors& in) {
             return Tensors{at::linalg_pinv(in[0], in[1].detach(), in[2].detach())};
           },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 4, 3}), positive({2}).mul(1e-3), positive({}).mul(1e-3)};
           },
       .differentiable = false,
       .tolerance = 1e-6});
}

TEST(MoreLinalgRules, LeastSquares) {
  for (const char* driver : {"gelsy", "gels", "gelsd"}) {
    for (const bool vector : {false, true}) {
      check_rule({.name = std::string("lstsq by ") + driver,
                  .f =
                      [=](const Tensors& in) {
                        const auto [x, residuals, rank, singular] =
                            at::linalg_lstsq(in[0], in[1], std::nullopt, driver);
                        return Tensors{x, residuals, rank, singular};
                      },
                  .make =
                      [=](int64_t) {
                        return Tensors{randn({5, 3}), vector ? randn({5}) : randn({5, 2})};
                      },
                  .differentiable = false});
    }
  }
  check_rule(
      {.name = "lstsq of several matrices",
       .f = [](const Tensors& in) { return Tensors{std::get<0>(at::linalg_lstsq(in[0], in[1]))}; },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 4, 3}), randn({2, 4, 2})};
           }});
}

TEST(MoreLinalgRules, RankAboveTolerances) {
  check_rule(
      {.name = "matrix_rank",
       .f =
           [](const Tensors& in) {
             return Tensors{at::linalg_matrix_rank(in[0], in[1], in[2]),
                            at::linalg_matrix_rank(in[0], in[1], std::nullopt),
                            at::linalg_matrix_rank(in[0], std::nullopt, in[2]),
                            at::linalg_matrix_rank(in[0], in[1]),
                            at::linalg_matrix_rank(in[0].add(in[0].mT()), in[1], in[2],
                                                   /*hermitian=*/true)};
           },
       .make =
           [](int64_t) {
             return Tensors{randn({4, 4}), at::rand({}, at::kDouble), at::rand({}, at::kDouble)};
           },
       .differentiable = false});
}

// By name: not all versions of libtorch have them.
Tensors call_by_name(const c10::OperatorHandle& op, const at::Tensor& a) {
  torch::jit::Stack stack{a};
  op.callBoxed(&stack);
  Tensors results;
  for (const c10::IValue& each : stack) results.push_back(each.toTensor());
  return results;
}

TEST(MoreLinalgRules, RootsAndPolarForms) {
  for (const char* name : {"aten::linalg_matrix_sqrth", "aten::linalg_polar"}) {
    const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
    if (!op.has_value()) GTEST_SKIP() << "this libtorch has no " << name;
    for (const std::vector<int64_t>& sizes : std::vector<std::vector<int64_t>>{{3, 3}, {2, 3, 3}}) {
      check_rule({.name = name,
                  .f =
                      [op](const Tensors& in) {
                        const at::Tensor positive =
                            in[0].matmul(in[0].mT()).add(at::eye(3, at::kDouble));
                        return call_by_name(*op, positive);
                      },
                  .make = [sizes](int64_t) { return Tensors{randn(sizes)}; },
                  .differentiable = false});
    }
  }
}

}  // namespace
}  // namespace torchlift::testing
