#include "autodiff/forward_mode.h"

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/_new_zeros_with_same_feature_meta.h>
#include <c10/core/AutogradState.h>
#include <c10/util/Exception.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/boxed.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/runtime.h"

namespace torchlift {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::KernelFunction;
using c10::OperatorHandle;
using torch::jit::Stack;

// Whether t, or a value in it, has a tangent.
bool has_tangent_anywhere(const at::Tensor& t) {
  if (t._fw_grad(/*level=*/0).defined()) return true;
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr && has_tangent_anywhere(impl->value());
}

// An alias of t that nobody differentiates. Called with GradMode off.
at::Tensor without_tangents(const at::Tensor& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl == nullptr) return t.detach();
  at::Tensor alias = lift(without_tangents(impl->value()), impl->bdim(), impl->level_ptr());
  if (!t.is_inference()) {
    alias.unsafeGetTensorImpl()->set_version_counter(t.unsafeGetTensorImpl()->version_counter());
  }
  return alias;
}

// Tensors that were replaced by aliases, so that an operator that writes one can return itself.
using Replaced = std::vector<std::pair<at::Tensor, at::Tensor>>;  // (alias, tensor)

void cut_arguments(const OperatorHandle& op, Stack* stack, Replaced& replaced) {
  const DerivativeScope derivative;
  const size_t count = op.schema().arguments().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    c10::IValue& arg = (*stack)[i];
    bool found = false;
    for_each_tensor(arg, [&](const at::Tensor& t) { found = found || has_tangent_anywhere(t); });
    if (!found) continue;
    arg = map_tensors(arg, [&](const at::Tensor& t) {
      if (!has_tangent_anywhere(t)) return t;
      replaced.emplace_back(without_tangents(t), t);
      return replaced.back().first;
    });
  }
}

void restore_results(const OperatorHandle& op, Stack* stack, const Replaced& replaced) {
  const size_t count = op.schema().returns().size();
  for (size_t i = stack->size() - count; i < stack->size(); ++i) {
    c10::IValue& result = (*stack)[i];
    if (!result.isTensor()) continue;
    for (const auto& [alias, tensor] : replaced) {
      if (result.toTensor().is_same(alias)) {
        result = tensor;
        break;
      }
    }
  }
}

// A plain tensor without a tangent, into which one with a lifted tangent is written, gets a tangent
// of zeros that is lifted too: libtorch's would be plain, and the formula would write into it.
void give_written_tangents(const OperatorHandle& op, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  const size_t first = stack->size() - count;
  at::Tensor lifted_tangent;
  for (size_t i = 0; i < count; ++i) {
    for_each_tensor((*stack)[first + i], [&](const at::Tensor& t) {
      if (is_lifted(t)) return;
      const at::Tensor& tangent = t._fw_grad(/*level=*/0);
      if (tangent.defined() && is_lifted(tangent)) lifted_tangent = tangent;
    });
  }
  if (!lifted_tangent.defined()) return;
  for (size_t i = 0; i < count; ++i) {
    if (!writes_argument(op, i)) continue;
    for_each_tensor((*stack)[first + i], [&](const at::Tensor& t) {
      if (is_lifted(t) || t._fw_grad(/*level=*/0).defined()) return;
      if (!t.is_floating_point() && !t.is_complex()) return;
      t._set_fw_grad(at::_new_zeros_with_same_feature_meta(lifted_tangent, t), /*level=*/0,
                     /*is_inplace_op=*/true);
    });
  }
}

void forward_boxed(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const DispatchKeySet below = keys & forward_internal::kBelowForward;
  // An operator like t_ changes the tangent along with the tensor, or they would not fit.
  if (C10_LIKELY(!forward_mode_cut()) || op.hasTag(at::Tag::inplace_view)) {
    if (C10_UNLIKELY(op.schema().is_mutable()) && forward_internal::above_autograd()) {
      give_written_tangents(op, stack);
    }
    return op.redispatchBoxed(below, stack);
  }
  Replaced replaced;
  cut_arguments(op, stack, replaced);
  op.redispatchBoxed(below, stack);
  if (!replaced.empty()) restore_results(op, stack, replaced);
}

// NOTE [operators from elsewhere]
// An operator that libtorch does not define may lose tangents without a word: one of Python's
// torch.library with a formula for reverse mode alone, or one in C++ that has none. Its result
// would be a constant, so it is an error if no result of such an operator has a tangent.
// (libtorch's own operators say when they have no formula.)
bool is_from_elsewhere(const OperatorHandle& op) {
  static const auto* own = new std::unordered_set<std::string>{"aten", "prim", "prims", "profiler"};
  const auto space = op.operator_name().getNamespace();
  return space.has_value() && own->count(std::string(*space)) == 0;
}

bool any_tangent(const OperatorHandle& op, const Stack& stack) {
  const size_t count = op.schema().arguments().size();
  bool found = false;
  for (size_t i = stack.size() - count; i < stack.size(); ++i) {
    for_each_tensor(stack[i], [&](const at::Tensor& t) {
      found = found || (t.defined() && t._fw_grad(/*level=*/0).defined());
    });
  }
  return found;
}

void check_results_have_tangents(const OperatorHandle& op, const Stack& stack) {
  const size_t count = op.schema().returns().size();
  bool differentiable = false;
  bool found = false;
  for (size_t i = stack.size() - count; i < stack.size(); ++i) {
    for_each_tensor(stack[i], [&](const at::Tensor& t) {
      if (!t.defined() || !(t.is_floating_point() || t.is_complex())) return;
      differentiable = true;
      found = found || t._fw_grad(/*level=*/0).defined();
    });
  }
  if (!differentiable || found) return;
  unsupported_error(
      "jvp", toString(op.operator_name()),
      ": this operator has no derivative formula for forward mode, so its result would count as a "
      "constant. Use reverse mode (vjp, jacrev), give the function around it a "
      "torchlift.custom_jvp "
      "rule, or pass it torchlift.stop_gradient(x) if a constant is what you mean.");
}

void forward_from_elsewhere(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const bool watched =
      forward_internal::above_autograd() && !forward_mode_cut() && any_tangent(op, *stack);
  forward_boxed(op, keys, stack);
  if (watched) check_results_have_tangents(op, *stack);
}

// Registrations live as long as the process: libtorch's tables are torn down after us at exit.
std::vector<c10::RegistrationHandleRAII>& handles() {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  return *all;
}

// Hears of nothing: see install.
class Silence : public c10::WarningHandler {
 public:
  void process(const c10::Warning& /*warning*/) override {}
};

// Operators that were defined and have not been looked at. The dispatcher tells of them while it
// holds its lock, so that nothing can be registered then.
class NewOperators : public c10::OpRegistrationListener {
 public:
  static NewOperators& heard_of() {
    static auto* all = [] {
      auto* listener = new NewOperators();
      handles().push_back(c10::Dispatcher::singleton().addRegistrationListener(
          std::unique_ptr<c10::OpRegistrationListener>(listener)));
      return listener;
    }();
    return *all;
  }

  void onOperatorRegistered(const OperatorHandle& op) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    names_.push_back(op.operator_name());
    some_.store(true, std::memory_order_release);
  }
  void onOperatorDeregistered(const OperatorHandle& /*op*/) override {}

  bool some() const { return some_.load(std::memory_order_acquire); }
  std::vector<c10::OperatorName> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    some_.store(false, std::memory_order_release);
    return std::exchange(names_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<c10::OperatorName> names_;
  std::atomic<bool> some_{false};
};

// By name, what has a kernel.
std::unordered_set<std::string>& installed() {
  static auto* names = new std::unordered_set<std::string>();
  return *names;
}

void install_formulas() {
  for (forward_internal::ForwardKernel& kernel : forward_internal::forward_kernels()) {
    const c10::OperatorName name(kernel.name, kernel.overload);
    installed().insert(toString(name));
    handles().push_back(c10::Dispatcher::singleton().registerImpl(
        name, kForwardKey, std::move(kernel.kernel), kernel.signature,
        /*inferred_function_schema=*/nullptr, "torchlift"));
  }
}

// What is made of other operators needs no kernel: the key falls through for it.
void install_for(const c10::OperatorName& name) {
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto op = dispatcher.findOp(name);
  if (!op.has_value() || !op->hasSchema() ||
      op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
      !installed().insert(toString(name)).second) {
    return;
  }
  auto kernel = is_from_elsewhere(*op)
                    ? KernelFunction::makeFromBoxedFunction<&forward_from_elsewhere>()
                    : KernelFunction::makeFromBoxedFunction<&forward_boxed>();
  handles().push_back(dispatcher.registerImpl(name, kForwardKey, std::move(kernel), std::nullopt,
                                              nullptr, "torchlift"));
}

void install() {
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  initialize_runtime();
  // libtorch warns that the refusals of random operators are replaced (NOTE [forward key]).
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  if (installed().empty()) install_formulas();
  for (const c10::OperatorName& name : NewOperators::heard_of().take()) install_for(name);
}

c10::impl::ForceDispatchKeyGuard user_code_guard() {
  if (C10_UNLIKELY(NewOperators::heard_of().some())) install();
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return {tls.included_.add(kForwardKey), tls.excluded_.remove(kDerivativeMark)};
}

}  // namespace

namespace forward_internal {

KernelFunction boxed_kernel() { return KernelFunction::makeFromBoxedFunction<&forward_boxed>(); }

}  // namespace forward_internal

ForwardModeScope::ForwardModeScope() : guard_(user_code_guard()) {}

}  // namespace torchlift
