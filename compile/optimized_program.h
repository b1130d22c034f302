#ifndef TORCHLIFT_COMPILE_OPTIMIZED_PROGRAM_H_
#define TORCHLIFT_COMPILE_OPTIMIZED_PROGRAM_H_

// File: compile/optimized_program.h
//
// A graph of a file, say, which is optimized when it first runs.
//
//   const OptimizedProgram program(load_artifact(path).graph);
//   std::vector<at::Tensor> outputs = program.run({x, w});
//
// Loading a file computes nothing, whatever the file holds; the passes (compile/executable.h) may.
// What says too much or too little of its values' types does no harm: nothing is cut into blocks.
// Where a level or autograd looks at the operators, and where a pass cannot do with the graph, it
// runs as it is. Can be copied, and run from several threads.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <memory>
#include <vector>

#include "compile/graph.h"
#include "compile/replay.h"

namespace torchlift::compile {

class OptimizedProgram {
 public:
  // Throws what verify() does.
  explicit OptimizedProgram(Graph graph);

  // These as those of Program.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs,
                              const RunOptions& options = {}) const;
  std::vector<at::Tensor> prepared(at::ArrayRef<at::Tensor> inputs) const {
    return program_.prepared(inputs);
  }
  bool needs_dispatch(at::ArrayRef<at::Tensor> inputs) const {
    return program_.needs_dispatch(inputs);
  }
  // As it was given.
  const Graph& graph() const { return program_.graph(); }

 private:
  struct Optimized;

  Program program_;
  std::shared_ptr<Optimized> optimized_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_OPTIMIZED_PROGRAM_H_
