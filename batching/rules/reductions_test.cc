#include <ATen/core/Tensor.h>
#include <ATen/ops/all.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/amin.h>
#include <ATen/ops/any.h>
#include <ATen/ops/count_nonzero.h>
#include <ATen/ops/hash_tensor.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/max.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/min.h>
#include <ATen/ops/nansum.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/prod.h>
#include <ATen/ops/std.h>
#include <ATen/ops/std_mean.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/trace.h>
#include <ATen/ops/var.h>
#include <ATen/ops/var_mean.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/tensor_operators.h"

namespace torchlift::testing {
namespace {

using Reduce = std::function<at::Tensor(const at::Tensor&)>;

struct Row {
  const char* name;
  Reduce f;
  bool differentiable = true;
};

void check_rows(const std::vector<Row>& rows, const std::vector<std::vector<int64_t>>& shapes) {
  for (const Row& row : rows) {
    for (const auto& shape : shapes) {
      check_rule({.name = row.name,
                  .f = [&](const Tensors& in) { return Tensors{row.f(in[0])}; },
                  .make = [&](int64_t) { return Tensors{randn(shape)}; },
                  .differentiable = row.differentiable});
    }
  }
}

TEST(ReductionRules, OverAllDims) {
  check_rows(
      {{"sum", [](const at::Tensor& x) { return x.sum(); }},
       {"sum to float", [](const at::Tensor& x) { return x.sum(at::kFloat); }, false},
       {"mean", [](const at::Tensor& x) { return x.mean(); }},
       {"prod", [](const at::Tensor& x) { return x.prod(); }},
       {"max", [](const at::Tensor& x) { return x.max(); }},
       {"min", [](const at::Tensor& x) { return x.min(); }},
       {"norm", [](const at::Tensor& x) { return at::norm(x, 3); }},
       {"any", [](const at::Tensor& x) { return (x > 0).any(); }, false},
       {"all", [](const at::Tensor& x) { return (x > -1).all(); }, false},
       {"count_nonzero", [](const at::Tensor& x) { return (x > 0).count_nonzero(); }, false}},
      {{}, {4}, {2, 3}, {1, 2, 3}});
}

TEST(ReductionRules, AlongADim) {
  check_rows(
      {{"sum -1", [](const at::Tensor& x) { return x.sum(-1); }},
       {"sum 0 keepdim", [](const at::Tensor& x) { return x.sum(0, true); }},
       {"sum []", [](const at::Tensor& x) { return x.sum(at::IntArrayRef{}); }},
       {"mean -1", [](const at::Tensor& x) { return x.mean(-1, true); }},
       {"mean none", [](const at::Tensor& x) { return x.mean(at::OptionalIntArrayRef{}, true); }},
       {"prod 0", [](const at::Tensor& x) { return x.prod(0); }},
       {"nansum", [](const at::Tensor& x) { return x.nansum(-1); }},
       {"amax", [](const at::Tensor& x) { return x.amax(-1); }},
       {"amin []", [](const at::Tensor& x) { return x.amin({}, true); }},
       {"logsumexp", [](const at::Tensor& x) { return x.logsumexp(0, true); }},
       {"vector norm", [](const at::Tensor& x) { return at::linalg_vector_norm(x, 3, -1); }},
       {"vector norm all",
        [](const at::Tensor& x) { return at::linalg_vector_norm(x, 2, {}, true); }},
       {"norm dim", [](const at::Tensor& x) { return at::norm(x, 2, -1, true); }},
       {"any", [](const at::Tensor& x) { return (x > 0).any(-1, true); }, false},
       {"all", [](const at::Tensor& x) { return (x > 0).all(0); }, false},
       {"any dims none", [](const at::Tensor& x) { return (x > 0).any(at::OptionalIntArrayRef{}); },
        false},
       {"hash_tensor", [](const at::Tensor& x) { return at::hash_tensor(x).to(at::kLong); }, false},
       {"hash_tensor -1",
        [](const at::Tensor& x) {
          return at::hash_tensor(x, {-1}, /*keepdim=*/true).to(at::kLong);
        },
        false},
       {"count_nonzero -1",
        [](const at::Tensor& x) { return (x > 0).count_nonzero(std::optional<int64_t>(-1)); },
        false}},
      {{}, {4}, {3, 2}, {2, 3, 2}});
}

TEST(ReductionRules, AnyOverNoDims) {
  check_rows(
      {{"any ()",
        [](const at::Tensor& x) { return at::any((x > 0).to(at::kLong), at::IntArrayRef{}); },
        false},
       {"all ()",
        [](const at::Tensor& x) { return at::all((x > 0).to(at::kLong), at::IntArrayRef{}); },
        false}},
      {{}, {2, 3}});
}

TEST(ReductionRules, SeveralDims) {
  check_rows({{"sum 0 2",
               [](const at::Tensor& x) {
                 return x.sum(at::IntArrayRef{0, 2});
               }},
              {"mean -1 0",
               [](const at::Tensor& x) {
                 return x.mean({-1, 0}, true);
               }},
              {"amax 0 1",
               [](const at::Tensor& x) {
                 return x.amax({0, 1});
               }},
              {"logsumexp 1 2",
               [](const at::Tensor& x) {
                 return x.logsumexp({1, 2});
               }},
              {"var 0 -1",
               [](const at::Tensor& x) {
                 return x.var(at::IntArrayRef{0, -1}, at::Scalar(0), true);
               }},
              {"count_nonzero 0 2",
               [](const at::Tensor& x) {
                 return x.count_nonzero({0, 2});
               },
               false}},
             {{2, 4, 3}});
}

TEST(ReductionRules, Variance) {
  for (const std::vector<int64_t>& shape : std::vector<std::vector<int64_t>>{{5}, {3, 4}}) {
    check_rule({.name = "var, std",
                .f =
                    [](const Tensors& in) {
                      auto [s, m] = at::std_mean(in[0], -1, at::Scalar(1), true);
                      auto [v, n] = at::var_mean(in[0], at::OptionalIntArrayRef(), at::Scalar(0));
                      return Tensors{at::std(in[0], 0), at::var(in[0]), s, m, v, n};
                    },
                .make = [&](int64_t) { return Tensors{randn(shape)}; }});
  }
}

TEST(ReductionRules, IntegersPromote) {
  check_rule({.name = "sum of int32 and bool",
              .f =
                  [](const Tensors& in) {
                    const at::Tensor small = in[0].to(at::kInt);
                    return Tensors{small.sum(),    small.prod(-1), (in[0] > 0).sum(0),
                                   small.amax(-1), small.max(),    (in[0] > 0).max()};
                  },
              .make =
                  [](int64_t) {
                    return Tensors{integers(-3, 4, {3, 2})};
                  },
              .differentiable = false});
}

TEST(ReductionRules, Trace) {
  check_rows({{"trace", [](const at::Tensor& x) { return x.trace(); }}}, {{3, 3}, {2, 4}});
}

TEST(ReductionRules, SecondOrder) {
  check_rule(
      {.name = "sum of powers",
       .f = [](const Tensors& in) { return Tensors{(in[0] * in[0] * in[0]).sum(-1).logsumexp(0)}; },
       .make =
           [](int64_t) {
             return Tensors{randn({2, 3})};
           },
       .second_order = true});
}

}  // namespace
}  // namespace torchlift::testing
