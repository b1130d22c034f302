#ifndef TORCHLIFT_COMPILE_ARTIFACT_LOADED_PROGRAM_H_
#define TORCHLIFT_COMPILE_ARTIFACT_LOADED_PROGRAM_H_

// File: compile/artifact/loaded_program.h
//
// What an artifact runs: its graph, or the machine code that it holds for it.
//
//   const LoadedProgram program(load_artifact("loss.tlc"), {.allow_native_code = true});
//   std::vector<at::Tensor> outputs = program.run(inputs);
//
// NOTE [native code]
// Machine code in a file does whatever it wants once it is loaded, so nothing loads it by surprise:
// load_artifact only reads it, and a LoadedProgram asks for allow_native_code. It gives what the
// graph gives, within the accuracy of its dtypes: what it writes into its inputs, and which outputs
// are views, is the same (native_plan.h). Where more is wanted than values, the graph runs: under a
// transform, on tensors that autograd tracks, where an input that is written into shares memory
// with another one, which compiled code cannot see, where a dynamic dim has the size 0 or 1, for
// which it is not compiled, and where the code throws (an index out of range), for the operator's
// own error.

#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>

#include <memory>
#include <string>
#include <vector>

#include "compile/artifact/artifact.h"
#include "compile/graph.h"
#include "compile/optimized_program.h"
#include "compile/replay.h"

namespace torchlift::compile {

//
// NOTE [state of loaded programs]
// Constants that the program writes into (NOTE [state] in compile/captured_state.h) hold what they
// held when it was saved, and then what its runs write. Each LoadedProgram has its own, which
// copies of it share. Runs of one program wait for each other.

struct LoadOptions {
  // Whether machine code in the file may be loaded: for files of people whom you trust as the
  // authors of the program that you run.
  bool allow_native_code = false;
  // "": what the file holds. "eager": its graph, though it holds machine code.
  std::string backend;
};

class LoadedProgram {
 public:
  // Throws TransformError, which begins with `file`, if the artifact holds machine code that is
  // not allowed, or does not fit this machine and these versions of torch and torchlift.
  explicit LoadedProgram(const Artifact& artifact, const LoadOptions& options = {},
                         const std::string& file = "artifact");

  // As Program::run. For a seed, machine code may draw other random numbers than the graph does.
  std::vector<at::Tensor> run(at::ArrayRef<at::Tensor> inputs,
                              const RunOptions& options = {}) const;

  // Runs the machine code, if there is any and it can run these inputs, which it may write into.
  // Throws UnsupportedError if it throws, or gives what the graph does not give.
  void try_out(at::ArrayRef<at::Tensor> inputs) const;

  const Graph& graph() const { return program_.graph(); }
  // Of the code that runs: "eager" or "inductor".
  const std::string& backend() const { return backend_; }

 private:
  struct Native;

  OptimizedProgram program_;
  std::string backend_ = "eager";
  std::shared_ptr<const Native> native_;  // with the constants of program_
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_ARTIFACT_LOADED_PROGRAM_H_
