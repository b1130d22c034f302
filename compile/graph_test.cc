#include "compile/graph.h"

#include <ATen/ops/ones.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "core/error.h"

namespace torchlift::compile {
namespace {

using ::testing::HasSubstr;

TensorType matrix() { return type_of(at::ones({3, 4})); }

// y = x * x; sum(y)
Graph square_sum() {
  Graph graph;
  const ValueId x = graph.add_input(matrix(), "x");
  const ValueId y = graph.add_value(matrix(), "mul");
  const ValueId s = graph.add_value(type_of(at::ones({})), "sum");
  graph.nodes.push_back({.op = "aten::mul",
                         .overload = "Tensor",
                         .args = {ValueRef{x}, ValueRef{x}},
                         .results = {{.ids = {y}}},
                         .subgraphs = {},
                         .source = ""});
  graph.nodes.push_back({.op = "aten::sum",
                         .overload = "",
                         .args = {ValueRef{y}, std::monostate{}},
                         .results = {{.ids = {s}}},
                         .subgraphs = {},
                         .source = ""});
  graph.outputs = {s};
  return graph;
}

std::string error_of(const Graph& graph) {
  try {
    verify(graph);
  } catch (const TransformError& error) {
    return error.what_without_backtrace();
  }
  return "no error";
}

TEST(GraphTest, PrintsAsReadableCode) {
  const Graph graph = square_sum();
  verify(graph);
  EXPECT_EQ(graph.str(),
            "def graph(x: f32[3, 4]):\n"
            "    mul = aten.mul.Tensor(x, x)  # f32[3, 4]\n"
            "    sum = aten.sum(mul)  # f32[]\n"
            "    return sum\n");
}

TEST(GraphTest, NamesAreMadeUnique) {
  Graph graph;
  EXPECT_EQ(graph.value(graph.add_value(matrix(), "x")).name, "x");
  EXPECT_EQ(graph.value(graph.add_value(matrix(), "x")).name, "x_1");
  EXPECT_EQ(graph.value(graph.add_value(matrix(), "x_1")).name, "x_1_1");
  EXPECT_EQ(graph.value(graph.add_value(matrix(), "x")).name, "x_2");
}

TEST(GraphTest, UsesNameProducersAndReaders) {
  const Graph graph = square_sum();
  const Uses uses(graph);
  EXPECT_EQ(uses.producer, (std::vector<int32_t>{-1, 0, 1}));
  EXPECT_EQ(uses.readers[0], (std::vector<int32_t>{0}));
  EXPECT_EQ(uses.readers[1], (std::vector<int32_t>{1}));
  EXPECT_TRUE(uses.is_output[2]);
}

TEST(GraphTest, CompactDropsWhatNothingDefines) {
  Graph graph = square_sum();
  graph.nodes.pop_back();
  graph.outputs = {1};
  compact(graph);
  verify(graph);
  EXPECT_EQ(graph.values.size(), 2U);
}

TEST(GraphTest, EffectsAreThoseOfTheSchema) {
  Node node{.op = "aten::add_",
            .overload = "Tensor",
            .args = {},
            .results = {},
            .subgraphs = {},
            .source = ""};
  EXPECT_TRUE(effects_of(node).writes);
  node.op = "aten::view";
  node.overload = "";
  EXPECT_TRUE(effects_of(node).views);
  node.op = "aten::bernoulli";
  EXPECT_TRUE(effects_of(node).draws);
}

TEST(VerifyTest, ValuesAreDefinedBeforeTheyAreRead) {
  Graph graph = square_sum();
  std::swap(graph.nodes[0], graph.nodes[1]);
  EXPECT_THAT(error_of(graph), HasSubstr("aten::sum reads mul, which is not defined before"));
}

TEST(VerifyTest, ValuesAreDefinedOnce) {
  Graph graph = square_sum();
  graph.nodes.push_back(graph.nodes[0]);
  EXPECT_THAT(error_of(graph), HasSubstr("mul is defined again as a result of aten::mul.Tensor"));
}

TEST(VerifyTest, NumbersOfValuesAreInRange) {
  Graph graph = square_sum();
  graph.nodes[0].args[1] = ValueRef{99};
  EXPECT_THAT(error_of(graph), HasSubstr("reads value 99, and there are 3"));
  graph = square_sum();
  graph.inputs[0] = -7;
  EXPECT_THAT(error_of(graph), HasSubstr("an input is value -7"));
}

TEST(VerifyTest, OperatorsExist) {
  Graph graph = square_sum();
  graph.nodes[0].op = "aten::no_such";
  EXPECT_THROW(verify(graph), UnsupportedError);
}

TEST(VerifyTest, ArgumentsFitTheSchema) {
  Graph graph = square_sum();
  graph.nodes[0].args.pop_back();
  EXPECT_THAT(error_of(graph), HasSubstr("aten::mul.Tensor has 1 arguments"));
  graph = square_sum();
  graph.nodes[0].args[1] = c10::IValue("two");
  EXPECT_THAT(error_of(graph), HasSubstr("argument other of aten::mul.Tensor is no Tensor"));
  graph = square_sum();
  graph.nodes[1].args[1] = c10::IValue("float");
  EXPECT_THAT(error_of(graph), HasSubstr("argument dtype of aten::sum"));
}

TEST(VerifyTest, ResultsFitTheSchema) {
  Graph graph = square_sum();
  graph.nodes[1].results[0].is_list = true;
  EXPECT_THAT(error_of(graph), HasSubstr("result 0 of aten::sum is a list"));
}

TEST(VerifyTest, AnOperatorThatWritesGivesItsTarget) {
  Graph graph = square_sum();
  graph.nodes[0].op = "aten::mul_";
  graph.nodes[0].results[0].ids = {0};
  graph.nodes[1].args[0] = ValueRef{0};
  verify(graph);
  graph.nodes[0].args[0] = ValueRef{0};
  graph.nodes[0].op = "aten::mul";
  EXPECT_THAT(error_of(graph), HasSubstr("x is defined again"));
}

TEST(VerifyTest, SymbolsAreDimsOfInputs) {
  Graph graph = square_sum();
  graph.symbols.push_back({.name = "n", .input = 0, .dim = 2});
  EXPECT_THAT(error_of(graph), HasSubstr("the dynamic dim n is dim 2 of input 0"));
  graph.symbols.clear();
  graph.value(0).type.sizes[0] = SizeExpr::symbol(0);
  EXPECT_THAT(error_of(graph), HasSubstr("the shape of x depends on a dynamic dim"));
}

TEST(VerifyTest, SubgraphsFitTheirOperator) {
  Graph graph = square_sum();
  const auto inner = std::make_shared<Graph>(square_sum());
  const ValueId out = graph.add_value(type_of(at::ones({})), "cond");
  graph.nodes.push_back({.op = kCondOp,
                         .overload = "",
                         .args = {ValueRef{2}, std::vector<ValueRef>{ValueRef{0}}},
                         .results = {{.ids = {out}, .is_list = true}},
                         .subgraphs = {inner, inner},
                         .source = ""});
  verify(graph);
  graph.nodes.back().args[1] = std::vector<ValueRef>{};
  EXPECT_THAT(error_of(graph), HasSubstr("has 1 inputs, and is given 0 operands"));
}

}  // namespace
}  // namespace torchlift::compile
