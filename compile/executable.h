#ifndef TORCHLIFT_COMPILE_EXECUTABLE_H_
#define TORCHLIFT_COMPILE_EXECUTABLE_H_

// File: compile/executable.h
//
// A graph made ready to run: all passes (compile/passes/optimize.h), results written over arguments
// that nobody reads any more (compile/passes/memory_plan.h), and what the function wrote into its
// inputs written into those of each run.
//
//   const Executable executable(trace(f, x, w));
//   std::vector<at::Tensor> outputs = executable.run({x, w});
//   std::cout << executable.report().str();
//
// Constants that the graph writes into are its state (NOTE [state] in compile/captured_state.h): a
// run reads what they hold, and writes into them. Such runs of one program, and of its copies, wait
// for each other. With more than 1 MB of it, the graph runs as it was traced, in place and without
// passes.
//
// Can be copied, and run from several threads.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <memory>
#include <vector>

#include "compile/graph.h"
#include "compile/passes/optimize.h"
#include "compile/replay.h"

namespace torchlift::compile {

struct ExecutableOptions {
  // Whether pointwise operators on large tensors run block by block. Blocks are cut by the types of
  // values without another look: not for a graph of somebody whom one does not trust.
  bool blocks = true;
};

class Executable {
 public:
  // Throws UnsupportedError for writes that have no functional form.
  explicit Executable(Graph graph, const ExecutableOptions& options = {});

  // As Program::run. An input that shares memory with the state is seen to: such a run takes the
  // graph as it was.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs,
                              const RunOptions& options = {}) const;

  // The graph after the passes.
  const Graph& graph() const { return program_.graph(); }
  const OptimizeReport& report() const { return *report_; }

 private:
  struct State;

  static Program prepared(Graph graph, const ExecutableOptions& options, OptimizeReport* report);
  std::vector<at::Tensor> run_program(at::ArrayRef<at::Tensor> inputs,
                                      const RunOptions& options) const;

  std::shared_ptr<State> state_;  // null without any
  std::shared_ptr<OptimizeReport> report_;
  Program program_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_EXECUTABLE_H_
