#ifndef TORCHLIFT_CORE_INTERPRETER_H_
#define TORCHLIFT_CORE_INTERPRETER_H_

// File: core/interpreter.h
//
// NOTE [interpreted levels]
// A level whose batch dim does not hold examples, but parts of one value: its Taylor coefficients,
// say, or what each of its elements depends on. Where an operator works on each part alone (a
// view, a sum, a product with a constant), the batching rules serve as they are: that is what they
// do. Everywhere else the level's interpreter takes over.
//
//   class Series final : public Interpreter { ... };
//
//   LevelScope scope({.kind = LevelKind::kInterpreted, .size = order + 1, .interpreter = series});
//   at::Tensor x = lift(coefficients, 0, scope.level());   // coefficients: [order + 1, ...]
//   at::Tensor y = f(x);                                   // every operator asks `series` first
//
// A tensor of the level without a batch dim is a constant to the interpreter. What that means as
// parts (the value and then zeros, for a series) is told by spread(), so that a function may make
// a tensor and write into it (NOTE [promotion] in core/promotion.h).
//
// Everything else is as in other levels: f's tensors are its domain, so reverse mode inside of f
// records there, and its formulas come to the interpreter as operators; values may belong to outer
// levels and be differentiated from outside.

#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>

#include <cstdint>

#include "core/level.h"

namespace c10 {
class OperatorHandle;
}

namespace torchlift {

class Interpreter {
 public:
  virtual ~Interpreter() = default;

  // The transform to name in error messages: "jet".
  virtual const char* transform() const = 0;

  // Works `op` on the arguments on top of the stack, as the level sees them, one of which has a
  // batch dim there, and replaces them by the results. Returns false, with the stack as it was,
  // where the level's batching rule is right as it stands. Runs with the dispatch state of the
  // values: what it calls on those takes part in outer domains.
  virtual bool run(const c10::OperatorHandle& op, const LevelPtr& level,
                   torch::jit::Stack* stack) const = 0;

  // What a constant is as parts: value [...] becomes [size, ...], memory of its own.
  virtual at::Tensor spread(const at::Tensor& value, int64_t size) const = 0;
};

// For run(): calls the batching rule of `op` with other arguments, past the level's interpreter.
// One of them has a batch dim at the level, and none is tracked there.
void call_batching_rule(const c10::OperatorHandle& op, const LevelPtr& level,
                        torch::jit::Stack* stack);

// For kernels: lets the interpreter of `level` run. False where it did not, and the batching rule
// is to serve; the stack is as it was then.
bool interpret(const c10::OperatorHandle& op, const LevelPtr& level, torch::jit::Stack* stack);
bool interpret(const char* name, const char* overload, const LevelPtr& level,
               torch::jit::Stack* stack);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_INTERPRETER_H_
