#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "batching/testing/call_op.h"
#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

using Shape = std::vector<int64_t>;

// Operators on three tensors of these shapes, the first written when the name ends in "_".
void check(const std::string& op, const Shape& a, const Shape& b, const Shape& c) {
  const bool in_place = op.find("_.") != std::string::npos || op.back() == '_';
  check_rule({.name = op,
              .f =
                  [&](const Tensors& in) {
                    return call_op("aten::" + op, {in[0], in[1], in[2]});
                  },
              .make =
                  [&](int64_t) {
                    return Tensors{randn(a), randn(b), positive(c)};
                  },
              .always_batched = in_place ? std::vector<size_t>{0} : std::vector<size_t>{}});
}

TEST(TernaryRules, ThreeTensors) {
  for (const char* op :
       {"addcmul", "addcdiv", "lerp.Tensor", "addcmul_", "addcdiv_", "lerp_.Tensor"}) {
    check(op, {2, 3}, {2, 3}, {2, 3});
    check(op, {2, 3}, {3}, {2, 1});
    check(op, {2, 3}, {2, 3}, {});
    check(op, {}, {}, {});
  }
}

TEST(TernaryRules, ClampBetweenTensors) {
  for (const char* op : {"aten::clamp.Tensor", "aten::clamp_.Tensor"}) {
    for (const Shape& bound : {Shape{2, 3}, Shape{3}, Shape{}}) {
      check_rule(
          {.name = op,
           .f =
               [op](const Tensors& in) {
                 return call_op(op, {in[0], in[1], in[2]});
               },
           .make =
               [&](int64_t) {
                 return Tensors{randn({2, 3}), positive(bound).neg(), positive(bound)};
               },
           .always_batched = op[11] == '_' ? std::vector<size_t>{0} : std::vector<size_t>{}});
    }
  }
}

TEST(TernaryRules, ClampWithOneBound) {
  check_rule({.name = "clamp without min",
              .f =
                  [](const Tensors& in) {
                    return call_op("aten::clamp.Tensor", {in[0], {}, in[1]});
                  },
              .make =
                  [](int64_t) {
                    return Tensors{randn({2, 3}), randn({3})};
                  }});
  for (const char* op : {"aten::clamp_min.Tensor", "aten::clamp_max.Tensor"}) {
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({2, 3}), randn({3})};
                    }});
  }
}

TEST(TernaryRules, LerpByNumber) {
  for (const char* op : {"aten::lerp.Scalar", "aten::lerp_.Scalar"}) {
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(op, {in[0], in[1], 0.3});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{randn({2, 3}), randn({3})};
                    },
                .always_batched = op[10] == '_' ? std::vector<size_t>{0} : std::vector<size_t>{}});
  }
}

at::Tensor condition(const Shape& shape) { return integers(0, 2, shape).to(at::kBool); }

TEST(TernaryRules, Where) {
  for (const Shape& c : {Shape{2, 3}, Shape{3}, Shape{}}) {
    for (const Shape& a : {Shape{2, 3}, Shape{}}) {
      for (const Shape& b : {Shape{2, 1}, Shape{}}) {
        check_rule({.name = "where",
                    .f =
                        [](const Tensors& in) {
                          return call_op("aten::where.self", {in[0], in[1], in[2]});
                        },
                    .make =
                        [&](int64_t) {
                          return Tensors{condition(c), randn(a), randn(b)};
                        }});
      }
    }
  }
}

TEST(TernaryRules, WherePromotesTypes) {
  for (const auto left : {at::kLong, at::kFloat, at::kDouble}) {
    for (const auto right : {at::kInt, at::kFloat, at::kDouble}) {
      for (const Shape& a : {Shape{}, Shape{3}}) {
        for (const Shape& b : {Shape{}, Shape{3}}) {
          check_rule({.name = "where of two dtypes",
                      .f =
                          [](const Tensors& in) {
                            return call_op("aten::where.self", {in[0], in[1], in[2]});
                          },
                      .make =
                          [&](int64_t) {
                            return Tensors{condition({3}), integers(0, 9, a).to(left),
                                           integers(0, 9, b).to(right)};
                          },
                      .differentiable = false});
        }
      }
    }
  }
}

}  // namespace
}  // namespace torchlift::testing
