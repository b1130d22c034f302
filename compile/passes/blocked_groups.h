#ifndef TORCHLIFT_COMPILE_PASSES_BLOCKED_GROUPS_H_
#define TORCHLIFT_COMPILE_PASSES_BLOCKED_GROUPS_H_

// File: compile/passes/blocked_groups.h
//
// Finds the fusion groups (compile/passes/fusion_groups.h) that are to run block by block, and how
// they are cut: those of large tensors on the CPU, where the memory of what lies between two
// operators costs more than calling each of them once a block.
//
//   const std::vector<BlockedGroup> groups = blocked_groups(graph);   // orders the nodes anew
//   const MemoryPlan plan = memory_plan(graph);
//   take_over_memory(graph, plan.in_place, &groups);

#include <cstdint>
#include <vector>

#include "compile/blocked_group.h"
#include "compile/graph.h"
#include "compile/passes/memory_plan.h"

namespace torchlift::compile {

// Measured (docs/benchmarks.md); for smaller tensors blocks bring nothing, as all of a value stays
// in the cache, and cost a microsecond for each call of an operator.
struct BlockingOptions {
  int64_t block_bytes = int64_t{512} << 10;    // of one value in one block, at most
  int64_t live_bytes = int64_t{4} << 20;       // of all that is alive in a block
  int64_t min_bytes = int64_t{3} << 20;        // of one value as a whole
  int64_t min_saved_bytes = int64_t{6} << 20;  // of the values that are never there as a whole
};

// None in a graph with dynamic dims. Puts the nodes of each group side by side; a graph without
// such groups stays as it is. For graphs without writes.
std::vector<BlockedGroup> blocked_groups(Graph& graph, const BlockingOptions& options = {});

// Lets outputs of the groups lie where inputs that nobody reads any more have lain.
void take_over_memory(const Graph& graph, const std::vector<InPlace>& in_place,
                      std::vector<BlockedGroup>* groups);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_BLOCKED_GROUPS_H_
