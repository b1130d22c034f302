#include "compile/passes/memory_plan.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

ValueId call(GraphBuilder& b, const std::string& op, ValueId x) {
  return b.call("aten::" + op, {{"self", ref(x)}});
}

ValueId binary_add(GraphBuilder& b, ValueId x, ValueId y) {
  return b.call("aten::add.Tensor",
                {{"self", ref(x)}, {"other", ref(y)}, {"alpha", number(int64_t{1})}});
}

TEST(MemoryPlanTest, AChainNeedsTheMemoryOfOneValue) {
  GraphBuilder b;
  ValueId x = b.input(at::randn({32}));
  for (int i = 0; i < 6; ++i) x = call(b, "sin", x);
  const Graph graph = b.finish({call(b, "sum", x)});
  const MemoryPlan plan = memory_plan(graph);
  EXPECT_EQ(plan.buffers.size(), 1U);
  EXPECT_EQ(plan.in_place.size(), 5U);
  EXPECT_EQ(plan.arena_bytes, 128);
  EXPECT_EQ(plan.output_bytes, 4);
  EXPECT_EQ(plan.peak_bytes(), 132);
  EXPECT_EQ(plan.eager_peak_bytes, 256);
}

TEST(MemoryPlanTest, WhatIsReadLaterIsNotOverwritten) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({32}));
  const ValueId s = call(b, "sin", x);
  const ValueId view = call(b, "alias", s);
  const ValueId c = call(b, "cos", s);
  const ValueId y = b.call("aten::mul.Tensor", {{"self", ref(c)}, {"other", ref(view)}});
  const Graph graph = b.finish({call(b, "sum", y)});
  const MemoryPlan plan = memory_plan(graph);
  EXPECT_NE(plan.buffer_of[static_cast<size_t>(s)], plan.buffer_of[static_cast<size_t>(c)]);
  EXPECT_EQ(plan.buffer_of[static_cast<size_t>(y)], plan.buffer_of[static_cast<size_t>(c)]);
  EXPECT_EQ(plan.buffer_of[static_cast<size_t>(view)], -1);
  EXPECT_EQ(plan.arena_bytes, 256);
}

TEST(MemoryPlanTest, MemoryOfViewsThatNobodyReadsLater) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 8}));
  const ValueId s = call(b, "sin", x);
  const ValueId flat = b.call("aten::view", {{"self", ref(s)}, {"size", ints({32})}});
  const ValueId c = call(b, "cos", flat);  // over sin's
  const ValueId half =
      b.call("aten::slice.Tensor", {{"self", ref(c)}, {"end", number(int64_t{16})}});
  const ValueId e = call(b, "exp", half);  // not over a part
  const MemoryPlan plan = memory_plan(b.finish({call(b, "sum", e)}));
  ASSERT_EQ(plan.in_place.size(), 1U);
  EXPECT_EQ(plan.in_place[0].argument, flat);
  EXPECT_EQ(plan.buffer_of[static_cast<size_t>(c)], plan.buffer_of[static_cast<size_t>(s)]);
  EXPECT_NE(plan.buffer_of[static_cast<size_t>(e)], plan.buffer_of[static_cast<size_t>(s)]);
}

// x + x.T: what is written is read later, at another place.
TEST(MemoryPlanTest, NotWhatIsReadInAnotherOrder) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 4}));
  const ValueId s = call(b, "sin", x);
  const ValueId t = call(b, "t", s);
  const ValueId y = b.call("aten::add.Tensor", {{"self", ref(s)}, {"other", ref(t)}});
  EXPECT_TRUE(memory_plan(b.finish({call(b, "sum", y)})).in_place.empty());
  GraphBuilder c;
  const ValueId z = c.input(at::randn({4, 4}));
  const ValueId view = call(c, "t", z);
  EXPECT_TRUE(memory_plan(c.finish({call(c, "sum", call(c, "sin", view))})).in_place.empty())
      << "an input's memory";
}

TEST(MemoryPlanTest, NotWhatIsReadWhileItIsWritten) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 8})), places = b.input(at::randn({4}).argsort());
  const ValueId s = call(b, "sin", x);
  const ValueId y = b.call("aten::index_add", {{"self", ref(s)},
                                               {"dim", number(int64_t{0})},
                                               {"index", ref(places)},
                                               {"source", ref(s)},
                                               {"alpha", number(int64_t{1})}});
  EXPECT_TRUE(memory_plan(b.finish({call(b, "sum", y)})).in_place.empty());
}

// What is written a part of, unless that is read later, or what is written is a view of it.
TEST(MemoryPlanTest, WhatHasSomeElementsReplaced) {
  for (const bool read_later : {false, true}) {
    for (const bool own_row : {false, true}) {
      GraphBuilder b;
      const ValueId x = b.input(at::randn({4, 8})), row = b.input(at::randn({8}));
      const ValueId s = call(b, "sin", x);
      const ValueId part = own_row ? b.call("aten::select.int", {{"self", ref(s)},
                                                                 {"dim", number(int64_t{0})},
                                                                 {"index", number(int64_t{1})}})
                                   : row;
      const ValueId y = b.call("aten::select_scatter", {{"self", ref(s)},
                                                        {"src", ref(part)},
                                                        {"dim", number(int64_t{0})},
                                                        {"index", number(int64_t{2})}});
      const ValueId z = binary_add(b, y, read_later ? s : x);
      const MemoryPlan plan = memory_plan(b.finish({call(b, "sum", z)}));
      const bool taken =
          plan.buffer_of[static_cast<size_t>(y)] == plan.buffer_of[static_cast<size_t>(s)];
      EXPECT_EQ(taken, !read_later && !own_row) << read_later << own_row;
    }
  }
}

TEST(MemoryPlanTest, SizesThatAreGiven) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({4, 8}));
  b.dynamic(0, "n");
  const ValueId y = call(b, "sum", call(b, "sin", x));
  const Graph graph = b.finish({y});
  EXPECT_EQ(memory_plan(graph, {4}).arena_bytes, 128);
  EXPECT_EQ(memory_plan(graph, {1000}).arena_bytes, 32000);
}

// Runs the graph with every intermediate value in the arena, where the plan says. Lifetimes that
// are too short, and views of what is gone, give other numbers.
std::vector<at::Tensor> run_in_arena(const Graph& graph, const MemoryPlan& plan,
                                     const std::vector<at::Tensor>& inputs) {
  const at::Tensor arena = at::empty({plan.arena_bytes}, at::kByte);
  auto* memory = static_cast<char*>(arena.mutable_data_ptr());
  std::memset(memory, 0x7f, static_cast<size_t>(plan.arena_bytes));
  std::vector<at::Tensor> values(graph.values.size());
  for (size_t i = 0; i < inputs.size(); ++i)
    values[static_cast<size_t>(graph.inputs[i])] = inputs[i];
  for (const Constant& constant : graph.constants) {
    values[static_cast<size_t>(constant.id)] = constant.tensor;
  }
  for (const Node& node : graph.nodes) {
    const auto results =
        evaluate(node, [&](ValueId id) { return values[static_cast<size_t>(id)]; });
    for (size_t i = 0; i < results.size(); ++i) {
      for (size_t k = 0; k < results[i].size(); ++k) {
        const auto id = static_cast<size_t>(node.results[i].ids[k]);
        values[id] = results[i][k];
        if (plan.buffer_of[id] < 0) continue;
        const Buffer& buffer = plan.buffers[static_cast<size_t>(plan.buffer_of[id])];
        values[id] = at::from_blob(memory + buffer.offset, results[i][k].sizes(),
                                   results[i][k].strides(), results[i][k].options());
        values[id].copy_(results[i][k]);
      }
    }
  }
  std::vector<at::Tensor> outputs;
  for (const ValueId id : graph.outputs) outputs.push_back(values[static_cast<size_t>(id)]);
  return outputs;
}

TEST(MemoryPlanTest, RandomPrograms) {
  size_t in_place = 0;
  int64_t arena = 0, live = 0, all = 0;
  for (uint64_t seed = 0; seed < 80; ++seed) {
    Graph graph = random_graph(seed, {.nodes = 60, .writes = true});
    functionalize(graph);
    const MemoryPlan plan = memory_plan(graph);
    const std::vector<at::Tensor> inputs = random_inputs(graph);
    const auto expected = run_reference(graph, inputs);
    const auto got = run_in_arena(graph, plan, inputs);
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_TRUE(identical(expected[i], got[i])) << "seed " << seed << "\n" << graph.str();
    }
    EXPECT_GE(plan.arena_bytes, plan.live_bytes);
    in_place += plan.in_place.size();
    arena += plan.arena_bytes;
    live += plan.live_bytes;
    for (const Buffer& buffer : plan.buffers) all += buffer.bytes;
  }
  EXPECT_GT(in_place, 50U);
  // Not much is lost between buffers.
  EXPECT_LT(static_cast<double>(arena), 1.1 * static_cast<double>(live));
  EXPECT_LT(2 * arena, all);
}

}  // namespace
}  // namespace torchlift::compile
