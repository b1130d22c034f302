#include "compile/passes/blocked_groups.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "compile/passes/functionalize.h"
#include "compile/passes/memory_plan.h"
#include "compile/passes/node_facts.h"
#include "compile/passes/testing.h"
#include "compile/replay.h"

namespace torchlift::compile {
namespace {

using at::Tensor;

// Small enough that small tensors have many blocks.
constexpr BlockingOptions kSmall{.block_bytes = 4096, .min_bytes = 1, .min_saved_bytes = 1};
// Room for as many rows as make a multiple of any vector.
constexpr BlockingOptions kRows{.block_bytes = 1 << 17, .min_bytes = 1, .min_saved_bytes = 1};

ValueId call(GraphBuilder& b, const std::string& op, ValueId x) {
  return b.call("aten::" + op, {{"self", ref(x)}});
}
ValueId binary(GraphBuilder& b, const std::string& op, ValueId x, ValueId y) {
  return b.call("aten::" + op, {{"self", ref(x)}, {"other", ref(y)}});
}
ValueId scaled(GraphBuilder& b, ValueId x, double by) {
  return b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", number(by)}});
}

struct Planned {
  Graph graph;
  std::vector<BlockedGroup> groups;
  Program program;
};

Planned planned(Graph graph, const BlockingOptions& options = kSmall) {
  RunPlan plan;
  plan.blocked = blocked_groups(graph, options);
  const MemoryPlan memory = memory_plan(graph);
  take_over_memory(graph, memory.in_place, &plan.blocked);
  for (const InPlace& each : memory.in_place) plan.in_place.emplace_back(each.node, each.argument);
  verify(graph);
  return {graph, plan.blocked, Program(graph, plan)};
}

bool share_memory(const Tensor& a, const Tensor& b) {
  return a.storage().unsafeGetStorageImpl() == b.storage().unsafeGetStorageImpl();
}

// In blocks as node by node, bit for bit; the inputs are left alone, and the outputs are tensors
// of their own.
Planned check(const Graph& graph, const std::vector<Tensor>& inputs, size_t groups,
              const BlockingOptions& options = kSmall) {
  Planned result = planned(graph, options);
  EXPECT_EQ(result.groups.size(), groups) << result.graph.str();
  const Program whole(graph);
  std::vector<Tensor> before;
  for (const Tensor& input : inputs) before.push_back(input.clone());
  const std::vector<Tensor> expected = whole.run(inputs);
  for (int i = 0; i < 2; ++i) {
    const std::vector<Tensor> got = result.program.run(inputs);
    EXPECT_EQ(got.size(), expected.size());
    for (size_t k = 0; k < got.size(); ++k) {
      EXPECT_TRUE(identical(expected[k], got[k])) << k << "\n" << result.graph.str();
      for (const Tensor& input : inputs) EXPECT_FALSE(share_memory(got[k], input));
      for (size_t other = 0; other < k; ++other) EXPECT_FALSE(share_memory(got[k], got[other]));
    }
    for (size_t k = 0; k < inputs.size(); ++k) EXPECT_TRUE(identical(before[k], inputs[k]));
  }
  return result;
}

class BlockedGroupsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    threads_ = at::get_num_threads();
    at::set_num_threads(1);
  }
  void TearDown() override { at::set_num_threads(threads_); }

 private:
  int threads_ = 1;
};

Graph chain(const Tensor& example) {
  GraphBuilder b;
  const ValueId x = b.input(example);
  ValueId y = call(b, "tanh", x);
  y = call(b, "exp", scaled(b, y, 0.5));
  y = call(b, "sigmoid", y);
  y = b.call("aten::add.Tensor", {{"self", ref(y)}, {"other", ref(x)}, {"alpha", number(3)}});
  y = call(b, "cos", binary(b, "div.Tensor", y, x));
  return b.finish({call(b, "sqrt", y)});
}

TEST_F(BlockedGroupsTest, SameBitsInEachDtype) {
  for (const at::ScalarType dtype :
       {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kComplexFloat, at::kComplexDouble}) {
    // Of many blocks with and without a rest, with and without a part of a vector.
    for (const int64_t size : {5120, 10007, 7685, 8191}) {
      SCOPED_TRACE(c10::str(dtype, " ", size));
      const Tensor x = at::randn({size}, at::kDouble).to(dtype);
      check(chain(x), {x}, 1);
    }
  }
}

TEST_F(BlockedGroupsTest, SameBitsOfOtherOperators) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16}) {
    GraphBuilder b;
    const ValueId x = b.input(at::randn({61, 259}, at::kDouble).to(dtype));
    const ValueId y = b.input(at::rand({61, 259}, at::kDouble).to(dtype));
    ValueId u = x;
    for (const char* op : {"silu", "relu", "sin", "expm1", "erf", "atan", "neg", "abs", "rsqrt",
                           "log1p", "reciprocal", "ceil", "sign"}) {
      u = binary(b, "add.Tensor", call(b, op, u), y);
    }
    u = b.call("aten::gelu", {{"self", ref(u)}});
    u = b.call("aten::tanh_backward", {{"grad_output", ref(u)}, {"output", ref(y)}});
    u = b.call("aten::sigmoid_backward", {{"grad_output", ref(u)}, {"output", ref(y)}});
    u = b.call("aten::threshold_backward",
               {{"grad_output", ref(u)}, {"self", ref(x)}, {"threshold", number(0)}});
    u = b.call("aten::gelu_backward", {{"grad_output", ref(u)}, {"self", ref(x)}});
    u = b.call("aten::pow.Tensor_Tensor", {{"self", ref(y)}, {"exponent", ref(u)}});
    u = b.call("aten::pow.Tensor_Scalar", {{"self", ref(u)}, {"exponent", number(3)}});
    u = b.call("aten::clamp", {{"self", ref(u)}, {"min", number(-2)}, {"max", number(2.5)}});
    u = binary(b, "atan2", binary(b, "maximum", u, x), y);
    u = b.call("aten::lerp.Tensor", {{"self", ref(u)}, {"end", ref(x)}, {"weight", ref(y)}});
    u = b.call("aten::addcmul",
               {{"self", ref(u)}, {"tensor1", ref(x)}, {"tensor2", ref(y)}, {"value", number(2)}});
    const ValueId total = call(b, "sum", u);
    const Graph graph = b.finish({total});
    check(graph, random_inputs(graph), 1);
    // The same, each written over the one before it.
    check(graph, random_inputs(graph), 0, {.min_bytes = 1 << 30});
  }
}

TEST_F(BlockedGroupsTest, BroadcastOperands) {
  for (const int64_t columns : {96, 33, 100, 1024}) {
    SCOPED_TRACE(columns);
    GraphBuilder b;
    const std::vector<Tensor> inputs = {
        at::randn({1600, columns}), at::randn({columns}),
        at::randn({1600, 1}),       at::randn({}),
        at::randn({1, 1}),          at::randn({1600, columns}, at::kDouble)};
    std::vector<ValueId> ids;
    for (const Tensor& input : inputs) ids.push_back(b.input(input));
    ValueId u = call(b, "sigmoid", ids[0]);
    for (size_t i = 1; i < ids.size(); ++i) {
      u = call(b, "sigmoid", binary(b, "mul.Tensor", u, ids[i]));
    }
    const Planned done = check(b.finish({u}), inputs, 1, kRows);
    EXPECT_EQ(done.groups.at(0).sizes.size(), 2U);
    EXPECT_EQ(done.groups.at(0).inputs.size(), 5U) << "not the one without dims";
  }
}

TEST_F(BlockedGroupsTest, OuterDimsAreWalkedRowByRow) {
  GraphBuilder b;
  const std::vector<Tensor> inputs = {at::randn({3, 2, 2048}), at::randn({3, 1, 2048}),
                                      at::randn({1, 2, 1})};
  std::vector<ValueId> ids;
  for (const Tensor& input : inputs) ids.push_back(b.input(input));
  const ValueId u = binary(b, "mul.Tensor", call(b, "sin", ids[0]), ids[1]);
  const Planned done = check(b.finish({binary(b, "sub.Tensor", u, ids[2])}), inputs, 1);
  EXPECT_EQ(done.groups.at(0).split, 2U);
}

// Rows would begin within what a kernel takes as one vector.
TEST_F(BlockedGroupsTest, NoCutsThatChangeBits) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3, 2, 5001}));
  const ValueId y = b.input(at::randn({3, 1, 5001}));
  check(b.finish({call(b, "exp", binary(b, "mul.Tensor", x, y))}),
        {at::randn({3, 2, 5001}), at::randn({3, 1, 5001})}, 0);
}

TEST_F(BlockedGroupsTest, OtherLayouts) {
  GraphBuilder b;
  const Tensor image = at::randn({4, 8, 16, 16}).contiguous(at::MemoryFormat::ChannelsLast);
  const Tensor transposed = at::randn({130, 90}).t();
  const Tensor scale = at::randn({8, 1, 1});
  const Tensor rows = at::randn({90, 200}).slice(1, 0, 128);
  const ValueId x = b.input(image), s = b.input(scale), y = b.input(transposed), r = b.input(rows);
  const ValueId u = call(b, "sigmoid", binary(b, "mul.Tensor", x, s));
  const ValueId v = call(b, "sigmoid", call(b, "exp", y));
  const ValueId w = call(b, "sigmoid", call(b, "exp", r));
  check(b.finish({u, v, w}), {image, scale, transposed, rows}, 3);
}

TEST_F(BlockedGroupsTest, OrdersThatDifferAreLeftAlone) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({90, 90})), y = b.input(at::randn({90, 90}).t());
  check(b.finish({call(b, "exp", binary(b, "add.Tensor", x, y))}),
        {at::randn({90, 90}), at::randn({90, 90}).t()}, 0);
}

TEST_F(BlockedGroupsTest, MixedDtypes) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({5000}));
  const ValueId n = b.input(at::arange(5000));
  const ValueId d = b.input(at::randn({5000}, at::kDouble));
  const ValueId mask = b.call("aten::gt.Scalar", {{"self", ref(x)}, {"other", number(0.25)}});
  const ValueId u =
      b.call("aten::where.self", {{"condition", ref(mask)}, {"self", ref(x)}, {"other", ref(d)}});
  const ValueId v = binary(b, "mul.Tensor", u, n);
  const ValueId w = b.call("aten::masked_fill.Scalar",
                           {{"self", ref(v)}, {"mask", ref(mask)}, {"value", number(7)}});
  check(b.finish({w, mask}), {at::randn({5000}), at::arange(5000), at::randn({5000}, at::kDouble)},
        1);
}

TEST_F(BlockedGroupsTest, ConjugateInputs) {
  const Tensor z = at::randn({5000}, at::kComplexDouble);
  GraphBuilder b;
  const ValueId x = b.input(z);
  const Graph graph = b.finish({call(b, "exp", binary(b, "mul.Tensor", x, x))});
  check(graph, {z.conj()}, 1);
}

TEST_F(BlockedGroupsTest, WhatIsReadOutside) {
  GraphBuilder b;
  const Tensor example = at::randn({64, 80});
  const ValueId x = b.input(example);
  const ValueId s = call(b, "sin", x);
  const ValueId t = call(b, "exp", call(b, "cos", s));
  const ValueId total = call(b, "sum", t);
  const ValueId u = call(b, "sigmoid", binary(b, "mul.Tensor", t, total));
  const Planned done = check(b.finish({s, u, total}), {example}, 2);
  ASSERT_EQ(done.groups[0].outputs.size(), 2U);
  EXPECT_EQ(done.groups[0].outputs[0].id, s);
  EXPECT_EQ(done.groups[0].outputs[1].id, t);
}

// The product's memory is the result's.
TEST_F(BlockedGroupsTest, ResultsTakeTheMemoryOfDyingInputs) {
  GraphBuilder b;
  const Tensor example = at::randn({64, 64});
  const ValueId x = b.input(example);
  const ValueId product = b.call("aten::mm", {{"self", ref(x)}, {"mat2", ref(x)}});
  const ValueId s = call(b, "sin", product);
  const ValueId t = call(b, "exp", binary(b, "add.Tensor", s, x));
  const ValueId again = b.call("aten::mm", {{"self", ref(t)}, {"mat2", ref(x)}});
  const Planned done = check(b.finish({again}), {example}, 1);
  ASSERT_EQ(done.groups[0].outputs.size(), 1U);
  EXPECT_EQ(done.groups[0].outputs[0].over, product);
}

// The input, the constant, what is read later, and what a view shares.
TEST_F(BlockedGroupsTest, NothingElseIsWrittenOver) {
  GraphBuilder b;
  const Tensor example = at::randn({64, 64}), held = at::randn({64, 64});
  const ValueId x = b.input(example);
  const ValueId constant = b.constant(held);
  const ValueId kept = b.call("aten::mm", {{"self", ref(x)}, {"mat2", ref(constant)}});
  const ValueId view = call(b, "t", kept);
  const ValueId s = call(b, "exp", call(b, "sin", kept));
  const ValueId c = call(b, "exp", call(b, "sin", constant));
  const ValueId i = call(b, "exp", call(b, "sin", x));
  const ValueId all = b.call("aten::mm", {{"self", ref(s)}, {"mat2", ref(c)}});
  const ValueId more = b.call("aten::mm", {{"self", ref(i)}, {"mat2", ref(view)}});
  const Tensor before = held.clone();
  const Planned done = check(b.finish({all, more, kept}), {example}, 3);
  for (const BlockedGroup& group : done.groups) EXPECT_EQ(group.outputs[0].over, kNoValue);
  EXPECT_TRUE(identical(before, held));
}

TEST_F(BlockedGroupsTest, SmallTensorsAndDynamicDimsRunAsTheyDid) {
  Graph small = chain(at::randn({512}));
  EXPECT_TRUE(blocked_groups(small).empty());
  GraphBuilder b;
  const ValueId x = b.input(at::randn({1 << 20}));
  b.dynamic(0, "n");
  Graph dynamic = b.finish({call(b, "exp", call(b, "sin", x))});
  EXPECT_TRUE(blocked_groups(dynamic).empty());
}

TEST_F(BlockedGroupsTest, GroupsThatSaveNothingAreLeftAlone) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({5000}));
  const ValueId y = call(b, "sin", x);
  check(b.finish({y, call(b, "exp", y)}), {at::randn({5000})}, 0);
}

TEST_F(BlockedGroupsTest, LargeTensorsByDefault) {
  const Tensor x = at::randn({(1 << 20) + 3});
  const Planned done = planned(chain(x), {});
  ASSERT_EQ(done.groups.size(), 1U);
  EXPECT_TRUE(identical(done.program.run({x})[0], Program(done.graph).run({x})[0]));
}

// As if autograd did not see it.
TEST_F(BlockedGroupsTest, TrackedInputsAreDifferentiated) {
  const Tensor x = at::rand({5000}, at::kDouble).requires_grad_();
  const Planned done = planned(chain(x.detach()));
  ASSERT_EQ(done.groups.size(), 1U);
  const Tensor y = done.program.run({x})[0];
  EXPECT_TRUE(y.requires_grad());
  EXPECT_TRUE(identical(y.detach(), done.program.run({x.detach()})[0]));
}

TEST_F(BlockedGroupsTest, SameResultsOnSeveralThreads) {
  GraphBuilder b;
  const std::vector<Tensor> inputs = {at::randn({700, 300}), at::randn({300}),
                                      at::randn({(1 << 17) + 5})};
  const ValueId x = b.input(inputs[0]), y = b.input(inputs[1]), z = b.input(inputs[2]);
  const ValueId u = call(b, "sigmoid", binary(b, "mul.Tensor", x, y));
  const ValueId v = call(b, "exp", call(b, "sigmoid", call(b, "tanh", z)));
  const Planned done = check(b.finish({u, v}), inputs, 2, kRows);
  const std::vector<Tensor> expected = done.program.run(inputs);
  at::set_num_threads(3);
  const std::vector<Tensor> got = done.program.run(inputs);
  EXPECT_TRUE(at::allclose(expected[0], got[0], 1e-6, 1e-7));
  EXPECT_TRUE(at::allclose(expected[1], got[1], 1e-6, 1e-7));
}

TEST_F(BlockedGroupsTest, WhatAnOperatorThrowsIsThrown) {
  GraphBuilder b;
  const Tensor zeros = at::zeros({5000}, at::kLong);
  const ValueId x = b.input(at::ones({5000}, at::kLong)), y = b.input(at::ones({5000}, at::kLong));
  const ValueId u =
      b.call("aten::div.Tensor_mode",
             {{"self", ref(x)}, {"other", ref(y)}, {"rounding_mode", number("floor")}});
  const Planned done = planned(b.finish({call(b, "neg", u)}));
  ASSERT_EQ(done.groups.size(), 1U);
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    EXPECT_THROW(done.program.run({zeros, zeros}), c10::Error);
  }
}

TEST_F(BlockedGroupsTest, RunsAtTheSameTime) {
  const Tensor x = at::randn({50'000});
  const Planned done = planned(chain(x));
  const Tensor expected = Program(done.graph).run({x})[0];
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 10; ++k) EXPECT_TRUE(identical(done.program.run({x})[0], expected));
    });
  }
  for (std::thread& each : threads) each.join();
}

// A result that took the memory of a view that conjugates would be one, which view_as_real refuses.
TEST_F(BlockedGroupsTest, ConjugateViewsAreNotWrittenOver) {
  GraphBuilder b;
  const ValueId z = b.input(at::randn({64, 64}, at::kComplexFloat));
  const ValueId flipped = b.call("aten::flip", {{"self", ref(z)}, {"dims", ints({0})}});
  const ValueId conjugate = call(b, "_conj", flipped);
  const ValueId y = call(b, "exp", binary(b, "mul.Tensor", conjugate, z));
  const Graph graph = b.finish({call(b, "sum", call(b, "view_as_real", y))});
  const Planned result = check(graph, {b.example(z)}, 1);
  EXPECT_EQ(result.groups[0].outputs[0].over, conjugate);
}

}  // namespace
}  // namespace torchlift::compile
