#ifndef TORCHLIFT_COMPILE_TRACE_RULES_H_
#define TORCHLIFT_COMPILE_TRACE_RULES_H_

// File: compile/trace_rules.h
//
// NOTE [trace rules]
// A trace writes an operator down as it is called. For a few that would be wrong in a later run, as
// something of their result depends on the numbers of this one: a shape, a choice that libtorch
// makes. For these there is a rule here, which calls others in its place (they are written down in
// turn), or writes down what must hold of the numbers.

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include "core/level.h"

namespace c10 {
class OperatorHandle;
}

namespace torchlift::compile {

class Recording;

// A call of an operator at the level of a trace.
struct TracedCall {
  const c10::OperatorHandle& op;
  const LevelPtr& level;
  Recording& recording;
  // Writes an operator down as it is called.
  void (*write_down)(const c10::OperatorHandle& op, const LevelPtr& level, Recording& recording,
                     torch::jit::Stack* stack);
};

// Takes the arguments from the stack, leaves the results there and returns true; or returns false,
// and leaves the arguments, perhaps others in their place, for the operator to be written down.
using TraceRule = bool (*)(const TracedCall& call, torch::jit::Stack* stack);

// Null if there is none.
TraceRule find_trace_rule(const c10::OperatorHandle& op);

// The value of t, a tensor of `level`, which nobody differentiates.
at::Tensor untracked(const at::Tensor& t, const LevelPtr& level);

// For an operator that no graph can say, as each run would have another shape.
[[noreturn]] void throw_shape_of_numbers(const c10::OperatorHandle& op, const Recording& recording);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_TRACE_RULES_H_
