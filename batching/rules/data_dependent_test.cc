#include <ATen/core/Tensor.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/_is_all_true.h>
#include <ATen/ops/_is_any_true.h>
#include <ATen/ops/_unique2.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/one_hot.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/repeat_interleave.h>
#include <ATen/ops/tensor_split.h>
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

// One answer where all examples agree; else none.
TEST_F(DataDependent, Equal) {
  const at::Tensor counted = lift_alias(at::arange(24, at::kDouble).view({4, 6}), 0, scope.level());
  const at::Tensor first = at::arange(6, at::kDouble);
  EXPECT_TRUE(at::equal(x, at::zeros({6})));
  EXPECT_FALSE(at::equal(x, x.add(1)));
  EXPECT_FALSE(at::equal(x, at::zeros({5})));
  EXPECT_TRUE(at::allclose(counted, counted.add(1e-9)));
  EXPECT_FALSE(at::allclose(counted, counted.add(1)));
  EXPECT_THAT(message_of([&] { at::equal(counted, first); }), HasSubstr("(x == y).all()"));
  EXPECT_THAT(message_of([&] { at::allclose(counted, first); }),
              HasSubstr("torch.isclose(x, y).all()"));
}

TEST_F(DataDependent, EqualInNestedLevels) {
  const LevelScope inner({.size = 6});
  const at::Tensor each = lift_alias(x, 0, inner.level());  // a number, in both levels
  const at::Tensor counted = lift_alias(at::arange(6, at::kDouble), 0, inner.level());
  EXPECT_TRUE(at::equal(each, at::zeros({})));
  EXPECT_THAT(message_of([&] { at::equal(each, counted); }), HasSubstr("vmap level 2 (size 6)"));
}

TEST_F(DataDependent, TensorSplit) {
  const at::Tensor same = lift_alias(at::full({4, 2}, 2, at::kLong), 0, scope.level());
  const at::Tensor counted = lift_alias(at::arange(4, at::kLong), 0, scope.level());
  EXPECT_EQ(at::tensor_split(x, same, 0).size(), 3U);
  EXPECT_THAT(message_of([&] { at::tensor_split(x, counted, 0); }),
              HasSubstr("Pass numbers that all examples share"));
}

TEST_F(DataDependent, NarrowFromATensor) {
  const at::Tensor same = lift_alias(at::full({4}, 1, at::kLong), 0, scope.level());
  const at::Tensor differs = lift_alias(at::arange(4, at::kLong), 0, scope.level());
  EXPECT_TRUE(at::equal(at::narrow(x, 0, same, 2), at::narrow(x, 0, 1, 2)));
  EXPECT_THAT(message_of([&] { at::narrow(x, 0, differs, 1); }),
              HasSubstr("x.index_select(dim, start + torch.arange(length))"));
}

TEST_F(DataDependent, Shapes) {
  EXPECT_THAT(message_of([&] { at::nonzero(x); }), HasSubstr("torch.where(mask, x, y)"));
  EXPECT_THAT(message_of([&] { at::_unique2(x); }), HasSubstr("torchlift.unique(x, size=n)"));
  EXPECT_THAT(message_of([&] { at::unique_consecutive(x); }),
              HasSubstr("torchlift.unique(x, size=n)"));
  EXPECT_THAT(message_of([&] { at::repeat_interleave(whole); }), HasSubstr("Pass output_size"));
  const at::Tensor counted = lift_alias(at::arange(4, at::kLong), 0, scope.level());
  EXPECT_THAT(message_of([&] { at::one_hot(counted); }), HasSubstr("num_classes=10"));
  EXPECT_EQ(at::one_hot(whole.add(3)).size(1), 4);  // where the examples agree
}

TEST_F(DataDependent, Bincount) {
  const at::Tensor numbers = lift_alias(at::arange(24, at::kLong).view({4, 6}), 0, scope.level());
  EXPECT_EQ(at::bincount(whole).size(0), 1);
  EXPECT_EQ(at::bincount(numbers, {}, 30).size(0), 30);
  EXPECT_THAT(message_of([&] { at::bincount(numbers); }), HasSubstr("Pass minlength"));
  EXPECT_THAT(message_of([&] { at::bincount(numbers.sub(1), {}, 30); }), HasSubstr("non-negative"));
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

TEST_F(DataDependent, RepeatsWithAKnownSum) {
  const at::Tensor counted = lift_alias(at::arange(4, at::kLong), 0, scope.level());
  EXPECT_THAT(
      message_of([&] { at::repeat_interleave(counted.unsqueeze(0), std::optional<int64_t>(3)); }),
      HasSubstr("output_size is 3, but the repeats of some example have another sum"));
  EXPECT_THAT(message_of([&] {
                at::repeat_interleave(counted.unsqueeze(0).sub(1), std::optional<int64_t>(3));
              }),
              HasSubstr("repeats can not be negative"));
}

// Permutations, so that every example repeats to the same size.
TEST(DataDependentRules, RepeatInterleave) {
  check_rule({.name = "repeat_interleave",
              .f =
                  [](const Tensors& in) {
                    return Tensors{at::repeat_interleave(in[1], std::optional<int64_t>(6)),
                                   at::repeat_interleave(in[0], in[2], 0, 6)};
                  },
              .make =
                  [](int64_t i) {
                    const at::Tensor repeats = at::arange(4, at::kLong).roll(i);
                    return Tensors{randn({4, 2}), repeats, repeats.flip(0)};
                  },
              .tolerance = 1e-12});
}

TEST(DataDependentRules, OfEachExample) {
  check_rule({.name = "one_hot",
              .f = [](const Tensors& in) { return Tensors{at::one_hot(in[0], 5)}; },
              .make =
                  [](int64_t) {
                    return Tensors{integers(0, 5, {3, 2})};
                  },
              .differentiable = false});
  for (const bool weighted : {false, true}) {
    check_rule({.name = "bincount",
                .f =
                    [=](const Tensors& in) {
                      std::optional<at::Tensor> weights;
                      if (weighted) weights = in[1];
                      return Tensors{at::bincount(in[0], weights, 6)};
                    },
                .make =
                    [](int64_t) {
                      return Tensors{integers(0, 6, {7}), randn({7})};
                    },
                .always_batched = {static_cast<size_t>(0)},
                .differentiable = false});
  }
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
