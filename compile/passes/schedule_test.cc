#include "compile/passes/schedule.h"

#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "compile/passes/functionalize.h"
#include "compile/passes/memory_plan.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

ValueId call(GraphBuilder& b, const std::string& op, ValueId x) {
  return b.call("aten::" + op, {{"self", ref(x)}});
}
ValueId large(GraphBuilder& b, ValueId x) {
  return b.call("aten::repeat", {{"self", ref(x)}, {"repeats", ints({64})}});
}

// Two large results, each of which is summed: one after the other.
TEST(ScheduleTest, WhatFreesMemoryComesFirst) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({32}));
  const ValueId u = large(b, x), v = large(b, x);
  const ValueId s = call(b, "sum", u), t = call(b, "sum", v);
  const Graph before = b.finish({s, t});
  Graph after = before;
  const ScheduleReport report = schedule_for_memory(after);
  EXPECT_EQ(report.before, 2 * 64 * 32 * 4 + 4);
  EXPECT_EQ(report.after, 64 * 32 * 4 + 8);
  EXPECT_EQ(report.after, memory_plan(after).eager_peak_bytes);
  expect_same(before, after);
}

TEST(ScheduleTest, LargeOutputsComeLast) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({32}));
  const ValueId output = large(b, x);
  const ValueId s = call(b, "sum", call(b, "exp", large(b, x)));
  const Graph before = b.finish({output, s});
  Graph after = before;
  schedule_for_memory(after);
  EXPECT_EQ(after.nodes.back().results[0].ids[0], output);
  expect_same(before, after);
}

TEST(ScheduleTest, NothingMovesForLittle) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({32}));
  const ValueId s = call(b, "sin", x), t = call(b, "cos", x);
  const Graph before = b.finish({s, t});
  Graph after = before;
  const ScheduleReport report = schedule_for_memory(after);
  EXPECT_EQ(report.before, report.after);
  EXPECT_EQ(before.str(), after.str());
}

TEST(ScheduleTest, RandomNumbersAreDrawnInTheirOrder) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({32}));
  const ValueId u = large(b, x), v = large(b, x);
  const ValueId noise = call(b, "rand_like", u), more = call(b, "rand_like", x);
  const ValueId s =
      call(b, "sum", b.call("aten::mul.Tensor", {{"self", ref(noise)}, {"other", ref(v)}}));
  Graph graph = b.finish({s, more});
  schedule_for_memory(graph, 2);
  std::vector<ValueId> drawn;
  for (const Node& node : graph.nodes) {
    if (node.op == "aten::rand_like") drawn.push_back(node.results[0].ids[0]);
  }
  EXPECT_EQ(drawn, (std::vector<ValueId>{noise, more}));
}

TEST(ScheduleTest, RandomPrograms) {
  int smaller = 0;
  for (uint64_t seed = 0; seed < 80; ++seed) {
    Graph before = random_graph(seed, {.nodes = 60, .writes = true});
    functionalize(before);
    Graph after = before;
    const ScheduleReport report = schedule_for_memory(after, /*worth=*/2);
    EXPECT_LE(report.before, memory_plan(before).eager_peak_bytes) << "seed " << seed;
    EXPECT_LE(report.after, memory_plan(after).eager_peak_bytes) << "seed " << seed;
    expect_same(before, after);
    smaller += report.after < report.before ? 1 : 0;
  }
  EXPECT_GT(smaller, 40);
}

}  // namespace
}  // namespace torchlift::compile
