#include "compile/passes/algebraic_simplification.h"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "compile/passes/dead_code.h"
#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

using Build = std::function<ValueId(GraphBuilder&, ValueId)>;

at::Tensor hard_numbers() {
  const double inf = std::numeric_limits<double>::infinity();
  return at::tensor({0.0, -0.0, 1.5, -2.25, inf, -inf, std::nan(""), 5e-324, 1e308, 0.1});
}

// How many nodes are left of what `build` makes of x; the result must be the same bit for bit, on
// numbers of all kinds.
size_t nodes_left(const Build& build, const at::Tensor& example = hard_numbers()) {
  GraphBuilder b;
  const ValueId x = b.input(example);
  const ValueId doubled = b.call("aten::alias_copy", {{"self", ref(x)}});
  const ValueId y = build(b, doubled);
  const Graph before = b.finish({b.call("aten::clone", {{"self", ref(y)}})});
  Graph after = before;
  algebraic_simplification(after);
  dead_code(after);
  verify(after);
  const auto expected = run_reference(before, {example});
  const auto got = run_reference(after, {example});
  EXPECT_TRUE(identical(expected[0], got[0])) << before.str() << "\n" << after.str();
  expect_same(before, after);
  return after.nodes.size() - 2;
}

Build unary(const std::string& op) {
  return [op](GraphBuilder& b, ValueId x) { return b.call(op, {{"self", ref(x)}}); };
}
Build twice(const std::string& op) {
  return [op](GraphBuilder& b, ValueId x) { return unary(op)(b, unary(op)(b, x)); };
}
Build with_number(const std::string& op, const c10::IValue& other, const std::string& name) {
  return [=](GraphBuilder& b, ValueId x) {
    return b.call(op, {{"self", ref(x)}, {name, number(other)}});
  };
}
Build with_number(const std::string& op, const c10::IValue& other) {
  return with_number(op, other, "other");
}
Build with_constant(const std::string& op, const at::Tensor& other, bool first = false) {
  return [=](GraphBuilder& b, ValueId x) {
    const ValueId c = b.constant(other);
    return b.call(op, {{"self", ref(first ? c : x)}, {"other", ref(first ? x : c)}});
  };
}

TEST(AlgebraicSimplificationTest, NeutralNumbers) {
  EXPECT_EQ(nodes_left(with_number("aten::mul.Scalar", 1.0)), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::mul.Scalar", int64_t{1})), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::div.Scalar", 1.0)), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::sub.Scalar", 0.0)), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::sub.Scalar", int64_t{0})), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::add.Scalar", -0.0)), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::pow.Tensor_Scalar", 1.0, "exponent")), 0U);
}

TEST(AlgebraicSimplificationTest, WhatIsNotExactStays) {
  EXPECT_EQ(nodes_left(with_number("aten::add.Scalar", 0.0)), 1U);
  EXPECT_EQ(nodes_left(with_number("aten::sub.Scalar", -0.0)), 1U);
  EXPECT_EQ(nodes_left(with_number("aten::mul.Scalar", 0.0)), 1U);
  EXPECT_EQ(nodes_left(with_number("aten::mul.Scalar", 1.0), at::randn({3}, at::kComplexDouble)),
            1U);
  EXPECT_EQ(nodes_left(unary("aten::sum"), at::full({}, -0.0)), 1U);
  EXPECT_EQ(nodes_left(twice("aten::reciprocal")), 2U);
}

TEST(AlgebraicSimplificationTest, NeutralConstants) {
  const at::Tensor one = at::ones({}, at::kDouble), ones = at::ones({10}, at::kDouble);
  EXPECT_EQ(nodes_left(with_constant("aten::mul.Tensor", one)), 0U);
  EXPECT_EQ(nodes_left(with_constant("aten::mul.Tensor", one, true)), 0U);
  EXPECT_EQ(nodes_left(with_constant("aten::mul.Tensor", ones)), 0U);
  EXPECT_EQ(nodes_left(with_constant("aten::div.Tensor", ones)), 0U);
  EXPECT_EQ(nodes_left(with_constant("aten::div.Tensor", ones, true)), 1U);
  // Another shape, or another dtype, is not the same.
  EXPECT_EQ(nodes_left(with_constant("aten::mul.Tensor", at::ones({2, 10}, at::kDouble))), 1U);
  EXPECT_EQ(nodes_left(with_constant("aten::mul.Tensor", ones), at::randn({10})), 1U);
  at::Tensor mixed = at::full({10}, -0.0, at::kDouble);
  EXPECT_EQ(nodes_left(with_constant("aten::add.Tensor", mixed)), 0U);
  mixed[3] = 0.0;
  EXPECT_EQ(nodes_left(with_constant("aten::add.Tensor", mixed)), 1U);
}

TEST(AlgebraicSimplificationTest, Integers) {
  const at::Tensor x = at::tensor({1, -2, 3});
  EXPECT_EQ(nodes_left(with_number("aten::add.Scalar", int64_t{0}), x), 0U);
  EXPECT_EQ(nodes_left(with_number("aten::add.Scalar", 0.0), x), 1U);
  EXPECT_EQ(nodes_left(with_number("aten::div.Scalar", int64_t{1}), x), 1U);
  EXPECT_EQ(nodes_left(unary("aten::sum"), at::full({}, int64_t{3})), 0U);
}

TEST(AlgebraicSimplificationTest, Factories) {
  EXPECT_EQ(nodes_left([](GraphBuilder& b, ValueId x) {
              const ValueId ones = b.call("aten::ones_like", {{"self", ref(x)}});
              return b.call("aten::mul.Tensor", {{"self", ref(ones)}, {"other", ref(x)}});
            }),
            0U);
  EXPECT_EQ(
      nodes_left([](GraphBuilder& b, ValueId x) {
        const ValueId one =
            b.call("aten::scalar_tensor", {{"s", number(1.0)}, {"dtype", number(int64_t{7})}});
        const ValueId ones = b.call("aten::expand", {{"self", ref(one)}, {"size", ints({10})}});
        return b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(ones)}});
      }),
      0U);
}

TEST(AlgebraicSimplificationTest, PairsAndRepetitions) {
  EXPECT_EQ(nodes_left(twice("aten::neg")), 0U);
  EXPECT_EQ(nodes_left(twice("aten::abs")), 1U);
  EXPECT_EQ(nodes_left(twice("aten::relu")), 1U);
  EXPECT_EQ(nodes_left(twice("aten::round")), 1U);
  EXPECT_EQ(nodes_left(twice("aten::t"), at::randn({3, 4})), 0U);
  EXPECT_EQ(nodes_left(twice("aten::logical_not"), at::ones({3}, at::kBool)), 0U);
  // Of numbers, it is 0 or 1.
  EXPECT_EQ(nodes_left(twice("aten::logical_not")), 2U);
}

TEST(AlgebraicSimplificationTest, Squares) {
  GraphBuilder b;
  const ValueId x = b.input(hard_numbers());
  const ValueId y =
      b.call("aten::pow.Tensor_Scalar", {{"self", ref(x)}, {"exponent", number(int64_t{2})}});
  const Graph before = b.finish({y});
  Graph after = before;
  EXPECT_EQ(algebraic_simplification(after), 1);
  EXPECT_EQ(count(after, "aten::mul"), 1);
  EXPECT_TRUE(identical(run_reference(before, {hard_numbers()})[0],
                        run_reference(after, {hard_numbers()})[0]));
}

TEST(AlgebraicSimplificationTest, Permutations) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({2, 3, 4}));
  const ValueId p = b.call("aten::permute", {{"self", ref(x)}, {"dims", ints({2, 0, 1})}});
  const ValueId t =
      b.call("aten::transpose.int", {{"self", ref(p)}, {"dim0", number(0)}, {"dim1", number(-1)}});
  const ValueId y = b.call("aten::permute", {{"self", ref(p)}, {"dims", ints({1, -1, 0})}});
  const ValueId z = b.call("aten::mul.Tensor", {{"self", ref(y)}, {"other", ref(x)}});
  const Graph before = b.finish({t, z});
  Graph after = before;
  EXPECT_EQ(algebraic_simplification(after), 2);
  dead_code(after);
  EXPECT_EQ(after.str(),
            "def graph(x: f32[2, 3, 4]):\n"
            "    transpose = aten.permute(x, [1, 0, 2])  # f32[3, 2, 4]\n"
            "    mul = aten.mul.Tensor(x, x)  # f32[2, 3, 4]\n"
            "    return (transpose, mul)\n");
  expect_same(before, after);
}

TEST(AlgebraicSimplificationTest, AnOutputDoesNotBecomeAnInput) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId y = b.call("aten::mul.Scalar", {{"self", ref(x)}, {"other", number(1.0)}});
  Graph graph = b.finish({y});
  EXPECT_EQ(algebraic_simplification(graph), 0);
}

TEST(AlgebraicSimplificationTest, RandomPrograms) {
  int64_t changed = 0;
  for (uint64_t seed = 0; seed < 60; ++seed) {
    Graph before = random_graph(seed, {.nodes = 40, .writes = true});
    functionalize(before);
    Graph after = before;
    changed += algebraic_simplification(after);
    expect_same(before, after);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(changed, 20);
}

}  // namespace
}  // namespace torchlift::compile
