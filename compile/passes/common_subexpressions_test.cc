#include "compile/passes/common_subexpressions.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

TEST(CommonSubexpressionsTest, ComputesOnce) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId a = b.call("aten::sin", {{"self", ref(x)}});
  const ValueId c = b.call("aten::sin", {{"self", ref(x)}});
  const ValueId p = b.call("aten::mul.Tensor", {{"self", ref(a)}, {"other", ref(c)}});
  const ValueId q = b.call("aten::mul.Tensor", {{"self", ref(c)}, {"other", ref(a)}});
  const ValueId y = b.call("aten::sub.Tensor", {{"self", ref(p)}, {"other", ref(q)}});
  const Graph before = b.finish({y});
  Graph after = before;
  EXPECT_EQ(common_subexpressions(after), 2);
  expect_same(before, after);
  EXPECT_EQ(after.nodes.size(), 3U);
}

TEST(CommonSubexpressionsTest, ZerosOfEitherSignAreTwoNumbers) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId a = b.call("aten::mul.Scalar", {{"self", ref(x)}, {"other", number(0.0)}});
  const ValueId c = b.call("aten::mul.Scalar", {{"self", ref(x)}, {"other", number(-0.0)}});
  const ValueId y = b.call("aten::div.Tensor", {{"self", ref(a)}, {"other", ref(c)}});
  const ValueId i = b.call("aten::mul.Scalar", {{"self", ref(x)}, {"other", number(int64_t{0})}});
  const Graph before = b.finish({y, i});
  Graph after = before;
  EXPECT_EQ(common_subexpressions(after), 0);
}

TEST(CommonSubexpressionsTest, RandomNumbersAreDrawnAsOftenAsBefore) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId a = b.call("aten::rand_like", {{"self", ref(x)}});
  const ValueId c = b.call("aten::rand_like", {{"self", ref(x)}});
  const ValueId y = b.call("aten::sub.Tensor", {{"self", ref(a)}, {"other", ref(c)}});
  Graph graph = b.finish({y});
  EXPECT_EQ(common_subexpressions(graph), 0);
}

TEST(CommonSubexpressionsTest, OutputsStayTensorsOfTheirOwn) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId a = b.call("aten::sin", {{"self", ref(x)}});
  const ValueId c = b.call("aten::sin", {{"self", ref(x)}});
  const ValueId view = b.call("aten::view", {{"self", ref(c)}, {"size", ints({3, 1})}});
  Graph graph = b.finish({a, view});
  EXPECT_EQ(common_subexpressions(graph), 0);
}

TEST(CommonSubexpressionsTest, EqualConstants) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  ValueId y = b.call("aten::mul.Tensor",
                     {{"self", ref(x)}, {"other", ref(b.constant(at::full({3}, 2.0)))}});
  y = b.call("aten::mul.Tensor",
             {{"self", ref(y)}, {"other", ref(b.constant(at::full({3}, 2.0)))}});
  y = b.call("aten::mul.Tensor",
             {{"self", ref(y)}, {"other", ref(b.constant(at::full({3}, 2.0, at::kDouble)))}});
  const Graph before = b.finish({y});
  Graph after = before;
  EXPECT_EQ(common_subexpressions(after), 1);
  expect_same(before, after);
}

TEST(CommonSubexpressionsTest, RandomPrograms) {
  int64_t merged = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Graph before = random_graph(seed, {.nodes = 40, .writes = true});
    functionalize(before);
    Graph after = before;
    merged += common_subexpressions(after);
    expect_same(before, after);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(merged, 20);
}

TEST(CommonSubexpressionsTest, GraphsThatWriteAreRefused) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  b.call("aten::sin_", {{"self", ref(x)}});
  Graph graph = b.finish({x});
  try {
    common_subexpressions(graph);
    FAIL();
  } catch (const TransformError& error) {
    EXPECT_THAT(error.what(),
                ::testing::HasSubstr("common_subexpressions is for graphs without writes, and got "
                                     "one with aten::sin_. Run functionalize() first."));
  }
}

}  // namespace
}  // namespace torchlift::compile
