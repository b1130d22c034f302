#include "compile/passes/view_cleanup.h"

#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "compile/passes/dead_code.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

ValueId sine(GraphBuilder& b, ValueId x) { return b.call("aten::sin", {{"self", ref(x)}}); }
ValueId view(GraphBuilder& b, ValueId x, std::vector<int64_t> sizes) {
  return b.call("aten::view", {{"self", ref(x)}, {"size", ints(std::move(sizes))}});
}

size_t nodes_left(const Graph& before, const std::vector<int64_t>& symbols = {}) {
  Graph after = before;
  view_cleanup(after);
  dead_code(after);
  expect_same(before, after, symbols);
  return after.nodes.size();
}

TEST(ViewCleanupTest, WhatChangesNothingGoes) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  ValueId y = b.call("aten::clone", {{"self", ref(x)}});
  y = b.call("aten::detach", {{"self", ref(y)}});
  y = view(b, y, {3, 4});
  y = b.call("aten::expand", {{"self", ref(y)}, {"size", ints({3, -1})}});
  y = b.call("aten::slice.Tensor", {{"self", ref(y)}, {"dim", number(1)}});
  y = b.call("aten::contiguous", {{"self", ref(y)}});
  y = b.call("aten::_to_copy", {{"self", ref(y)}, {"dtype", number(int64_t{6})}});
  EXPECT_EQ(nodes_left(b.finish({sine(b, y)})), 1U);
}

TEST(ViewCleanupTest, CopiesThatChangeStridesOrDtypesStay) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  ValueId y = b.call("aten::t", {{"self", ref(x)}});
  y = b.call("aten::contiguous", {{"self", ref(y)}});
  y = b.call("aten::_to_copy", {{"self", ref(y)}, {"dtype", number(int64_t{7})}});
  EXPECT_EQ(nodes_left(b.finish({sine(b, y)})), 4U);
}

TEST(ViewCleanupTest, AnOutputThatIsACopyStaysOne) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  EXPECT_EQ(nodes_left(b.finish({b.call("aten::clone", {{"self", ref(x)}})})), 1U);
  GraphBuilder c;
  const ValueId s = sine(c, c.input(at::randn({3})));
  EXPECT_EQ(nodes_left(c.finish({s, c.call("aten::clone", {{"self", ref(s)}})})), 2U);
}

TEST(ViewCleanupTest, ChainsOfViewsBecomeOne) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 6}));
  ValueId y = view(b, x, {24});
  y = b.call("aten::unsqueeze", {{"self", ref(y)}, {"dim", number(0)}});
  y = view(b, y, {2, 12});
  EXPECT_EQ(nodes_left(b.finish({sine(b, y)})), 2U);
}

TEST(ViewCleanupTest, ChainsThatComeBackGo) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 6}));
  b.dynamic(0, "n");
  ValueId y = b.call("aten::unsqueeze", {{"self", ref(x)}, {"dim", number(1)}});
  y = b.call("aten::squeeze.dim", {{"self", ref(y)}, {"dim", number(1)}});
  const Graph graph = b.finish({sine(b, y)});
  EXPECT_EQ(nodes_left(graph, {4}), 1U);
  EXPECT_EQ(nodes_left(graph, {1}), 1U);
}

TEST(ViewCleanupTest, AReshapeThatCopiedIsNoView) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 6}));
  const ValueId t = b.call("aten::t", {{"self", ref(x)}});
  ValueId y = b.call("aten::reshape", {{"self", ref(t)}, {"shape", ints({24})}});
  y = view(b, y, {3, 8});
  EXPECT_EQ(nodes_left(b.finish({sine(b, y)})), 4U);
}

TEST(ViewCleanupTest, ViewsThatAreNotInOrderStay) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 4}, at::kComplexDouble));
  ValueId y = b.call("aten::_conj", {{"self", ref(x)}});
  EXPECT_EQ(nodes_left(b.finish({b.call("aten::sin", {{"self", ref(y)}})})), 2U);
}

TEST(ViewCleanupTest, RandomPrograms) {
  int64_t changed = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Graph before = random_graph(seed, {.nodes = 40, .writes = true});
    functionalize(before);
    Graph after = before;
    changed += view_cleanup(after);
    expect_same(before, after);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(changed, 50);
}

}  // namespace
}  // namespace torchlift::compile
