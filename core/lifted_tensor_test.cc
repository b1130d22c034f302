#include "core/lifted_tensor.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <vector>

#include "core/dispatch.h"
#include "core/error.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

TEST(LiftedTensorTest, ShowsTheShapeOfOneExample) {
  const at::Tensor value = at::ones({3, 8, 5});
  const LevelScope scope({.size = 8});
  const at::Tensor x = lift(value, 1, scope.level());
  EXPECT_EQ(x.sizes(), (at::IntArrayRef{3, 5}));
  EXPECT_EQ(x.strides(), (at::IntArrayRef{40, 1}));
  EXPECT_EQ(x.numel(), 15);
  EXPECT_FALSE(x.is_contiguous());
  EXPECT_EQ(x.scalar_type(), at::kFloat);
  EXPECT_TRUE(x.is_cpu());
  EXPECT_FALSE(x.requires_grad());
  EXPECT_EQ(depth_of(x), 1);
  EXPECT_EQ(depth_of(value), 0);
}

TEST(LiftedTensorTest, WithoutABatchDimShowsTheValuesShape) {
  const at::Tensor values = at::ones({8});
  const LevelScope scope({.size = 8});
  const at::Tensor scalar = lift(values[0], std::nullopt, scope.level());
  EXPECT_EQ(scalar.dim(), 0);
  const at::Tensor example = lift(values, 0, scope.level());
  EXPECT_EQ(example.dim(), 0);
}

TEST(LiftedTensorTest, LowerGivesTheValueBack) {
  const at::Tensor value = at::ones({2, 3});
  const LevelScope outer({.size = 2});
  const LevelScope inner({.size = 3});
  const at::Tensor x = lift(value, 0, outer.level());
  const at::Tensor y = lift(x, 0, inner.level());
  const Lowered once = lower(y, *inner.level());
  EXPECT_TRUE(once.value.is_same(x));
  EXPECT_EQ(once.bdim, 0);
  EXPECT_TRUE(lower(once.value, *outer.level()).value.is_same(value));
  // A tensor from outside has no batch dim at this level.
  EXPECT_EQ(lower(x, *inner.level()).bdim, std::nullopt);
  EXPECT_EQ(lower(value, *inner.level()).bdim, std::nullopt);
}

TEST(LiftedTensorTest, AnAliasSharesTheVersionCounter) {
  const at::Tensor value = at::ones({2, 3});
  const LevelScope scope({.size = 2});
  const at::Tensor x = lift_alias(value, 0, scope.level());
  value.unsafeGetTensorImpl()->bump_version();
  EXPECT_EQ(x._version(), value._version());
}

TEST(LiftedTensorTest, AnEscapedTensorNamesItsLevel) {
  at::Tensor escaped;
  {
    const LevelScope scope({.size = 2});
    escaped = lift(at::ones({2, 3}), 0, scope.level());
    check_alive(escaped);
  }
  for (const auto& use : std::vector<std::function<void()>>{[&] { check_alive(escaped); },
                                                            [&] { (void)escaped.sin(); },
                                                            [&] { (void)escaped.mul(2); }}) {
    try {
      use();
      FAIL() << "expected an error";
    } catch (const UnsupportedError& e) {
      EXPECT_THAT(e.what_without_backtrace(), HasSubstr("vmap level 1 (size 2)"));
      EXPECT_THAT(e.what_without_backtrace(), HasSubstr("escaped from the function"));
    }
  }
}

TEST(LiftedTensorTest, HasNoData) {
  const LevelScope scope({.size = 2});
  const at::Tensor x = lift(at::ones({2, 3}), 0, scope.level());
  try {
    (void)x.data_ptr();
    FAIL() << "expected an error";
  } catch (const c10::Error& e) {
    EXPECT_THAT(e.what_without_backtrace(), HasSubstr("no data pointer"));
  }
}

TEST(LiftedTensorTest, TrackedMeansAutogradWouldRecord) {
  at::Tensor x = at::ones({2});
  EXPECT_FALSE(is_tracked(x));
  x.set_requires_grad(true);
  EXPECT_TRUE(is_tracked(x));
  const c10::NoGradGuard no_grad;
  EXPECT_FALSE(is_tracked(x));
}

TEST(LiftedTensorTest, HidesWhatAutogradOfTheLevelMustNotSee) {
  const at::Tensor plain = at::ones({2}), meta = at::ones({2}, at::kMeta);
  const at::Tensor tracked = at::ones({2}).set_requires_grad(true);
  const LevelScope scope({.size = 2});
  EXPECT_FALSE(needs_hiding(plain, *scope.level()));
  EXPECT_TRUE(needs_hiding(tracked, *scope.level()));
  EXPECT_FALSE(needs_hiding(lift(tracked, 0, scope.level()), *scope.level()));
  EXPECT_TRUE(needs_hiding(meta, *scope.level()));
}

}  // namespace
}  // namespace torchlift
