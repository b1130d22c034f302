#ifndef TORCHLIFT_COMPILE_TRACE_SCOPE_H_
#define TORCHLIFT_COMPILE_TRACE_SCOPE_H_

// File: compile/trace_scope.h
//
// One trace, below the typed API (compile/trace.h) and the Python one.
//
//   TraceScope scope;
//   at::Tensor t = scope.input(x, "x");
//   at::Tensor y = f(t);                  // transforms and all
//   Graph graph = scope.finish({y});
//
// NOTE [tracing]
// The function runs once, on its real inputs, at a level below all of its own transforms: what vmap
// makes of an operator, and what a derivative is made of, arrive there as plain operators on the
// tensors of that level, and are written down (NOTE [recording levels] in core/recorder.h). What is
// computed from no input runs as always, and what it gives is a constant of the graph; but a random
// operator is written down wherever it stands.
//
// Operators that ask for numbers (item(), nonzero()...) would fix them to those of this one run, so
// they are errors.

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "compile/graph.h"
#include "core/level.h"

namespace torchlift::compile {

class Recording;

// A name for the input at `path` of the arguments: "[0].hidden[1]" becomes "x0_hidden_1".
std::string input_name(const std::string& path);

// Held while the function runs. On this thread only.
class TraceScope {
 public:
  // transform: the name in error messages. source: called for each operator, it tells where in the
  // user's code that is (Node::source).
  explicit TraceScope(std::string transform = "trace", std::function<std::string()> source = {});
  ~TraceScope();
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

  // The tensor to hand to the function in place of x. In-place operators of the function write into
  // x's memory, as they would without a trace.
  at::Tensor input(const at::Tensor& x, const std::string& name);

  // Ends the run. Outputs may be tensors that do not depend on the inputs, or undefined ones. Call
  // it once.
  Graph finish(const std::vector<at::Tensor>& outputs);

 private:
  std::shared_ptr<Recording> recording_;
  std::optional<LevelScope> level_scope_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_TRACE_SCOPE_H_
