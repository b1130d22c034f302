#ifndef TORCHLIFT_COMPILE_PASSES_FUSION_GROUPS_H_
#define TORCHLIFT_COMPILE_PASSES_FUSION_GROUPS_H_

// File: compile/passes/fusion_groups.h
//
// Which operators could be one kernel: pointwise ones over one iteration space. The graph stays as
// it is, but for the order of its nodes; an executor may run a group as it likes.
//
//   for (const FusionGroup& group : fusion_groups(graph)) {
//     run(graph, group.first, group.count);   // nodes[first], ... nodes[first + count - 1]
//   }

#include <cstdint>
#include <functional>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// Nodes first, ..., first + count - 1, at least two.
struct FusionGroup {
  size_t first = 0;
  size_t count = 0;
  std::vector<ValueId> inputs;   // read by the group, made outside of it
  std::vector<ValueId> outputs;  // made by the group, read outside of it
  std::vector<SizeExpr> sizes;   // the iteration space: every result has these
  c10::Device device = c10::kCPU;
};

struct FusionOptions {
  // Which of the pointwise operators may be in a group; empty: all.
  std::function<bool(const Node& node)> admit;
  // Only results of the same strides are put together.
  bool same_strides = false;
};

// Groups of pointwise operators whose results have the same sizes and device, each reading a result
// of another one; none can be made larger by a node or by another group without a path that leaves
// a group and comes back. Nodes are put into an order in which each group stands together. For
// graphs without writes.
std::vector<FusionGroup> fusion_groups(Graph& graph, const FusionOptions& options = {});

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_FUSION_GROUPS_H_
