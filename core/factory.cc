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

#include <string>
#include <vector>

#include "core/keys.h"
#include "core/promotion.h"

// NOTE [factories]
// While a level is open, the operators that make tensors come here first, and what they return to a
// user's function becomes a tensor of the level (NOTE [promotion] in core/promotion.h). Others ask
// for tensors too, and would be given one that is not what they think: rules (rule_depth() tells),
// and kernels, on tensors that are none of ours. A kernel runs below autograd, which the dispatch
// state shows. But so do torch::zeros() and its like, which torch.zeros in Python is: they call the
// operator with both autograd and ADInplaceOrView excluded, as a kernel finds the state only if the
// operator writes in place or returns a view. Such kernels on plain tensors in a level hardly ever
// make a tensor of given values; one that does gets a tensor of the level, whose data is where it
// says in one level, and in several levels not to be had: an error, and never a wrong number.
//
// Not so empty() and empty_like(): kernels do ask for memory all the time, and so does code of
// libtorch's own, such as at::tensor(), to fill it through a pointer. torch.empty and torch.tensor
// of Python are recognized by another way (bindings/_C/factory_functions.h).

namespace torchlift {
namespace {

namespace ops = at::_ops;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::KernelFunction;
using c10::OperatorHandle;

// Who may be asking, where autograd is excluded: a function such as torch::zeros, or only kernels.
enum class Caller { kUserOrFunction, kUser };

bool asked_by_user(Caller caller) {
  const DispatchKeySet excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  if (excluded.has(kFrontKey)) return false;  // torch.tensor(), about to fill it through a pointer
  if (!excluded.has(DispatchKey::AutogradFunctionality)) return true;
  return caller == Caller::kUserOrFunction && excluded.has(DispatchKey::ADInplaceOrView);
}

DispatchKeySet below_mode(DispatchKeySet keys) {
  return keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, kModeKey);
}

template <class Op, Caller kCaller, class Schema = typename Op::schema>
struct Maker;

template <class Op, Caller kCaller, class... A>
struct Maker<Op, kCaller, at::Tensor(A...)> {
  static at::Tensor make(DispatchKeySet keys, A... args) {
    at::Tensor made = [&] {
      const RuleDepthScope within(1);  // What the operator itself makes is none of ours.
      return Op::redispatch(below_mode(keys), args...);
    }();
    return asked_by_user(kCaller) ? made_inside(std::move(made)) : made;
  }
};

std::vector<c10::RegistrationHandleRAII>& handles() {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  return *all;
}

template <Caller kCaller, class... Op>
void install() {
  (handles().push_back(c10::Dispatcher::singleton().registerImpl(
       {Op::name, Op::overload_name}, kModeKey,
       KernelFunction::makeFromUnboxedFunction(TORCH_FN((Maker<Op, kCaller>::make))),
       c10::impl::CppSignature::make<typename Op::schema>(), nullptr, "torchlift")),
   ...);
}

// linspace, hann_window, tril_indices...
void make_boxed(const OperatorHandle& op, DispatchKeySet keys, torch::jit::Stack* stack) {
  {
    const RuleDepthScope within(1);
    op.redispatchBoxed(below_mode(keys), stack);
  }
  if (asked_by_user(Caller::kUserOrFunction)) {
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
  install<Caller::kUserOrFunction, ops::zeros, ops::ones, ops::full, ops::eye, ops::eye_m,
          ops::zeros_like, ops::ones_like, ops::full_like, ops::arange, ops::arange_start,
          ops::arange_start_step, ops::scalar_tensor>();
  install<Caller::kUser, ops::empty_like, ops::clone, ops::new_zeros, ops::new_ones, ops::new_full,
          ops::new_empty, ops::new_empty_strided>();
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
