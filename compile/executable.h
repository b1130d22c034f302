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

  // As Program::run.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs,
                              const RunOptions& options = {}) const;

  // The graph after the passes.
  const Graph& graph() const { return program_.graph(); }
  const OptimizeReport& report() const { return *report_; }

 private:
  static Program prepared(Graph graph, const ExecutableOptions& options, OptimizeReport* report);

  std::shared_ptr<OptimizeReport> report_;
  Program program_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_EXECUTABLE_H_
