#include <ATen/core/Tensor.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/_is_all_true.h>
#include <ATen/ops/_is_any_true.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/unique_consecutive.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "batching/testing/rule_check.h"
#include "core/level.h"
#include "core/lifted_tensor.h"

namespace torchlift::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

template <class F>
std::string message_of(F f) {
  try {
    f();
  } catch (const c10::Error& e) {
    return e.what_without_backtrace();
  }
  return "no error";
}

class DataDependent : public ::testing::Test {
 protected:
  const LevelScope scope{{.size = 4}};
  const at::Tensor x = lift_alias(at::zeros({4, 6}), 0, scope.level());
  const at::Tensor number = x.select(0, 0);
  const at::Tensor whole = lift_alias(at::zeros({4, 6}, at::kLong), 0, scope.level());
};

TEST_F(DataDependent, ItemNamesThreeCausesAndFixes) {
  const auto fixes = AllOf(HasSubstr("torch.where(x > 0, a, b)"), HasSubstr("index_select(0, i)"),
                           HasSubstr("keep it a tensor"));
  EXPECT_THAT(message_of([&] { number.item<double>(); }), fixes);
  EXPECT_THAT(message_of([&] { static_cast<void>(number.is_nonzero()); }), fixes);
}

// Where all examples have the same value, it can be read.
TEST_F(DataDependent, ItemOfAnUnbatchedTensor) {
  EXPECT_EQ(lift_alias(at::ones({}), std::nullopt, scope.level()).item<double>(), 1);
}

TEST_F(DataDependent, Equal) {
  EXPECT_THAT(message_of([&] { at::equal(x, x); }), HasSubstr("(x == y).all()"));
  EXPECT_THAT(message_of([&] { at::allclose(x, x); }), HasSubstr("torch.isclose(x, y).all()"));
}

TEST_F(DataDependent, Shapes) {
  EXPECT_THAT(message_of([&] { at::nonzero(x); }), HasSubstr("torch.where(mask, x, y)"));
  EXPECT_THAT(message_of([&] { at::_unique2(x); }), HasSubstr("Use torch.sort"));
  EXPECT_THAT(message_of([&] { at::unique_consecutive(x); }), HasSubstr("Use torch.sort"));
  EXPECT_THAT(message_of([&] { at::bincount(whole); }), HasSubstr("scatter_add"));
  EXPECT_THAT(message_of([&] { at::repeat_interleave(whole); }), HasSubstr("Pass repeats"));
  EXPECT_THAT(message_of([&] { at::one_hot(whole); }), HasSubstr("num_classes=10"));
}

TEST_F(DataDependent, AssertAsyncChecksAllExamples) {
  at::_assert_async(lift_alias(at::ones({4}), 0, scope.level()));
  EXPECT_THAT(message_of([&] { at::_assert_async(number, "all must be true"); }),
              HasSubstr("all must be true"));
}

TEST_F(DataDependent, OneHotChecksTheClasses) {
  EXPECT_THAT(message_of([&] { at::one_hot(whole.add(3), 3); }),
              HasSubstr("smaller than num_classes"));
}

TEST(DataDependentRules, OfEachExample) {
  check_rule({.name = "one_hot",
              .f = [](const Tensors& in) { return Tensors{at::one_hot(in[0], 5)}; },
              .make =
                  [](int64_t) {
                    return Tensors{integers(0, 5, {3, 2})};
                  },
              .differentiable = false});
  check_rule({.name = "_is_all_true",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::_is_all_true(in[0].gt(0)), at::_is_any_true(in[0].gt(2))};
                  },
              .make = [](int64_t) { return Tensors{randn({2})}; },
              .differentiable = false});
}

}  // namespace
}  // namespace torchlift::testing
