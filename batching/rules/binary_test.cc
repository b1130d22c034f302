#include <ATen/ScalarOps.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mul.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "batching/testing/call_op.h"
#include "batching/testing/rule_check.h"
#include "core/lifted_tensor.h"
#include "core/testing.h"

namespace torchlift::testing {
namespace {

using Shape = std::vector<int64_t>;

struct Row {
  std::string op;
  std::vector<c10::IValue> more = {};  // arguments after the two tensors
  bool differentiable = true;
  bool integers = false;
};

bool is_in_place(const std::string& op) {
  return op.find("_.") != std::string::npos || op.back() == '_';
}

// Integers from 1 to 5 also serve as shifts and divisors.
at::Tensor input(const Row& row, const Shape& shape) {
  return row.integers ? integers(1, 6, shape) : positive(shape);
}

void check(const Row& row, const Shape& a, const Shape& b) {
  check_rule(
      {.name = row.op,
       .f =
           [&](const Tensors& in) {
             std::vector<c10::IValue> args{is_in_place(row.op) ? in[0].clone() : in[0], in[1]};
             args.insert(args.end(), row.more.begin(), row.more.end());
             return call_op("aten::" + row.op, args);
           },
       .make =
           [&](int64_t) {
             return Tensors{input(row, a), input(row, b)};
           },
       .always_batched = is_in_place(row.op) ? std::vector<size_t>{0} : std::vector<size_t>{},
       .differentiable = row.differentiable && !row.integers});
}

const std::vector<Row>& tensor_rows() {
  static const auto* all = new std::vector<Row>{{"add.Tensor", {2}},
                                                {"sub.Tensor", {0.5}},
                                                {"rsub.Tensor"},
                                                {"mul.Tensor"},
                                                {"div.Tensor"},
                                                {"div.Tensor_mode", {"floor"}, false},
                                                {"div.Tensor_mode", {"trunc"}, false},
                                                {"floor_divide", {}, false},
                                                {"pow.Tensor_Tensor"},
                                                {"fmod.Tensor"},
                                                {"remainder.Tensor"},
                                                {"atan2"},
                                                {"maximum"},
                                                {"minimum"},
                                                {"fmax"},
                                                {"fmin"},
                                                {"hypot"},
                                                {"copysign.Tensor"},
                                                {"logaddexp"},
                                                {"logaddexp2"},
                                                {"xlogy.Tensor"},
                                                {"heaviside", {}, false},
                                                {"nextafter", {}, false},
                                                {"igamma", {}, false},
                                                {"igammac", {}, false},
                                                {"gcd", {}, false, true},
                                                {"lcm", {}, false, true},
                                                {"add.Tensor", {2}, false, true},
                                                {"ldexp.Tensor", {}, false},
                                                {"eq.Tensor", {}, false, true},
                                                {"ne.Tensor", {}, false, true},
                                                {"lt.Tensor", {}, false},
                                                {"le.Tensor", {}, false},
                                                {"gt.Tensor", {}, false},
                                                {"ge.Tensor", {}, false},
                                                {"bitwise_and.Tensor", {}, false, true},
                                                {"bitwise_or.Tensor", {}, false, true},
                                                {"bitwise_xor.Tensor", {}, false, true},
                                                {"bitwise_left_shift.Tensor", {}, false, true},
                                                {"bitwise_right_shift.Tensor", {}, false, true},
                                                {"__lshift__.Tensor", {}, false, true},
                                                {"__rshift__.Tensor", {}, false, true},
                                                {"logical_and", {}, false, true},
                                                {"logical_or", {}, false, true},
                                                {"logical_xor", {}, false, true},
                                                {"complex", {}, false},
                                                {"polar", {}, false}};
  return *all;
}

const std::vector<Row>& in_place_rows() {
  static const auto* all = new std::vector<Row>{{"add_.Tensor", {2}},
                                                {"sub_.Tensor", {0.5}},
                                                {"mul_.Tensor"},
                                                {"div_.Tensor"},
                                                {"div_.Tensor_mode", {"floor"}, false},
                                                {"floor_divide_.Tensor", {}, false},
                                                {"pow_.Tensor"},
                                                {"fmod_.Tensor"},
                                                {"remainder_.Tensor"},
                                                {"atan2_"},
                                                {"hypot_"},
                                                {"copysign_.Tensor"},
                                                {"xlogy_.Tensor"},
                                                {"nextafter_", {}, false},
                                                {"gcd_", {}, false, true},
                                                {"lcm_", {}, false, true},
                                                {"eq_.Tensor", {}, false, true},
                                                {"lt_.Tensor", {}, false},
                                                {"bitwise_and_.Tensor", {}, false, true},
                                                {"bitwise_left_shift_.Tensor", {}, false, true},
                                                {"__ilshift__.Tensor", {}, false, true},
                                                {"logical_and_", {}, false, true}};
  return *all;
}

TEST(BinaryRules, SameShape) {
  for (const Row& row : tensor_rows()) check(row, {2, 3}, {2, 3});
}

TEST(BinaryRules, Broadcast) {
  for (const Row& row : tensor_rows()) check(row, {2, 3}, {3});
  check({"mul.Tensor"}, {3}, {2, 1, 3});
  check({"add.Tensor"}, {2, 1}, {3});
}

TEST(BinaryRules, ZeroDim) {
  for (const Row& row : tensor_rows()) check(row, {}, {});
  for (const char* op : {"add.Tensor", "mul.Tensor", "pow.Tensor_Tensor", "lt.Tensor"}) {
    check({op, {}, false}, {2, 3}, {});
    check({op, {}, false}, {}, {2, 3});
  }
  check({"mul.Tensor"}, {2, 3}, {});
  check({"mul.Tensor"}, {}, {2, 3});
}

TEST(BinaryRules, InPlace) {
  for (const Row& row : in_place_rows()) {
    if (row.op.rfind("__i", 0) == 0) continue;  // its name does not end as those of the others
    check(row, {2, 3}, {2, 3});
    check(row, {2, 3}, {3});
    check(row, {}, {});
  }
}

TEST(BinaryRules, InPlaceShift) {
  for (const char* op : {"aten::__ilshift__.Tensor", "aten::__irshift__.Tensor"}) {
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{integers(1, 6, {2, 3}), integers(1, 6, {3})};
                    },
                .always_batched = {0},
                .differentiable = false});
  }
}

TEST(BinaryRules, SecondOrder) {
  for (const char* op : {"aten::mul.Tensor", "aten::div.Tensor", "aten::pow.Tensor_Tensor"}) {
    check_rule({.name = op,
                .f =
                    [op](const Tensors& in) {
                      return call_op(op, {in[0], in[1]});
                    },
                .make =
                    [](int64_t) {
                      return Tensors{positive({2, 3}), positive({3})};
                    },
                .second_order = true});
  }
}

struct ScalarRow {
  std::string op;
  bool integers = false;
  bool number_first = false;
};

TEST(BinaryRules, Numbers) {
  for (const ScalarRow& row : std::vector<ScalarRow>{{"add.Scalar"},
                                                     {"sub.Scalar"},
                                                     {"rsub.Scalar"},
                                                     {"mul.Scalar"},
                                                     {"div.Scalar"},
                                                     {"pow.Tensor_Scalar"},
                                                     {"pow.Scalar", false, true},
                                                     {"fmod.Scalar"},
                                                     {"remainder.Scalar"},
                                                     {"remainder.Scalar_Tensor", true, true},
                                                     {"xlogy.Scalar_Other"},
                                                     {"xlogy.Scalar_Self", false, true},
                                                     {"copysign.Scalar"},
                                                     {"eq.Scalar", true},
                                                     {"lt.Scalar", true},
                                                     {"bitwise_and.Scalar", true},
                                                     {"bitwise_and.Scalar_Tensor", true, true},
                                                     {"__lshift__.Scalar", true},
                                                     {"bitwise_left_shift.Tensor_Scalar", true},
                                                     {"add_.Scalar"},
                                                     {"mul_.Scalar"},
                                                     {"sub_.Scalar"},
                                                     {"div_.Scalar"},
                                                     {"pow_.Scalar"},
                                                     {"fmod_.Scalar"},
                                                     {"lt_.Scalar", true},
                                                     {"bitwise_and_.Scalar", true},
                                                     {"floor_divide.Scalar", true}}) {
    const c10::IValue number = row.integers ? c10::IValue(3) : c10::IValue(0.7);
    check_rule(
        {.name = row.op,
         .f =
             [&](const Tensors& in) {
               const c10::IValue x(is_in_place(row.op) ? in[0].clone() : in[0]);
               return call_op("aten::" + row.op, row.number_first
                                                     ? std::vector<c10::IValue>{number, x}
                                                     : std::vector<c10::IValue>{x, number});
             },
         .make =
             [&](int64_t) {
               return Tensors{row.integers ? integers(1, 6, {2, 3}) : positive({2, 3})};
             },
         .always_batched = is_in_place(row.op) ? std::vector<size_t>{0} : std::vector<size_t>{},
         .differentiable = !row.integers});
  }
}

// See NOTE [type promotion of examples] in pointwise.h.
TEST(BinaryRules, TypePromotionOfExamples) {
  const std::vector<at::ScalarType> dtypes{at::kBool,  at::kInt,    at::kLong,
                                           at::kFloat, at::kDouble, at::kComplexFloat};
  for (const Shape& a : {Shape{}, Shape{3}}) {
    for (const Shape& b : {Shape{}, Shape{3}, Shape{2, 1}}) {
      for (const auto left : dtypes) {
        for (const auto right : dtypes) {
          check_rule({.name = std::string(toString(left)) + " * " + toString(right),
                      .f = [](const Tensors& in) { return Tensors{at::mul(in[0], in[1])}; },
                      .make =
                          [&](int64_t) {
                            return Tensors{integers(0, 4, a).to(left), integers(0, 4, b).to(right)};
                          },
                      .differentiable = false});
        }
      }
    }
  }
}

// What libtorch makes of the number in `x * 2.5`.
at::Tensor wrapped(const at::Scalar& number) { return at::native::wrapped_scalar_tensor(number); }

TEST(BinaryRules, WrappedNumbersDoNotPromote) {
  check_rule({.name = "float * 2.5",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::mul(in[0], wrapped(2.5)), at::mul(in[0], wrapped(3))};
                  },
              .make = [](int64_t) { return Tensors{randn({}).to(at::kFloat)}; },
              .tolerance = 1e-6});
  check_rule({.name = "int * 2.5",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::mul(in[0], wrapped(2.5)), at::mul(in[0], wrapped(3))};
                  },
              .make = [](int64_t) { return Tensors{integers(0, 4, {})}; },
              .differentiable = false});
}

TEST(BinaryRules, ErrorsOfInPlace) {
  LevelScope scope({.size = 4, .randomness = Randomness::kSame});
  const at::Tensor x = lift(randn({4, 3}), 0, scope.level());
  at::Tensor target = randn({3});
  EXPECT_THAT(error_of([&] { target.add_(x); }),
              ::testing::HasSubstr("that has no batch dimension"));
  at::Tensor small = lift(randn({4, 3}), 0, scope.level());
  const at::Tensor big = lift(randn({4, 2, 3}), 0, scope.level());
  EXPECT_THAT(error_of([&] { small.mul_(big); }),
              ::testing::HasSubstr("output with shape [3] doesn't match the broadcast shape"));
}

}  // namespace
}  // namespace torchlift::testing
