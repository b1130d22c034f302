#include "compile/passes/optimize.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

constexpr OptimizeOptions kVerified = {
    .folding = {}, .hoisting = {.min_saved_elements = 0}, .verify_each = true};

TEST(OptimizeTest, PassesOpenTheWayForEachOther) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 4}));
  // A one that is found by folding, then a product that goes, then two equal sines, of which the
  // difference stays.
  const ValueId zero = b.call("aten::zeros", {{"size", ints({})}});
  const ValueId one = b.call("aten::exp", {{"self", ref(zero)}});
  const ValueId same = b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(one)}});
  const ValueId view = b.call("aten::view", {{"self", ref(same)}, {"size", ints({3, 4})}});
  const ValueId s = b.call("aten::sin", {{"self", ref(view)}});
  const ValueId t = b.call("aten::sin", {{"self", ref(x)}});
  const Graph before =
      b.finish({b.call("aten::sub.Tensor", {{"self", ref(s)}, {"other", ref(t)}})});
  Graph after = before;
  const OptimizeReport report = optimize(after, kVerified);
  EXPECT_EQ(after.str(),
            "def graph(x: f32[3, 4]):\n"
            "    sin = aten.sin(x)  # f32[3, 4]\n"
            "    sub = aten.sub.Tensor(sin, sin)  # f32[3, 4]\n"
            "    return sub\n");
  EXPECT_TRUE(report.fixed_point);
  EXPECT_EQ(report.changes("constant_folding"), 2);
  EXPECT_EQ(report.changes("common_subexpressions"), 1);
  EXPECT_THAT(report.str(), ::testing::HasSubstr("constant_folding: 2 of 7 nodes; 5 left; "));
  expect_same(before, after);
}

TEST(OptimizeTest, WritesGoBack) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  b.call("aten::mul_.Scalar", {{"self", ref(x)}, {"other", number(2.0)}});
  Graph graph = b.finish({b.call("aten::sin", {{"self", ref(x)}})});
  const OptimizeReport report = optimize(graph, kVerified);
  EXPECT_EQ(report.functionalized.outputs, 1U);
  ASSERT_EQ(report.functionalized.updates.size(), 1U);
  EXPECT_EQ(graph.outputs.size(), 2U);
}

TEST(OptimizeTest, SubgraphsToo) {
  GraphBuilder inner;
  const ValueId operand = inner.input(at::randn({3}));
  inner.call("aten::sin", {{"self", ref(operand)}});
  const auto branch = std::make_shared<const Graph>(
      inner.finish({inner.call("aten::cos", {{"self", ref(operand)}})}));
  GraphBuilder b;
  b.input(at::ones({}, at::kBool));
  b.input(at::randn({3}));
  Graph graph = b.finish({});
  const ValueId out = graph.add_value(type_of(at::randn({3})), "cond");
  graph.nodes.push_back({.op = kCondOp,
                         .overload = "",
                         .args = {ref(0), refs({1})},
                         .results = {{.ids = {out}, .is_list = true}},
                         .subgraphs = {branch, branch},
                         .source = ""});
  graph.outputs = {out};
  EXPECT_EQ(optimize(graph, kVerified).changes("dead_code"), 2);
  EXPECT_EQ(graph.nodes[0].subgraphs[0]->nodes.size(), 1U);
}

TEST(OptimizeTest, RandomPrograms) {
  size_t before_all = 0, after_all = 0;
  for (uint64_t seed = 100; seed < 200; ++seed) {
    const Graph eager = random_graph(seed, {.nodes = 60, .writes = true});
    Graph before = eager;
    functionalize(before);
    Graph after = eager;
    const OptimizeReport report = optimize(after, kVerified);
    EXPECT_TRUE(report.fixed_point) << report.str();
    expect_same(before, after, {}, 1e-11);
    before_all += before.nodes.size();
    after_all += after.nodes.size();
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_LT(after_all, before_all / 2);
}

}  // namespace
}  // namespace torchlift::compile
