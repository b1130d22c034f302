#include "compile/passes/hoist_invariant.h"

#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "compile/passes/dead_code.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

constexpr double kRounding = 1e-12;
constexpr HoistOptions kAlways = {.min_saved_elements = 0};

at::Tensor example(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

// One row as all rows of a batch.
ValueId expanded(GraphBuilder& b, ValueId x, std::vector<int64_t> sizes) {
  return b.call("aten::expand", {{"self", ref(x)}, {"size", ints(std::move(sizes))}});
}

int64_t check(const Graph& before, Graph* after, const std::vector<int64_t>& symbols = {}) {
  *after = before;
  const int64_t hoisted = hoist_invariant(*after, kAlways);
  verify(*after);
  expect_same(before, *after, symbols, kRounding);
  dead_code(*after);
  expect_same(before, *after, symbols, kRounding);
  return hoisted;
}

const TensorType& type_of_result(const Graph& graph, const std::string& op) {
  for (const Node& node : graph.nodes) {
    if (node.op == op) return graph.type(node.results[0].ids[0]);
  }
  throw std::runtime_error("no " + op);
}

TEST(HoistInvariantTest, PointwiseOperatorsRunOnOneRow) {
  GraphBuilder b;
  const ValueId w = b.input(example({3}));
  const ValueId x = b.input(example({64, 3}));
  const ValueId s = b.call("aten::sin", {{"self", ref(expanded(b, w, {64, 3}))}});
  const ValueId e = b.call("aten::exp", {{"self", ref(s)}});
  const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(e)}, {"other", ref(x)}});
  Graph after;
  EXPECT_EQ(check(b.finish({y}), &after), 2);
  EXPECT_EQ(type_of_result(after, "aten::sin").str(), "f64[1, 3]");
  EXPECT_EQ(type_of_result(after, "aten::exp").str(), "f64[1, 3]");
  EXPECT_EQ(count(after, "aten::clone"), 0);
}

TEST(HoistInvariantTest, ABatchOfAnySize) {
  GraphBuilder b;
  const ValueId x = b.input(example({12, 3}));
  b.dynamic(0, "n");
  const ValueId w = b.input(example({3}));
  const ValueId rows = b.call("aten::expand_as", {{"self", ref(w)}, {"other", ref(x)}});
  const ValueId e = b.call("aten::exp", {{"self", ref(rows)}});
  const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(e)}, {"other", ref(x)}});
  const Graph before = b.finish({y});
  Graph after;
  EXPECT_EQ(check(before, &after, {12}), 1);
  EXPECT_EQ(type_of_result(after, "aten::exp").str({"n"}), "f64[1, 3]");
  expect_same(before, after, {1}, kRounding);
  // Of no rows there is no first one: what has one row else has none then.
  const std::vector<at::Tensor> none = random_inputs(before, {0});
  const auto expected = run_reference(before, none, {0}, /*check_types=*/false);
  const auto got = run_reference(after, none, {0}, /*check_types=*/false);
  EXPECT_TRUE(identical(expected[0], got[0]));
}

TEST(HoistInvariantTest, SmallBatchesAreNotWorthIt) {
  GraphBuilder b;
  const ValueId w = b.input(example({3}));
  const ValueId s = b.call("aten::sin", {{"self", ref(expanded(b, w, {64, 3}))}});
  Graph graph = b.finish({b.call("aten::sum", {{"self", ref(s)}})});
  EXPECT_EQ(hoist_invariant(graph), 0);
  EXPECT_EQ(hoist_invariant(graph, {.min_saved_elements = 63 * 3}), 1);
}

TEST(HoistInvariantTest, ProductsAndReductions) {
  GraphBuilder b;
  const ValueId m = b.input(example({3, 4}));
  const ValueId k = b.input(example({4, 5}));
  const ValueId left = expanded(b, m, {8, 3, 4});
  const ValueId right = expanded(b, k, {8, 4, 5});
  const ValueId p = b.call("aten::bmm", {{"self", ref(left)}, {"mat2", ref(right)}});
  const ValueId soft = b.call(
      "aten::_softmax", {{"self", ref(p)}, {"dim", number(-1)}, {"half_to_float", number(false)}});
  const ValueId y = b.call("aten::sum.dim_IntList", {{"self", ref(soft)}, {"dim", ints({1})}});
  Graph after;
  EXPECT_EQ(check(b.finish({y}), &after), 3);
  EXPECT_EQ(type_of_result(after, "aten::bmm").str(), "f64[1, 3, 5]");
  EXPECT_EQ(type_of_result(after, "aten::_softmax").str(), "f64[1, 3, 5]");
  EXPECT_EQ(type_of_result(after, "aten::sum").str(), "f64[1, 5]");
  // The output is a tensor of its own, as it was.
  EXPECT_EQ(count(after, "aten::clone"), 1);
}

TEST(HoistInvariantTest, WhatMixesRowsStays) {
  GraphBuilder b;
  const ValueId w = b.input(example({4}));
  const ValueId x = b.input(example({4, 4}));
  const ValueId rows = expanded(b, w, {4, 4});
  const ValueId total = b.call("aten::sum.dim_IntList", {{"self", ref(rows)}, {"dim", ints({0})}});
  const ValueId soft =
      b.call("aten::_softmax",
             {{"self", ref(rows)}, {"dim", number(0)}, {"half_to_float", number(false)}});
  const ValueId product = b.call("aten::mm", {{"self", ref(x)}, {"mat2", ref(rows)}});
  const ValueId sums = b.call("aten::cumsum", {{"self", ref(rows)}, {"dim", number(0)}});
  b.call("aten::rand_like", {{"self", ref(rows)}});
  const Graph before = b.finish({total, soft, product, sums});
  Graph after = before;
  EXPECT_EQ(hoist_invariant(after, kAlways), 0);
}

TEST(HoistInvariantTest, ViewsBetween) {
  GraphBuilder b;
  const ValueId w = b.input(example({3, 2}));
  const ValueId x = b.input(example({8, 2, 3, 1}));
  ValueId y = b.call("aten::exp", {{"self", ref(expanded(b, w, {8, 3, 2}))}});
  y = b.call("aten::transpose.int", {{"self", ref(y)}, {"dim0", number(1)}, {"dim1", number(2)}});
  y = b.call("aten::unsqueeze", {{"self", ref(y)}, {"dim", number(-1)}});
  const ValueId flat = b.call("aten::reshape", {{"self", ref(y)}, {"shape", ints({48})}});
  y = b.call("aten::mul.Tensor", {{"self", ref(y)}, {"other", ref(x)}});
  Graph after;
  EXPECT_GE(check(b.finish({y, flat}), &after), 1);
  EXPECT_EQ(type_of_result(after, "aten::exp").str(), "f64[1, 3, 2]");
}

TEST(HoistInvariantTest, StridesOfInputsAreNotReliedOn) {
  GraphBuilder b;
  const ValueId x = b.input(example({3}).expand({8, 3}));
  const ValueId y = b.call("aten::exp", {{"self", ref(x)}});
  Graph graph = b.finish({y});
  EXPECT_EQ(hoist_invariant(graph, kAlways), 0);
}

// The rows of one expanded result share memory, and outputs that did not must not.
TEST(HoistInvariantTest, OutputsStayApart) {
  GraphBuilder b;
  const ValueId w = b.input(example({3}));
  const ValueId s = b.call("aten::sin", {{"self", ref(expanded(b, w, {4, 3}))}});
  const auto row = [&](int64_t i) {
    return b.call("aten::select.int", {{"self", ref(s)}, {"dim", number(0)}, {"index", number(i)}});
  };
  const Graph before = b.finish({row(0), row(1)});
  Graph after;
  EXPECT_EQ(check(before, &after), 1);
  const auto outputs = run_reference(after, random_inputs(after));
  EXPECT_NE(outputs[0].const_data_ptr(), outputs[1].const_data_ptr());
}

TEST(HoistInvariantTest, RandomPrograms) {
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Graph before = random_graph(seed, {.nodes = 40, .writes = true});
    functionalize(before);
    Graph after;
    check(before, &after);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
}

}  // namespace
}  // namespace torchlift::compile
