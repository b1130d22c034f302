#ifndef TORCHLIFT_CORE_BOXED_H_
#define TORCHLIFT_CORE_BOXED_H_

// File: core/boxed.h
//
// Working with operators on the dispatcher's stack: what core/plumbing.h does for typed ones.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>

#include <deque>
#include <functional>
#include <vector>

#include "core/level.h"
#include "core/lifted_tensor.h"

namespace c10 {
class OperatorHandle;
}

namespace torchlift {

// Calls f on every defined tensor in an argument (a tensor, optional tensor, or list of either).
void for_each_tensor(const c10::IValue& value, const std::function<void(const at::Tensor&)>& f);

// The argument with f applied to every defined tensor in it.
c10::IValue map_tensors(const c10::IValue& value,
                        const std::function<at::Tensor(const at::Tensor&)>& f);

// Calls the operator on the values of its arguments, none of which has a batch dim at `level`, and
// lifts the results without one.
void apply_unbatched(const c10::OperatorHandle& op, const LevelPtr& level,
                     torch::jit::Stack* stack);

// Whether the argument at `index` is written in place by the operator.
bool writes_argument(const c10::OperatorHandle& op, size_t index);

// A WriteScope for every argument that the operator writes in place; all of them must be lifted.
class WriteScopes {
 public:
  WriteScopes(const c10::OperatorHandle& op, const std::vector<c10::IValue>& args);

 private:
  std::deque<WriteScope> scopes_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_BOXED_H_
