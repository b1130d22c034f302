#ifndef TORCHLIFT_AUTODIFF_DEPENDENCE_RULES_H_
#define TORCHLIFT_AUTODIFF_DEPENDENCE_RULES_H_

// File: autodiff/dependence_rules.h
//
// What operators do to masks: NOTE [dependence] in autodiff/dependence.h. A family of operators has
// a file, autodiff/dependence_<family>.cc, with a table of rows:
//
//   {"sin", DependenceKind::kRule, &any_of_all},
//   {"index_select", DependenceKind::kMoves},
//
// A name stands for all overloads, and for the forms that write (sin_, sin.out); "norm.Scalar" for
// one overload.

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/util/ArrayRef.h>

#include <cstdint>
#include <string>
#include <vector>

#include "core/level.h"

namespace c10 {
class OperatorHandle;
}

namespace torchlift {

// One call of an operator, and what its arguments depend on. Masks are bool tensors
// [inputs, ...the argument's shape]; an undefined one is of what depends on nothing.
class DependenceCall {
 public:
  DependenceCall(const c10::OperatorHandle& op, LevelPtr level, std::vector<c10::IValue> args);

  const c10::OperatorHandle& op() const { return op_; }
  const LevelPtr& level() const { return level_; }
  const std::vector<c10::IValue>& args() const { return args_; }
  int64_t inputs() const { return level_->size(); }

  // The argument of that name; null where the overload has none, or it is None.
  const c10::IValue* find(const char* name) const;
  // ... that is a tensor; undefined where there is none.
  at::Tensor tensor(const char* name) const;
  int64_t integer(const char* name, int64_t otherwise) const;

  // Whether the value of t is unknown.
  bool unknown(const at::Tensor& t) const;
  at::Tensor mask(const at::Tensor& t) const;
  at::Tensor mask(const char* name) const { return mask(tensor(name)); }
  // All tensor arguments, those in lists too.
  std::vector<at::Tensor> tensors() const;

 private:
  const c10::OperatorHandle& op_;
  const LevelPtr level_;
  const std::vector<c10::IValue> args_;
};

// What one result depends on: a mask that broadcasts to [inputs, ...like's shape], bool or 0 and 1
// of like's dtype. `like` is on the meta device. Not called for results that have no derivative.
using DependenceRule = at::Tensor (*)(const DependenceCall& call, const at::Tensor& like,
                                      size_t result);

enum class DependenceKind : uint8_t {
  kRule,
  // The results are elements of the arguments in other places; elements of constants are zeros to
  // the batching rule. Unknown indices are taken for any, by `rule`, or as dense.
  kMoves,
  // ... sums of them with positive weights.
  kAdds,
  // The results depend on nothing, but their values are unknown.
  kNothing,
  // The results have values, which depend on the shapes of the arguments alone.
  kMade,
  // A number or a shape that depends on the values: an error.
  kReadsValues,
};

struct DependenceRow {
  const char* name;
  DependenceKind kind = DependenceKind::kRule;
  DependenceRule rule = nullptr;
  // With kMoves and kAdds: the arguments that are moved. All others of a floating dtype tell but
  // their shapes. Those of all names if empty.
  std::vector<const char*> moved = {};
};

// Null where the operator is in no table. `name` without namespace and underscore.
const DependenceRow* find_dependence_row(const std::string& name, const std::string& overload);

using DependenceRows = std::vector<DependenceRow>;
const DependenceRows& pointwise_dependence();
const DependenceRows& reduction_dependence();
const DependenceRows& move_dependence();
const DependenceRows& product_dependence();
const DependenceRows& layer_dependence();

// --- for rules -----------------------------------------------------------------------------------

// Either of two masks; one may be undefined.
at::Tensor either(const at::Tensor& a, const at::Tensor& b);
// [inputs, ...] with dims of size 1 after the first, so that there are `rank` others.
at::Tensor align(const at::Tensor& mask, int64_t rank);
// Any of those along some dims (of the tensor, without that of the inputs), which keep size 1.
at::Tensor any_along(const at::Tensor& mask, at::IntArrayRef dims);
// Any of all elements: [inputs], aligned to `rank`.
at::Tensor any_element(const at::Tensor& mask, int64_t rank);
// Where a constant is not zero, as bools; also of a sparse one, which stays sparse and of its
// dtype.
at::Tensor nonzeros(const at::Tensor& constant);
// 0 and 1 of a dtype; 1 + 1j of a complex one.
at::Tensor as_dtype(const at::Tensor& mask, at::ScalarType dtype);

// Each element of the result, on those of all arguments in its place (they broadcast).
at::Tensor any_of_all(const DependenceCall& call, const at::Tensor& like, size_t result);
// Each element of the result, on all elements of all arguments.
at::Tensor dense(const DependenceCall& call, const at::Tensor& like, size_t result);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_DEPENDENCE_RULES_H_
