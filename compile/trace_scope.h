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
// operator is written down wherever it stands, and so is what is computed from a captured tensor
// that the function writes into: NOTE [state] in compile/captured_state.h.
//
// Operators that ask for numbers (item()) would fix them to those of this one run, so they are
// errors. Where no more than the shape of a result depends on numbers (nonzero(), x[mask]), it is
// that of this run, and each run checks it: NOTE [shapes of one run] in compile/trace_rules.cc.
//
// NOTE [tracing by shapes]
// But for those, nothing of the graph depends on the numbers in the inputs, and they need not be
// known: by shapes alone, the inputs and all that is computed from them are hollow tensors (NOTE
// [hollow tensors] in compile/hollow.h), and operators are called on the meta device. What is
// computed from no input runs as always, on its own numbers (but see compile/uniform_constants.h).
//
// Two things are less sure than with numbers. Checks of values (of a Cholesky factor's info, of
// targets that are to be in range) are not made while it is traced. And a meta kernel may give
// other strides than the real one, so the graph says that its layouts are assumed, and a run puts
// them right: NOTE [assumed layouts] in compile/replay.cc. A meta kernel that gives another shape
// or dtype is an error then.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "compile/graph.h"
#include "core/level.h"

namespace torchlift::compile {

class CapturedState;
class Recording;
class StateFilter;
class UniformConstantsScope;

// A name for the input at `path` of the arguments: "[0].hidden[1]" becomes "x0_hidden_1".
std::string input_name(const std::string& path);

// What is known of the inputs.
enum class Known : uint8_t {
  kValues,
  kShapes,  // no numbers: see NOTE [tracing by shapes]
};

// kShapes if one of the tensors is on the meta device.
Known known_of(const std::vector<at::Tensor>& tensors);

// Held while the function runs. On this thread only.
class TraceScope {
 public:
  // transform: the name in error messages. source: called for each operator, it tells where in the
  // user's code that is (Node::source). state: of tensors that the function captures and writes
  // into; it may ask for another run (NOTE [state] in compile/captured_state.h). Without one, a
  // value of the trace that is written into such a tensor is an error.
  explicit TraceScope(std::string transform = "trace", std::function<std::string()> source = {},
                      Known known = Known::kValues, CapturedState* state = nullptr);
  ~TraceScope();
  TraceScope(const TraceScope&) = delete;
  TraceScope& operator=(const TraceScope&) = delete;

  // The tensor to hand to the function in place of x. In-place operators of the function write into
  // x's memory, as they would without a trace; by shapes alone, nothing is read or written, and an
  // x on the meta device stands for a tensor on `meta_device`.
  at::Tensor input(const at::Tensor& x, const std::string& name,
                   c10::Device meta_device = c10::kCPU);

  // Ends the run. Outputs may be tensors that do not depend on the inputs, or undefined ones. Call
  // it once.
  Graph finish(const std::vector<at::Tensor>& outputs);

 private:
  std::shared_ptr<Recording> recording_;
  std::optional<LevelScope> level_scope_;
  std::unique_ptr<UniformConstantsScope> uniform_;
  std::unique_ptr<StateFilter> state_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_TRACE_SCOPE_H_
