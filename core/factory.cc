#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/arange_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/empty_like_ops.h>
#include <ATen/ops/eye_ops.h>
#include <ATen/ops/full_like_ops.h>
#include <ATen/ops/full_ops.h>
#include <ATen/ops/new_empty_ops.h>
#include <ATen/ops/new_empty_strided_ops.h>
#include <ATen/ops/new_full_ops.h>
#include <ATen/ops/new_ones_ops.h>
#include <ATen/ops/new_zeros_ops.h>
#include <ATen/ops/ones_like_ops.h>
#include <ATen/ops/ones_ops.h>
#include <ATen/ops/scalar_tensor_ops.h>
#include <ATen/ops/zeros_like_ops.h>
#include <ATen/ops/zeros_ops.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/function.h>

#include <string>
#include <vector>

#include "core/keys.h"
#include "core/promotion.h"

// NOTE [factories]
// While a level is open, the operators that make tensors come here first, and what they return to a
// user's function becomes a tensor of the level (NOTE [promotion] in core/promotion.h). Others ask
// for tensors too, and would be given one that is not what they think: rules (rule_depth() tells),
// formulas of derivatives (the engine knows that one is at work), and kernels, on tensors that are
// none of ours. A kernel runs below autograd, which the dispatch state shows.
//
// It also shows that for torch::zeros() and its like, which call the operator below autograd as a
// kernel does. They were taken for users at first: but _trilinear, unfold_backward and repeat call
// at::zeros(), and a tensor of the level came out of an operator on plain ones, lost to the
// gradients outside. So what torch::zeros() makes in C++ stays plain (at::zeros() does not). The
// functions of Python are recognized by another way (bindings/_C/factory_functions.h).
//
// Not here are empty() and empty_like(): kernels and code of libtorch's own, such as at::tensor(),
// ask for memory all the time, to fill it through a pointer.

namespace torchlift {
namespace {

namespace ops = at::_ops;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::KernelFunction;
using c10::OperatorHandle;

bool asked_by_user() {
  const DispatchKeySet excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  return !excluded.has(DispatchKey::AutogradFunctionality) &&
         torch::autograd::get_current_node() == nullptr;
}

DispatchKeySet below_mode(DispatchKeySet keys) {
  return keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, kModeKey);
}

template <class Op, class Schema = typename Op::schema>
struct Maker;

template <class Op, class... A>
struct Maker<Op, at::Tensor(A...)> {
  static at::Tensor make(DispatchKeySet keys, A... args) {
    at::Tensor made = [&] {
      const RuleDepthScope within(1);  // What the operator itself makes is none of ours.
      return Op::redispatch(below_mode(keys), args...);
    }();
    return asked_by_user() ? made_inside(std::move(made)) : made;
  }
};

std::vector<c10::RegistrationHandleRAII>& handles() {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  return *all;
}

template <class... Op>
void install() {
  (handles().push_back(c10::Dispatcher::singleton().registerImpl(
       {Op::name, Op::overload_name}, kModeKey,
       KernelFunction::makeFromUnboxedFunction(TORCH_FN(Maker<Op>::make)),
       c10::impl::CppSignature::make<typename Op::schema>(), nullptr, "torchlift")),
   ...);
}

// linspace, hann_window, tril_indices...
void make_boxed(const OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
  {
    const RuleDepthScope within(1);
    op.redispatchBoxed(below_mode(keys), stack);
  }
  if (asked_by_user()) {
    stack->back() = made_inside(std::move(stack->back()).toTensor());
  }
}

bool starts_with(const std::string& name, const char* start) { return name.rfind(start, 0) == 0; }

// Whether op makes a tensor of given values from no other.
bool is_factory(const OperatorHandle& op) {
  const auto& schema = op.schema();
  const std::string& name = schema.name();
  // empty(): see above. The memory of from_file() is a file. The rest are for libtorch itself.
  if (!starts_with(name, "aten::") || starts_with(name, "aten::empty") ||
      starts_with(name, "aten::_") || name == "aten::from_file") {
    return false;
  }
  for (const auto& argument : schema.arguments()) {
    if (argument.type()->str().find("Tensor") != std::string::npos) return false;
  }
  return schema.returns().size() == 1 && schema.returns()[0].type()->str() == "Tensor" &&
         !op.hasTag(at::Tag::nondeterministic_seeded) &&
         !op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd);
}

}  // namespace

void install_factory_kernels() {
  install<ops::zeros, ops::ones, ops::full, ops::eye, ops::eye_m, ops::zeros_like, ops::ones_like,
          ops::full_like, ops::arange, ops::arange_start, ops::arange_start_step,
          ops::scalar_tensor, ops::empty_like, ops::clone, ops::new_zeros, ops::new_ones,
          ops::new_full, ops::new_empty, ops::new_empty_strided>();
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op.has_value() || !op->hasSchema() || !is_factory(*op)) continue;
    if (op->hasKernelForDispatchKey(kModeKey)) continue;
    handles().push_back(dispatcher.registerImpl(
        name, kModeKey, KernelFunction::makeFromBoxedFunction<&make_boxed>(), std::nullopt, nullptr,
        "torchlift"));
  }
}

}  // namespace torchlift
