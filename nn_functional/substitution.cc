#include "nn_functional/substitution.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/alias_ops.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "core/error.h"
#include "core/keys.h"
#include "core/runtime.h"

namespace torchlift {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// Above everything that gives an operator a meaning, kModeKey included.
constexpr DispatchKey kSubstitutionKey = DispatchKey::TESTING_ONLY_GenericMode;
static_assert(kSubstitutionKey > kModeKey);
constexpr DispatchKeySet kSubstitutionKeys(kSubstitutionKey);

const SubstitutionScope*& innermost() {
  static thread_local const SubstitutionScope* scope = nullptr;
  return scope;
}

OperatorObserver*& current_observer() {
  static thread_local OperatorObserver* observer = nullptr;
  return observer;
}

OperatorFilter*& current_filter() {
  static thread_local OperatorFilter* filter = nullptr;
  return filter;
}

template <class List>
bool has_substitute(const List& list) {
  for (const at::Tensor& t : list) {
    if (t.defined() && SubstitutionScope::find_anywhere(t) != nullptr) return true;
  }
  return false;
}

const at::Tensor& substituted(const at::Tensor& t) {
  const at::Tensor* value = t.defined() ? SubstitutionScope::find_anywhere(t) : nullptr;
  return value == nullptr ? t : *value;
}

void substitute_list(IValue& arg) {
  const std::vector<at::Tensor> tensors = arg.toTensorVector();
  if (!has_substitute(tensors)) return;
  c10::List<at::Tensor> list;
  list.reserve(tensors.size());
  for (const at::Tensor& t : tensors) list.push_back(substituted(t));
  arg = std::move(list);
}

void substitute_optional_list(IValue& arg) {
  c10::List<std::optional<at::Tensor>> list;
  for (const std::optional<at::Tensor>& t : arg.toOptionalTensorVector()) {
    list.push_back(t.has_value() ? std::optional<at::Tensor>(substituted(*t)) : t);
  }
  arg = std::move(list);
}

void substitute(IValue& arg) {
  if (arg.isTensor()) {
    const at::Tensor& own = arg.toTensor();
    const at::Tensor* value = own.defined() ? SubstitutionScope::find_anywhere(own) : nullptr;
    if (value != nullptr) arg = *value;
  } else if (arg.isTensorList()) {
    substitute_list(arg);
  } else if (arg.isOptionalTensorList()) {
    substitute_optional_list(arg);
  }
}

void substitute_arguments(const OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) substitute((*stack)[i]);
}

// With the key excluded.
void call_below(const OperatorHandle& op, Stack* stack) {
  const SubstitutionScope* scope = SubstitutionScope::current();
  const c10::impl::ExcludeDispatchKeyGuard below(kSubstitutionKeys);
  // There is none on a thread that inherited the key: a worker of libtorch.
  if (scope != nullptr && scope->active()) {
    if (current_observer() != nullptr) return current_observer()->call(op, stack);
    substitute_arguments(op, stack);
  }
  op.callBoxed(stack);
}

void substitution_kernel(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const SubstitutionScope* scope = SubstitutionScope::current();
  OperatorFilter* filter = current_filter();
  if (filter != nullptr) {
    if (filter->call(op, stack)) return;
    // The filter is to see what the operator is made of, too.
    if (scope == nullptr || !scope->active()) {
      const DispatchKeySet below(DispatchKeySet::FULL_AFTER, kSubstitutionKey);
      return op.redispatchBoxed(keys & below, stack);
    }
  }
  call_below(op, stack);
}

void install() {
  static std::once_flag once;
  std::call_once(once, [] {
    initialize_runtime();
    auto& dispatcher = c10::Dispatcher::singleton();
    if (dispatcher.hasBackendFallbackForDispatchKey(kSubstitutionKey)) {
      unsupported_error("functional_call", "the dispatch key ", toString(kSubstitutionKey),
                        " is already taken by another library; functional modules need it.");
    }
    // Lives as long as the process: libtorch's tables are torn down after us at exit.
    static auto* registration = new c10::RegistrationHandleRAII(dispatcher.registerFallback(
        kSubstitutionKey, c10::KernelFunction::makeFromBoxedFunction<&substitution_kernel>(),
        "torchlift"));
    (void)registration;
  });
}

c10::impl::LocalDispatchKeySet keys_with_substitution() {
  install();
  c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  keys.included_ = keys.included_ | kSubstitutionKeys;
  // The scope may be opened inside an operator that was substituted.
  keys.excluded_ = keys.excluded_ - kSubstitutionKeys;
  return keys;
}

const void* evaluating_node() { return torch::autograd::get_current_node().get(); }

const c10::TensorImpl* address(const Substitution& s) { return s.own.unsafeGetTensorImpl(); }

uint64_t filter_bit(const c10::TensorImpl* impl) {
  return uint64_t{1} << ((reinterpret_cast<uintptr_t>(impl) * 0x9E3779B97F4A7C15U) >> 58);
}

}  // namespace

OperatorFilter* OperatorFilter::current() { return current_filter(); }

void OperatorFilter::call_unfiltered(const OperatorHandle& op, Stack* stack) {
  call_below(op, stack);
}

void OperatorObserver::run_substituted(const OperatorHandle& op, Stack* stack) {
  substitute_arguments(op, stack);
  op.callBoxed(stack);
}

namespace {

DispatchKeySet installed_keys() {
  install();
  return kSubstitutionKeys;
}

}  // namespace

FilterScope::FilterScope(OperatorFilter* filter)
    : outer_(std::exchange(current_filter(), filter)), key_(installed_keys()) {}

FilterScope::~FilterScope() { current_filter() = outer_; }

UnfilteredScope::UnfilteredScope() : guard_(kSubstitutionKeys) {}

ObserverScope::ObserverScope(OperatorObserver* observer)
    : outer_(std::exchange(current_observer(), observer)) {}

ObserverScope::~ObserverScope() { current_observer() = outer_; }

SubstitutionScope::SubstitutionScope(std::vector<Substitution> substitutions)
    : substitutions_(std::move(substitutions)),
      outer_(innermost()),
      node_(evaluating_node()),
      keys_(keys_with_substitution()) {
  const auto before = [](const Substitution& a, const Substitution& b) {
    return address(a) < address(b);
  };
  if (!std::is_sorted(substitutions_.begin(), substitutions_.end(), before)) {
    std::sort(substitutions_.begin(), substitutions_.end(), before);
  }
  // What an outer scope puts in the value's place is the value.
  if (outer_ != nullptr && outer_->active()) {
    for (Substitution& s : substitutions_) s.value = substituted(s.value);
  }
  std::erase_if(substitutions_, [](const Substitution& s) { return s.own.is_same(s.value); });
  for (const Substitution& s : substitutions_) filter_ |= filter_bit(address(s));
  for (Substitution& s : substitutions_) {
    if (find(s.value.unsafeGetTensorImpl()) == nullptr) continue;
    const c10::impl::ExcludeDispatchKeyGuard below(kSubstitutionKeys);
    s.value = at::_ops::alias::call(s.value);
  }
  innermost() = this;
}

SubstitutionScope::~SubstitutionScope() { innermost() = outer_; }

const SubstitutionScope* SubstitutionScope::current() { return innermost(); }

bool SubstitutionScope::active() const { return evaluating_node() == node_; }

const at::Tensor* SubstitutionScope::find(const c10::TensorImpl* own) const {
  if ((filter_ & filter_bit(own)) == 0) return nullptr;
  const auto found = std::lower_bound(
      substitutions_.begin(), substitutions_.end(), own,
      [](const Substitution& s, const c10::TensorImpl* impl) { return address(s) < impl; });
  return found != substitutions_.end() && address(*found) == own ? &found->value : nullptr;
}

const at::Tensor* SubstitutionScope::find_anywhere(const at::TensorBase& t) {
  const c10::TensorImpl* own = t.unsafeGetTensorImpl();
  const SubstitutionScope* scope = innermost();
  const void* node = scope == nullptr ? nullptr : scope->node_;
  for (; scope != nullptr && scope->node_ == node; scope = scope->outer_) {
    const at::Tensor* value = scope->find(own);
    if (value != nullptr) return value;
  }
  return nullptr;
}

}  // namespace torchlift
