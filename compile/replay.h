#ifndef TORCHLIFT_COMPILE_REPLAY_H_
#define TORCHLIFT_COMPILE_REPLAY_H_

// File: compile/replay.h
//
// Runs a graph: one call of libtorch's kernel a node, without the function that was traced, without
// Python, and without autograd's bookkeeping where nothing is tracked.
//
//   const Program program(graph);
//   std::vector<at::Tensor> outputs = program.run({x, w});
//
// A program can be copied, and run from several threads at once; runs of one that writes into its
// constants (NOTE [state] in compile/captured_state.h) wait for each other. The inputs may be
// lifted tensors, or tracked by autograd: then every node is an operator like any other, so a
// program can be transformed as the function was.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "compile/blocked_group.h"
#include "compile/graph.h"

namespace torchlift::compile {

struct RunOptions {
  // For the random operators: with a seed, a run always gives the same numbers, and leaves the
  // default generators as they were. Without one they draw on.
  std::optional<uint64_t> seed;
};

// How the nodes may run where autograd and levels do not look.
struct RunPlan {
  // Nodes that may write their result over this argument, by their index
  // (compile/passes/memory_plan.h).
  std::vector<std::pair<int32_t, ValueId>> in_place;
  // Nodes that run block by block (compile/passes/blocked_groups.h).
  std::vector<BlockedGroup> blocked;
  // Values whose strides a pass chose (compile/passes/channels_last.h): where a kernel gives
  // others, its result is copied.
  std::vector<ValueId> chosen;
  // Constants that somebody else writes into, which outputs may be: NOTE [outputs that are
  // constants] in compile/own_copy.h.
  std::vector<ValueId> state;
};

class Program {
 public:
  // Throws what verify() does.
  explicit Program(Graph graph, const RunPlan& plan = {});

  // One tensor for each input of the graph; gives one for each output, which is no constant of it
  // (compile/own_copy.h). Throws TransformError,
  // before anything runs, if these are not as many, or of another dtype, shape or device than the
  // graph was traced with (a dynamic dim may have any size).
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs,
                              const RunOptions& options = {}) const;

  // What run() does first: the inputs, checked, with the strides that the graph was traced with.
  std::vector<at::Tensor> prepared(at::ArrayRef<at::Tensor> inputs) const;
  // Whether autograd, or a level, must see the operators of a run on these inputs.
  bool needs_dispatch(at::ArrayRef<at::Tensor> inputs) const;

  const Graph& graph() const;

 private:
  struct Plan;
  std::shared_ptr<const Plan> plan_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_REPLAY_H_
