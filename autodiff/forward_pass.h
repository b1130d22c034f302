#ifndef TORCHLIFT_AUTODIFF_FORWARD_PASS_H_
#define TORCHLIFT_AUTODIFF_FORWARD_PASS_H_

// File: autodiff/forward_pass.h
//
// Makers of the forward key's kernels (autodiff/forward_kernels.h).

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/CompileTimeFunctionPointer.h>

#include <cstddef>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "autodiff/forward_kernels.h"

namespace torchlift::forward_internal {

// Half precision is computed in float, as kernels do inside: differences and exponents of rounded
// numbers are off by as much as they are.
inline at::Tensor precise(const at::Tensor& t) { return t.to(at::toOpMathType(t.scalar_type())); }

// Whether autograd still has its turn; below it, in the kernel of another operator, tangents are
// none of our business.
inline bool above_autograd() {
  return !c10::impl::tls_local_dispatch_key_set().excluded_.has(
      c10::DispatchKey::AutogradFunctionality);
}

// The kernel of an operator that has nothing special to do.
template <class Op, class Schema = typename Op::schema>
struct Pass;

template <class Op, class R, class... A>
struct Pass<Op, R(A...)> {
  static R call(c10::DispatchKeySet keys, A... args) {
    if (C10_LIKELY(!forward_mode_cut())) return Op::redispatch(keys & kBelowForward, args...);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    static const c10::KernelFunction boxed = boxed_kernel();
    return boxed.template call<R, A...>(op, keys, args...);
  }
};

// Whether an argument is a tensor with a tangent in its own domain.
template <class T>
bool has_tangent(const T& arg) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    return arg.unsafeGetTensorImpl()->autograd_meta() != nullptr &&
           arg._fw_grad(/*level=*/0).defined();
  } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
    return arg.has_value() && arg->defined() && has_tangent(*arg);
  } else {
    return false;
  }
}

// Whether an argument, or its tangent, is tracked in reverse mode.
template <class T>
bool is_recorded(const T& arg) {
  if constexpr (std::is_same_v<T, at::Tensor>) {
    return arg.requires_grad() || arg._fw_grad(/*level=*/0).requires_grad();
  } else if constexpr (std::is_same_v<T, std::optional<at::Tensor>>) {
    return arg.has_value() && arg->defined() && is_recorded(*arg);
  } else {
    return false;
  }
}

// NOTE [formulas that write in place]
// Some formulas of forward mode write into an intermediate in place, which reverse mode has saved
// if somebody outside differentiates the result. (They do not for tensors that look like a
// subclass, as lifted ones.)
enum class MadeWhen { kDual, kDualAndRecorded };

// The kernel of an operator that is Function where an argument has a tangent.
template <class Op, auto Function, MadeWhen kWhen = MadeWhen::kDual,
          class Schema = typename Op::schema>
struct Made;

template <class Op, auto Function, MadeWhen kWhen, class R, class... A>
struct Made<Op, Function, kWhen, R(A...)> {
  static R call(c10::DispatchKeySet keys, A... args) {
    if ((has_tangent(args) || ...) && above_autograd() && !forward_mode_cut() &&
        (kWhen == MadeWhen::kDual || (c10::GradMode::is_enabled() && (is_recorded(args) || ...)))) {
      return Function(args...);
    }
    return Pass<Op>::call(keys, args...);
  }
};

template <class Op, auto Kernel>
ForwardKernel row() {
  return {Op::name, Op::overload_name,
          c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(Kernel)),
          c10::impl::CppSignature::make<typename Op::schema>()};
}

template <class Op, auto Function, MadeWhen kWhen = MadeWhen::kDual>
ForwardKernel made() {
  return row<Op, &Made<Op, Function, kWhen>::call>();
}

// Gives a result, or each of several, a tangent.
inline void set_tangents(at::Tensor& result, const at::Tensor& tangent) {
  if (!result.defined() || !tangent.defined()) return;
  result._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

template <class... R>
void set_tangents(std::tuple<R...>& results, const std::tuple<R...>& tangents) {
  [&]<size_t... I>(std::index_sequence<I...>) {
    (set_tangents(std::get<I>(results), std::get<I>(tangents)), ...);
  }
  (std::index_sequence_for<R...>());
}

// What an operator's result depends on, besides being linear in the first argument: by the values
// of the others (whose tangents are left to libtorch's formula, if it has one), or by that argument
// alone.
enum class Others { kMatter, kConstant };

template <class Op, Others kOthers, class Schema = typename Op::schema>
struct LinearInFirst;

template <class Op, Others kOthers, class R, class... A>
struct LinearInFirst<Op, kOthers, R(const at::Tensor&, A...)> {
  static R call(c10::DispatchKeySet keys, const at::Tensor& first, A... rest) {
    const bool others = (has_tangent(rest) || ...);
    const bool mine =
        kOthers == Others::kMatter ? has_tangent(first) && !others : has_tangent(first) || others;
    if (!mine || !above_autograd() || forward_mode_cut()) {
      return Pass<Op>::call(keys, first, rest...);
    }
    const at::Tensor tangent = first._fw_grad(/*level=*/0);
    R result = Op::call(stripped(first), stripped(rest)...);
    if (tangent.defined()) set_tangents(result, Op::call(tangent, stripped(rest)...));
    return result;
  }

 private:
  template <class T>
  static decltype(auto) stripped(const T& arg) {
    if constexpr (std::is_same_v<T, at::Tensor>) {
      return has_tangent(arg) ? arg._fw_primal(/*level=*/0) : arg;
    } else {
      return (arg);
    }
  }
};

template <class Op, Others kOthers = Others::kMatter>
ForwardKernel linear_in_first() {
  return row<Op, &LinearInFirst<Op, kOthers>::call>();
}

}  // namespace torchlift::forward_internal

#endif  // TORCHLIFT_AUTODIFF_FORWARD_PASS_H_
