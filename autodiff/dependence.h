#ifndef TORCHLIFT_AUTODIFF_DEPENDENCE_H_
#define TORCHLIFT_AUTODIFF_DEPENDENCE_H_

// File: autodiff/dependence.h
//
// NOTE [dependence]
// Which elements of a function's values depend on which of its inputs, for every input of a shape:
// the function runs once on masks. Its tensors are those of an interpreted level
// (core/interpreter.h) whose parts are inputs, and part i of element e is 1 where e depends on
// input i, else 0. What e itself is nobody knows, so nothing that is found can hold at one point
// only. A tensor of the level without a batch dim is a constant and has a value, whose zeros count:
// A x depends on x where A is not zero.
//
// An operator is looked up by its name (autodiff/dependence_rules.h). One that moves elements about
// is the batching rule as it stands. One that nobody knows is taken for dense: each element of its
// results depends on all that any element of its arguments depends on. That is right, but not
// tight, so it is reported. What is detached, or computed under no_grad, depends on nothing, and
// neither does what has no derivative (comparisons, integers, floor); that its values are unknown
// remains: they cannot be numbers or shapes.
//
// Derivatives inside of the function come as the operators of their formulas, so the pattern of a
// Hessian is that of the gradient's Jacobian.

#include <ATen/core/Tensor.h>

#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/interpreter.h"

namespace torchlift {

class Dependence final : public Interpreter {
 public:
  const char* transform() const override { return "sparsity"; }
  bool run(const c10::OperatorHandle& op, const LevelPtr& level,
           torch::jit::Stack* stack) const override;
  at::Tensor spread(const at::Tensor& value, int64_t size) const override;

  // The operators that were taken for dense.
  std::vector<std::string> dense_operators() const;

 private:
  void note_dense(const std::string& op) const;

  mutable std::mutex mutex_;
  mutable std::set<std::string> dense_;
};

// Throws UnsupportedError if what one of the tensors depends on is being found out: for functions
// whose derivative is not that of the operators they call.
void check_no_dependence(const std::vector<at::Tensor>& tensors);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_DEPENDENCE_H_
