#ifndef TORCHLIFT_COMPILE_PASSES_MEMORY_PLAN_H_
#define TORCHLIFT_COMPILE_PASSES_MEMORY_PLAN_H_

// File: compile/passes/memory_plan.h
//
// Where intermediate values may lie in one piece of memory, known before the program runs.
//
//   const MemoryPlan plan = memory_plan(graph, {batch_size});
//   char* arena = allocate(plan.arena_bytes);
//   ... arena + plan.buffers[plan.buffer_of[id]].offset

#include <cstdint>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// Memory that is written by nodes first to last. Of several values one after the other, where one
// takes the place of its argument.
struct Buffer {
  int64_t offset = 0;  // in the arena; a multiple of kArenaAlignment
  int64_t bytes = 0;
  int32_t first = 0;  // index of the node that makes it
  int32_t last = 0;   // and of the last that reads it, or a view of it
};
inline constexpr int64_t kArenaAlignment = 64;

// A node whose result may be written over its argument: a pointwise operator, or one that gives its
// first argument with some elements replaced (index_put, slice_scatter), that is the last to read
// it, or what shares its memory, and gives the same type. A run has to see that the argument is no
// conjugate view, which types do not tell (can_be_written_over in compile/blocked_group.h).
struct InPlace {
  int32_t node = 0;
  ValueId argument = kNoValue;
};

struct MemoryPlan {
  std::vector<Buffer> buffers;
  // By ValueId: the index of the buffer that a node's result is to be made in. -1 for inputs,
  // constants, views, and what outputs may share memory with: that belongs to the caller.
  std::vector<int32_t> buffer_of;
  std::vector<InPlace> in_place;
  // By ValueId: a number that all values have that may share memory; the bytes that a node
  // allocates for this value, 0 for inputs, constants and views; and whether what shares its memory
  // was there before the run, or is there after it.
  std::vector<int32_t> class_of;
  std::vector<int64_t> allocated;
  std::vector<bool> outlives;
  int64_t arena_bytes = 0;
  // The most that is alive at once: no arena can be smaller.
  int64_t live_bytes = 0;
  // Memory of outputs, which is not in the arena.
  int64_t output_bytes = 0;
  // What running node by node, each result in memory of its own until its last reader has run,
  // takes at its peak, outputs included; and what the plan takes.
  int64_t eager_peak_bytes = 0;
  int64_t peak_bytes() const { return arena_bytes + output_bytes; }
};

// At these sizes of the dynamic dims. For graphs without writes, of strided tensors (but for what
// they return).
MemoryPlan memory_plan(const Graph& graph, const std::vector<int64_t>& symbols = {});

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_MEMORY_PLAN_H_
