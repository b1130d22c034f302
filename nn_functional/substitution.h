#ifndef TORCHLIFT_NN_FUNCTIONAL_SUBSTITUTION_H_
#define TORCHLIFT_NN_FUNCTIONAL_SUBSTITUTION_H_

// File: nn_functional/substitution.h
//
// What functional_call (nn_functional/functional_call.h) rests on. Not for users.
//
// NOTE [substitution]
// A torch::nn::Module keeps its parameters as member handles that nobody but its own code can
// reassign. So the module is left alone, and the operators it calls are met instead: while a
// SubstitutionScope is open, a dispatch key in this thread's state sends every operator of the
// thread to a kernel of ours first, which replaces arguments that are parameters of the module by
// the values given for them, and calls the operator again.
//  - Nothing of the module or its tensors is written, so other threads may use it meanwhile, and an
//    exception leaves nothing to restore.
//  - The operator runs with the key excluded: what it is made of sees the values only. The values
//    are final. One that is itself a parameter with a value of its own (two weights exchanged) is
//    replaced by an alias, so that an operator that returns its argument (contiguous) does not lead
//    to a second substitution.
//  - Operators of a backward pass are never substituted: they work on what the forward pass saved.
//  - Scopes nest. The innermost one that knows a parameter decides.
// What is not an operator sees the module's own tensor: sizes, dtype and device, which are
// therefore checked to agree, but also data_ptr(), data(), requires_grad() and grad(). See
// docs/limits.md.

#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <vector>

namespace c10 {
class OperatorHandle;
struct IValue;
}  // namespace c10
namespace torch::jit {
using Stack = std::vector<c10::IValue>;
}

namespace torchlift {

// `own` is replaced by `value`.
struct Substitution {
  at::Tensor own;
  at::Tensor value;
};

// Replaces tensors on this thread while it lives. Cheap to make when the substitutions are sorted
// by the address of own's TensorImpl; each own must occur once.
class SubstitutionScope {
 public:
  explicit SubstitutionScope(std::vector<Substitution> substitutions);
  ~SubstitutionScope();
  SubstitutionScope(const SubstitutionScope&) = delete;
  SubstitutionScope& operator=(const SubstitutionScope&) = delete;

  // The innermost scope of this thread.
  static const SubstitutionScope* current();
  // The value that takes the place of t on this thread, or null.
  static const at::Tensor* find_anywhere(const at::TensorBase& t);
  // Whether operators are substituted now; false in a backward pass that began in the scope.
  bool active() const;

 private:
  const at::Tensor* find(const c10::TensorImpl* own) const;

  std::vector<Substitution> substitutions_;  // sorted by address
  uint64_t filter_ = 0;                      // a bit for each address
  const SubstitutionScope* outer_;
  const void* node_;  // of autograd, being evaluated when the scope was opened
  c10::impl::ForceDispatchKeyGuard keys_;
};

// Sees the operators that a module calls, with the module's own tensors as arguments. Its code runs
// below the substitution.
class OperatorObserver {
 public:
  virtual ~OperatorObserver() = default;
  // In place of op, whose arguments lie on the stack: calls run_substituted(op, stack), or leaves
  // other results there.
  virtual void call(const c10::OperatorHandle& op, torch::jit::Stack* stack) = 0;

 protected:
  // Replaces the arguments and calls the operator.
  static void run_substituted(const c10::OperatorHandle& op, torch::jit::Stack* stack);
};

// The observer of this thread while it lives.
class ObserverScope {
 public:
  explicit ObserverScope(OperatorObserver* observer);
  ~ObserverScope();
  ObserverScope(const ObserverScope&) = delete;
  ObserverScope& operator=(const ObserverScope&) = delete;

 private:
  OperatorObserver* outer_;
};

// Sees the operators of a thread, whatever they are called on and by whom, before they mean
// anything.
class OperatorFilter {
 public:
  virtual ~OperatorFilter() = default;
  // Replaces the arguments on the stack by the operator's results; or returns false, with the stack
  // as it was, and the operator runs.
  virtual bool call(const c10::OperatorHandle& op, torch::jit::Stack* stack) = 0;

  // That of this thread, or null.
  static OperatorFilter* current();

 protected:
  // Calls the operator, with the values of modules' parameters in their place, in such a way that
  // no filter sees what it is made of.
  static void call_unfiltered(const c10::OperatorHandle& op, torch::jit::Stack* stack);
};

// The filter of this thread while it lives.
class FilterScope {
 public:
  explicit FilterScope(OperatorFilter* filter);
  ~FilterScope();
  FilterScope(const FilterScope&) = delete;
  FilterScope& operator=(const FilterScope&) = delete;

 private:
  OperatorFilter* outer_;
  c10::impl::IncludeDispatchKeyGuard key_;
};

// While it lives, no filter sees the operators of this thread, and none of their arguments is
// substituted.
class UnfilteredScope {
 public:
  UnfilteredScope();
  UnfilteredScope(const UnfilteredScope&) = delete;
  UnfilteredScope& operator=(const UnfilteredScope&) = delete;

 private:
  c10::impl::ExcludeDispatchKeyGuard guard_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_NN_FUNCTIONAL_SUBSTITUTION_H_
