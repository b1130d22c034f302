#ifndef TORCHLIFT_COMPILE_PASSES_SCHEDULE_H_
#define TORCHLIFT_COMPILE_PASSES_SCHEDULE_H_

// File: compile/passes/schedule.h
//
// Puts nodes into an order in which less memory is alive at once: what makes a large result of
// small arguments waits, and what frees more than it takes comes soon.
//
//   schedule_for_memory(graph);

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

struct ScheduleReport {
  // The most that is alive at once, in bytes, where results are written over arguments that nobody
  // reads any more: in the order that the graph had, and that it has now.
  int64_t before = 0;
  int64_t after = 0;
};

// The graph keeps its order unless the one that is found needs at most `worth` of its memory.
// Random operators, checks, branches and loops keep their order among each other. For graphs
// without writes and dynamic dims, of strided tensors.
ScheduleReport schedule_for_memory(Graph& graph, double worth = 0.95);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_SCHEDULE_H_
