#include "compile/passes/evaluate.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "compile/passes/testing.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

TEST(EvaluateTest, RunsANodeWithDefaults) {
  const Node node = make_node("aten::add", "Tensor", {{"self", ref(0)}, {"other", ref(1)}});
  const std::vector<at::Tensor> values = {at::ones({2}), at::full({2}, 2.0)};
  const auto results = evaluate(node, [&](ValueId id) { return values[static_cast<size_t>(id)]; });
  EXPECT_TRUE(identical(results.at(0).at(0), at::full({2}, 3.0)));
}

TEST(EvaluateTest, NamesOfArgumentsAreChecked) {
  EXPECT_THROW(make_node("aten::add", "Tensor", {{"input", ref(0)}}), UnsupportedError);
}

TEST(EvaluateTest, ANumberForATensorHasNoSayInTheDtype) {
  GraphBuilder b;
  const ValueId x = b.input(at::ones({3}));
  const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", number(0.5)}});
  const Graph graph = b.finish({y});
  EXPECT_EQ(graph.type(y).dtype, at::kFloat);
  EXPECT_EQ(infer(graph, graph.nodes[0])[0][0].type, graph.type(y));
}

TEST(InferTest, TypesAreThoseOfARun) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const Graph graph = random_graph(seed);
    for (const Node& node : graph.nodes) {
      const auto inferred = infer(graph, node);
      for (size_t i = 0; i < inferred.size(); ++i) {
        for (size_t k = 0; k < inferred[i].size(); ++k) {
          EXPECT_EQ(inferred[i][k].type, graph.type(node.results[i].ids[k])) << node.full_name();
        }
      }
    }
  }
}

TEST(InferTest, SaysWhatSharesMemoryAndWhere) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 6}));
  const ValueId row =
      b.call("aten::select.int", {{"self", ref(x)}, {"dim", number(0)}, {"index", number(2)}});
  const ValueId copy =
      b.call("aten::reshape",
             {{"self", ref(b.call("aten::t", {{"self", ref(x)}}))}, {"shape", ints({24})}});
  const Graph graph = b.finish({row, copy});
  const auto select = infer(graph, graph.nodes[0]);
  EXPECT_EQ(select[0][0].shares, x);
  EXPECT_EQ(select[0][0].offset, SizeExpr(12));
  EXPECT_EQ(infer(graph, graph.nodes[2])[0][0].shares, kNoValue);
}

TEST(InferTest, SizesOfDynamicDims) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({12, 3}));
  b.dynamic(0, "n");
  const ValueId t = b.call("aten::t", {{"self", ref(x)}});
  const ValueId product = b.call("aten::mm", {{"self", ref(x)}, {"mat2", ref(t)}});
  const ValueId flat = b.call("aten::view", {{"self", ref(product)}, {"size", ints({-1})}});
  const Graph graph = b.finish({flat});
  EXPECT_EQ(graph.type(product).str({"n"}), "f32[n, n]");
  EXPECT_EQ(graph.type(flat).str({"n"}), "f32[n^2]");
  run_reference(graph, random_inputs(graph, {5}), {5});
}

TEST(InferTest, ASizeThatArgumentsDoNotShowIsAnError) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({12}));
  b.dynamic(0, "n");
  try {
    b.call("aten::slice.Tensor", {{"self", ref(x)}, {"start", number(0)}, {"step", number(2)}});
    FAIL();
  } catch (const UnsupportedError& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("aten::slice.Tensor"));
  }
}

TEST(InferTest, OperatorsWithoutAMetaKernelRunOnZeros) {
  GraphBuilder b;
  const ValueId x = b.input(at::ones({3}));
  const ValueId y = b.call("aten::nonzero", {{"self", ref(x)}});
  const Graph graph = b.finish({y});
  EXPECT_EQ(infer(graph, graph.nodes[0])[0][0].type->dim(), 2);
}

}  // namespace
}  // namespace torchlift::compile
