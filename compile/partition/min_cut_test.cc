#include "compile/partition/min_cut.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

namespace torchlift::compile {
namespace {

TEST(MinCutTest, CutsWhereItIsNarrowest) {
  // 0 -> 1 -> 2 -> 3
  const std::vector<FlowEdge> edges = {{0, 1, 5}, {1, 2, 2}, {2, 3, 7}};
  EXPECT_EQ(sink_side_of_min_cut(4, edges, 0, 3), (std::vector<bool>{false, false, true, true}));
}

TEST(MinCutTest, OfEqualCutsTheLastOne) {
  const std::vector<FlowEdge> edges = {{0, 1, 2}, {1, 2, 2}, {2, 3, 2}};
  EXPECT_EQ(sink_side_of_min_cut(4, edges, 0, 3), (std::vector<bool>{false, false, false, true}));
}

// Against all subsets of small networks.
TEST(MinCutTest, IsTheSmallestOfAllCuts) {
  std::mt19937 random(7);
  for (int round = 0; round < 200; ++round) {
    const int vertices = 7;
    std::vector<FlowEdge> edges;
    for (int i = 0; i < vertices; ++i) {
      for (int j = 0; j < vertices; ++j) {
        if (i != j && random() % 3 == 0)
          edges.push_back({i, j, static_cast<int64_t>(random() % 9)});
      }
    }
    const auto capacity_of = [&](const std::vector<bool>& side) {
      int64_t sum = 0;
      for (const FlowEdge& edge : edges) {
        if (!side[static_cast<size_t>(edge.from)] && side[static_cast<size_t>(edge.to)]) {
          sum += edge.capacity;
        }
      }
      return sum;
    };
    int64_t best = INT64_MAX;
    int64_t fewest = vertices;
    for (int bits = 0; bits < 1 << vertices; ++bits) {
      if ((bits & 1) != 0 || (bits >> (vertices - 1) & 1) == 0) continue;
      std::vector<bool> side;
      for (int v = 0; v < vertices; ++v) side.push_back((bits >> v & 1) != 0);
      const int64_t size = std::count(side.begin(), side.end(), true);
      const int64_t capacity = capacity_of(side);
      if (capacity < best || (capacity == best && size < fewest)) fewest = size;
      best = std::min(best, capacity);
    }
    const std::vector<bool> side = sink_side_of_min_cut(vertices, edges, 0, vertices - 1);
    EXPECT_EQ(capacity_of(side), best);
    EXPECT_EQ(std::count(side.begin(), side.end(), true), fewest);
  }
}

}  // namespace
}  // namespace torchlift::compile
