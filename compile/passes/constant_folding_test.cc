#include "compile/passes/constant_folding.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "compile/passes/dead_code.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

TEST(ConstantFoldingTest, RunsOperatorsOfConstants) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 2}));
  const ValueId c = b.constant(at::randn({2, 3}));
  const ValueId t = b.call("aten::t", {{"self", ref(c)}});
  const ValueId s = b.call("aten::sin", {{"self", ref(t)}});
  const ValueId zeros = b.call("aten::zeros", {{"size", ints({3, 2})}});
  const ValueId k = b.call("aten::add.Tensor", {{"self", ref(s)}, {"other", ref(zeros)}});
  const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(k)}});
  const Graph before = b.finish({y});
  Graph after = before;
  EXPECT_EQ(constant_folding(after), 3);
  verify(after);
  dead_code(after);
  EXPECT_EQ(after.nodes.size(), 1U);
  expect_same(before, after);
}

TEST(ConstantFoldingTest, ResultsThatGrowAreBounded) {
  const auto graph_of = [](int64_t n) {
    GraphBuilder b;
    const ValueId x = b.input(at::randn({}));
    const ValueId c = b.constant(at::ones({8}));
    const ValueId big = b.call("aten::expand", {{"self", ref(c)}, {"size", ints({n, 8})}});
    const ValueId s = b.call("aten::sin", {{"self", ref(big)}});
    const ValueId small = b.call("aten::sum", {{"self", ref(s)}});
    return b.finish({b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(small)}})});
  };
  Graph graph = graph_of(4);
  EXPECT_EQ(constant_folding(graph, {.max_bytes = 128}), 2);
  // An expanded constant is as large as what it holds.
  graph = graph_of(400);
  EXPECT_EQ(constant_folding(graph, {.max_bytes = 128}), 0);
  GraphBuilder b;
  const ValueId zeros = b.call("aten::zeros", {{"size", ints({100})}});
  const ValueId y = b.call("aten::sin", {{"self", ref(zeros)}});
  graph = b.finish({y});
  EXPECT_EQ(constant_folding(graph, {.max_bytes = 399}), 0);
}

TEST(ConstantFoldingTest, OutputsAreMadeAnewInEveryRun) {
  GraphBuilder b;
  const ValueId zeros = b.call("aten::zeros", {{"size", ints({3})}});
  const ValueId view = b.call("aten::view", {{"self", ref(zeros)}, {"size", ints({3, 1})}});
  Graph graph = b.finish({view});
  EXPECT_EQ(constant_folding(graph), 0);
}

TEST(ConstantFoldingTest, RandomNumbersAndMemoryThatNobodyWroteStay) {
  GraphBuilder b;
  const ValueId r = b.call("aten::rand", {{"size", ints({3})}});
  const ValueId e = b.call("aten::empty.memory_format", {{"size", ints({3})}});
  const ValueId y = b.call("aten::add.Tensor", {{"self", ref(r)}, {"other", ref(e)}});
  Graph graph = b.finish({b.call("aten::sin", {{"self", ref(y)}})});
  EXPECT_EQ(constant_folding(graph), 0);
}

TEST(ConstantFoldingTest, RandomPrograms) {
  int64_t folded = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Graph before = random_graph(seed, {.nodes = 40, .writes = true});
    functionalize(before);
    Graph after = before;
    folded += constant_folding(after);
    expect_same(before, after);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(folded, 10);
}

}  // namespace
}  // namespace torchlift::compile
