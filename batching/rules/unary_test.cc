#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "batching/testing/call_op.h"
#include "batching/testing/rule_check.h"

namespace torchlift::testing {
namespace {

// Where an operator is smooth, and not constant.
enum class Domain { kReal, kPositive, kUnit, kAboveOne, kInteger };

at::Tensor inputs(Domain domain, at::IntArrayRef sizes) {
  switch (domain) {
    case Domain::kReal:
      return randn(sizes);
    case Domain::kPositive:
      return positive(sizes);
    case Domain::kUnit:
      return randn(sizes).tanh().mul(0.9);
    case Domain::kAboveOne:
      return positive(sizes).add(1);
    case Domain::kInteger:
      break;
  }
  return integers(-5, 6, sizes);
}

struct Row {
  std::string op;
  Domain domain = Domain::kReal;
  std::vector<c10::IValue> numbers = {};  // arguments after the tensor
  bool differentiable = true;
};

void check(const Row& row, at::IntArrayRef sizes) {
  const bool in_place = row.op.find("_.") != std::string::npos || row.op.back() == '_';
  const std::vector<int64_t> shape = sizes.vec();
  check_rule({.name = row.op,
              .f =
                  [&](const Tensors& in) {
                    std::vector<c10::IValue> args{in_place ? in[0].clone() : in[0]};
                    args.insert(args.end(), row.numbers.begin(), row.numbers.end());
                    return call_op("aten::" + row.op, args);
                  },
              .make = [&](int64_t) { return Tensors{inputs(row.domain, shape)}; },
              .always_batched = in_place ? std::vector<size_t>{0} : std::vector<size_t>{},
              .differentiable = row.differentiable && row.domain != Domain::kInteger});
}

const std::vector<Row>& rows() {
  using enum Domain;
  static const auto* all = new std::vector<Row>{{"abs"},
                                                {"acos", kUnit},
                                                {"acosh", kAboveOne},
                                                {"angle"},
                                                {"asin", kUnit},
                                                {"asinh"},
                                                {"atan"},
                                                {"atanh", kUnit},
                                                {"bitwise_not", kInteger},
                                                {"ceil"},
                                                {"_conj_physical"},
                                                {"cos"},
                                                {"cosh"},
                                                {"deg2rad"},
                                                {"digamma", kPositive},
                                                {"erf"},
                                                {"erfc"},
                                                {"erfinv", kUnit},
                                                {"exp"},
                                                {"exp2"},
                                                {"expm1"},
                                                {"floor"},
                                                {"frac"},
                                                {"i0"},
                                                {"isinf", kReal, {}, false},
                                                {"isnan", kReal, {}, false},
                                                {"isneginf", kReal, {}, false},
                                                {"isposinf", kReal, {}, false},
                                                {"lgamma", kPositive},
                                                {"log", kPositive},
                                                {"log10", kPositive},
                                                {"log1p", kPositive},
                                                {"log2", kPositive},
                                                {"logical_not", kInteger},
                                                {"neg"},
                                                {"neg", kInteger},
                                                {"rad2deg"},
                                                {"reciprocal", kPositive},
                                                {"round"},
                                                {"rsqrt", kPositive},
                                                {"sgn"},
                                                {"sigmoid"},
                                                {"sign"},
                                                {"signbit", kReal, {}, false},
                                                {"sin"},
                                                {"sinc"},
                                                {"sinh"},
                                                {"sqrt", kPositive},
                                                {"tan"},
                                                {"tanh"},
                                                {"trunc"},
                                                {"sin", kInteger},
                                                {"abs_"},
                                                {"acos_", kUnit},
                                                {"ceil_"},
                                                {"bitwise_not_", kInteger},
                                                {"conj_physical_"},
                                                {"cos_"},
                                                {"digamma_", kPositive},
                                                {"erf_"},
                                                {"exp_"},
                                                {"floor_"},
                                                {"log_", kPositive},
                                                {"logical_not_", kInteger},
                                                {"neg_"},
                                                {"reciprocal_", kPositive},
                                                {"round_"},
                                                {"rsqrt_", kPositive},
                                                {"sgn_"},
                                                {"sigmoid_"},
                                                {"sign_"},
                                                {"sin_"},
                                                {"sqrt_", kPositive},
                                                {"tan_"},
                                                {"tanh_"},
                                                {"trunc_"},
                                                {"round.decimals", kReal, {1}, false},
                                                {"round_.decimals", kReal, {1}, false},
                                                {"nan_to_num"},
                                                {"nan_to_num_"},
                                                {"logit", kPositive, {0.1}},
                                                {"logit_", kPositive, {0.1}},
                                                {"mvlgamma", kAboveOne, {2}},
                                                {"mvlgamma_", kAboveOne, {2}},
                                                {"polygamma_", kPositive, {2}},
                                                {"frexp.Tensor", kReal, {}, false},
                                                {"clamp", kReal, {-0.5, 0.5}},
                                                {"clamp_", kReal, {-0.5, 0.5}},
                                                {"clamp_min", kReal, {0.1}},
                                                {"clamp_min_", kReal, {0.1}},
                                                {"clamp_max", kReal, {0.1}},
                                                {"clamp_max_", kReal, {0.1}},
                                                {"zero_", kReal},
                                                {"zero", kReal},
                                                {"fill_.Scalar", kReal, {2.5}},
                                                {"fill.Scalar", kReal, {2.5}}};
  return *all;
}

TEST(UnaryRules, Matrix) {
  for (const Row& row : rows()) check(row, {2, 3});
}

TEST(UnaryRules, ZeroDim) {
  for (const Row& row : rows()) check(row, {});
}

TEST(UnaryRules, Special) {
  using enum Domain;
  for (const Row& row : std::vector<Row>{{"special_entr", kPositive},
                                         {"special_erfcx"},
                                         {"special_i0e"},
                                         {"special_i1"},
                                         {"special_log_ndtr"},
                                         {"special_bessel_j0", kReal, {}, false},
                                         {"special_airy_ai", kReal, {}, false},
                                         {"special_ndtri", kUnit, {}, false}}) {
    check(row, {2, 3});
    check(row, {});
  }
}

TEST(UnaryRules, NumberBeforeTheTensor) {
  check_rule({.name = "polygamma",
              .f =
                  [](const Tensors& in) {
                    return call_op("aten::polygamma", {1, in[0]});
                  },
              .make =
                  [](int64_t) {
                    return Tensors{positive({2, 3})};
                  }});
}

TEST(UnaryRules, SecondOrder) {
  for (const char* op : {"sin", "exp", "tanh", "sigmoid"}) {
    check_rule(
        {.name = op,
         .f = [op](const Tensors& in) { return call_op(std::string("aten::") + op, {in[0]}); },
         .make =
             [](int64_t) {
               return Tensors{randn({2, 3})};
             },
         .second_order = true});
  }
}

TEST(UnaryRules, SpecialPolynomials) {
  for (const char* op : {"chebyshev_polynomial_t", "zeta"}) {
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(std::string("aten::special_") + op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{positive({2, 1}).add(1), positive({3}).add(1)};
                    },
                .differentiable = false});
  }
}

}  // namespace
}  // namespace torchlift::testing
