#include "compile/passes/fusion_groups.h"

#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <string>
#include <vector>

#include "compile/passes/functionalize.h"
#include "compile/passes/node_facts.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

ValueId call(GraphBuilder& b, const std::string& op, ValueId x) {
  return b.call("aten::" + op, {{"self", ref(x)}});
}
ValueId add(GraphBuilder& b, ValueId x, ValueId y) {
  return b.call("aten::add.Tensor", {{"self", ref(x)}, {"other", ref(y)}});
}

TEST(FusionGroupsTest, ChainsOfPointwiseOperators) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId bias = b.input(at::randn({4}));
  const ValueId s = call(b, "sin", x);
  const ValueId t = add(b, s, bias);
  const ValueId u = call(b, "exp", t);
  const ValueId total = call(b, "sum", u);
  const ValueId root = call(b, "sqrt", total);
  Graph graph = b.finish({t, root});
  const auto groups = fusion_groups(graph);
  ASSERT_EQ(groups.size(), 1U);
  EXPECT_EQ(groups[0].count, 3U);
  EXPECT_EQ(groups[0].inputs, (std::vector<ValueId>{x, bias}));
  EXPECT_EQ(groups[0].outputs, (std::vector<ValueId>{t, u}));
  EXPECT_EQ(groups[0].sizes, graph.type(x).sizes);
}

// The sum lies between sin and mul: a kernel of both would need its own result.
TEST(FusionGroupsTest, NoPathLeavesAGroupAndComesBack) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId s = call(b, "sin", x);
  const ValueId e = call(b, "exp", s);
  const ValueId total = call(b, "sum", e);
  const ValueId c = call(b, "cos", s);
  const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(c)}, {"other", ref(total)}});
  Graph graph = b.finish({call(b, "neg", y)});
  const auto groups = fusion_groups(graph);
  ASSERT_EQ(groups.size(), 2U);
  // sin, exp and cos; mul and neg. cos may go with either.
  EXPECT_EQ(groups[0].count + groups[1].count, 5U);
  verify(graph);
}

TEST(FusionGroupsTest, GroupsStandTogether) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  const ValueId s = call(b, "sin", x);
  const ValueId noise = b.call("aten::rand_like", {{"self", ref(x)}});
  const ValueId total = call(b, "sum", x);
  const ValueId noise_2 = b.call("aten::rand_like", {{"self", ref(x)}});
  const ValueId y = add(b, call(b, "exp", s), noise_2);
  const ValueId z = add(b, total, noise);
  Graph graph = b.finish({y, z});
  const auto groups = fusion_groups(graph);
  verify(graph);
  ASSERT_EQ(groups.size(), 1U);
  std::vector<std::string> draws;
  for (const Node& node : graph.nodes) {
    if (effects_of(node).draws) draws.push_back(graph.value(node.results[0].ids[0]).name);
  }
  EXPECT_EQ(draws, (std::vector<std::string>{"rand_like", "rand_like_1"}));
}

// What the groups promise, on graphs of all kinds.
void check_groups(const Graph& graph, const std::vector<FusionGroup>& groups) {
  size_t end = 0;
  for (const FusionGroup& group : groups) {
    EXPECT_GE(group.first, end);
    EXPECT_GE(group.count, 2U);
    end = group.first + group.count;
    std::set<ValueId> made, outside;
    for (size_t i = 0; i < graph.nodes.size(); ++i) {
      const bool inside = i >= group.first && i < end;
      if (inside) {
        EXPECT_TRUE(is_pointwise(graph.nodes[i]));
        EXPECT_EQ(graph.type(graph.nodes[i].results[0].ids[0]).sizes, group.sizes);
        made.insert(graph.nodes[i].results[0].ids[0]);
      } else {
        for (const ValueId id : arguments_of(graph.nodes[i])) outside.insert(id);
      }
    }
    outside.insert(graph.outputs.begin(), graph.outputs.end());
    std::vector<ValueId> outputs;
    std::set_intersection(made.begin(), made.end(), outside.begin(), outside.end(),
                          std::back_inserter(outputs));
    EXPECT_EQ(std::set<ValueId>(outputs.begin(), outputs.end()),
              std::set<ValueId>(group.outputs.begin(), group.outputs.end()));
    for (const ValueId id : group.inputs) EXPECT_EQ(made.count(id), 0U);
  }
}

TEST(FusionGroupsTest, RandomPrograms) {
  size_t grouped = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Graph before = random_graph(seed, {.nodes = 60, .writes = true});
    functionalize(before);
    Graph after = before;
    const auto groups = fusion_groups(after);
    check_groups(after, groups);
    expect_same(before, after);
    for (const FusionGroup& group : groups) grouped += group.count;
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(grouped, 300U);
}

}  // namespace
}  // namespace torchlift::compile
