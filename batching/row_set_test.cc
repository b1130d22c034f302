#include "batching/row_set.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::ElementsAre;

class RowSetTest : public ::testing::Test {
 protected:
  std::vector<bool> mask(const std::vector<int>& entries) {
    return std::vector<bool>(entries.begin(), entries.end());
  }

  const LevelScope outer{{.size = 3}};
  const LevelScope inner{{.size = 4}};
  const RowSet all{{outer.level(), inner.level()}, c10::Device(c10::kCPU)};
  // What row i holds is i.
  const Tensor numbers =
      lift(lift(at::arange(12, at::kDouble).view({3, 4}), 0, outer.level()), 0, inner.level());

  // The numbers in the slots of a set.
  Tensor values(const Tensor& t) {
    const Tensor value(as_lifted(t)->value());
    return Tensor(as_lifted(value)->value()).flatten();
  }
};

TEST_F(RowSetTest, PairsFillSlots) {
  // The example of NOTE [rows of several levels].
  const RowSet set = all.where(mask({1, 0, 1, 0, /**/ 0, 0, 0, 0, /**/ 0, 1, 0, 0}));
  EXPECT_EQ(set.rows(), 12);
  EXPECT_THAT(set.slots(), ElementsAre(0, 2, 9, 9));
  EXPECT_EQ(set.levels()[0]->size(), 2);
  EXPECT_EQ(set.levels()[1]->size(), 2);
  EXPECT_EQ(set.levels()[1]->describe(), "vmap level 2 (2 of its 4 examples)");
  const Tensor moved = RowMover({&all}, set)({numbers});
  EXPECT_TRUE(at::equal(values(moved), at::tensor(std::vector<double>{0, 2, 9, 9})));
  EXPECT_EQ(set.read(moved.gt(1)), mask({0, 1, 1, 1}));
}

// See NOTE [narrowed levels] in core/narrow.h.
TEST_F(RowSetTest, ALevelWithAllOfItsExamplesStaysUnlessItIsInside) {
  const RowSet inside = all.where(mask({1, 1, 1, 1, /**/ 0, 0, 0, 0, /**/ 1, 1, 1, 1}));
  EXPECT_EQ(inside.levels()[0]->size(), 2);
  EXPECT_EQ(inside.levels()[1]->base(), inner.level().get());
  EXPECT_EQ(inside.levels()[1]->size(), 4);
  const RowSet around = all.where(mask({1, 0, 1, 0, /**/ 1, 0, 0, 0, /**/ 0, 1, 0, 1}));
  EXPECT_EQ(around.levels()[0], outer.level());
  EXPECT_EQ(around.levels()[1]->size(), 2);
  EXPECT_EQ(all.where(std::vector<bool>(12, true)).levels(), all.levels());
}

TEST_F(RowSetTest, PartsPutTogetherAreTheWhole) {
  const auto first = mask({1, 0, 1, 0, /**/ 0, 0, 0, 0, /**/ 0, 1, 0, 0});
  const auto second = mask({0, 1, 0, 1, /**/ 0, 0, 1, 0, /**/ 0, 0, 0, 1});
  const auto third = mask({0, 0, 0, 0, /**/ 1, 1, 0, 1, /**/ 1, 0, 1, 0});
  const std::vector<RowSet> sets{all.where(first), all.where(second), all.where(third)};
  std::vector<const RowSet*> pointers;
  std::vector<Tensor> parts;
  for (const RowSet& set : sets) {
    pointers.push_back(&set);
    parts.push_back(RowMover({&all}, set)({numbers}));
  }
  EXPECT_TRUE(at::equal(values(RowMover(pointers, all)(parts)), at::arange(12, at::kDouble)));
}

TEST_F(RowSetTest, OperatorsInAScopeAreOfItsRows) {
  const RowSet set = all.where(mask({0, 0, 1, 1, /**/ 0, 0, 0, 0, /**/ 0, 1, 0, 1}));
  {
    const RowScope scope(set);
    const Tensor twice = numbers.mul(2);
    EXPECT_EQ(as_lifted(twice)->level_ptr(), set.levels()[1]);
    EXPECT_TRUE(at::equal(values(twice), at::tensor(std::vector<double>{4, 6, 18, 22})));
    EXPECT_EQ(current_level(), set.levels()[1].get());
  }
  EXPECT_EQ(current_level(), inner.level().get());
  EXPECT_EQ(values(numbers.mul(2)).numel(), 12);
}

TEST_F(RowSetTest, LevelsOfACondition) {
  EXPECT_EQ(batched_levels(numbers), all.levels());
  const Tensor one = lift(at::arange(3), 0, outer.level());
  EXPECT_EQ(batched_levels(one), std::vector<LevelPtr>{outer.level()});
  EXPECT_TRUE(batched_levels(at::arange(3)).empty());
  EXPECT_TRUE(read_shared(lift(at::arange(3).eq(1)[1], std::nullopt, inner.level())));
}

}  // namespace
}  // namespace torchlift
