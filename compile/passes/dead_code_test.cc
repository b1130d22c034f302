#include "compile/passes/dead_code.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include "compile/passes/functionalize.h"
#include "compile/passes/testing.h"

namespace torchlift::compile {
namespace {

TEST(DeadCodeTest, DropsWhatNobodyReads) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  const ValueId unused = b.constant(at::ones({3}));
  const ValueId y = b.call("aten::sin", {{"self", ref(x)}});
  b.call("aten::cos",
         {{"self", ref(b.call("aten::mul.Tensor", {{"self", ref(x)}, {"other", ref(unused)}}))}});
  const Graph before = b.finish({y});
  Graph graph = before;
  EXPECT_EQ(dead_code(graph), 2);
  EXPECT_EQ(graph.str(),
            "def graph(x: f32[3]):\n"
            "    sin = aten.sin(x)  # f32[3]\n"
            "    return sin\n");
  expect_same(before, graph);
  EXPECT_EQ(dead_code(graph), 0);
}

TEST(DeadCodeTest, RandomNumbersAndWritesStay) {
  GraphBuilder b;
  const ValueId x = b.input(at::randn({3}));
  b.call("aten::rand_like", {{"self", ref(x)}});
  b.call("aten::sin_", {{"self", ref(b.call("aten::alias", {{"self", ref(x)}}))}});
  Graph graph = b.finish({x});
  EXPECT_EQ(dead_code(graph), 0);
  EXPECT_EQ(graph.nodes.size(), 3U);
}

TEST(DeadCodeTest, RandomPrograms) {
  int64_t dropped = 0;
  for (uint64_t seed = 0; seed < 40; ++seed) {
    Graph before = random_graph(seed, {.nodes = 30, .writes = true});
    functionalize(before);
    Graph after = before;
    dropped += dead_code(after);
    expect_same(before, after);
    if (HasFailure()) FAIL() << "seed " << seed;
  }
  EXPECT_GT(dropped, 100);
}

}  // namespace
}  // namespace torchlift::compile
