#ifndef TORCHLIFT_AUTODIFF_REVERSE_KERNELS_H_
#define TORCHLIFT_AUTODIFF_REVERSE_KERNELS_H_

// File: autodiff/reverse_kernels.h
//
// For the files with formulas of reverse mode (autodiff/reverse_formulas.h): kernels in the place
// of autograd's.
//
//   Tensor cholesky_inverse(c10::DispatchKeySet keys, const Tensor& self, bool upper) {
//     using Autograd = Original<at::_ops::cholesky_inverse>;
//     if (!is_recorded(self)) return Autograd::call(keys, self, upper);
//     ...
//   }
//   replace_autograd<at::_ops::cholesky_inverse, &cholesky_inverse>();

#include <ATen/core/Tensor.h>
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/CppSignature.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/core/stack.h>
#include <c10/core/CompileTimeFunctionPointer.h>
#include <c10/core/DispatchKeySet.h>

#include <memory>
#include <utility>

#include "autodiff/reverse_formulas.h"
#include "core/keys.h"

namespace torchlift::reverse_internal {

// Whether a function that is differentiated is at work on this thread, and t a part of its graph.
inline bool is_recorded(const at::Tensor& t) {
  return reverse_formulas_open() && c10::GradMode::is_enabled() && t.requires_grad();
}

// Another tensor of the same value, which may have a node of its own.
at::Tensor alias_of(const at::Tensor& t);

// Autograd's kernel of an operator, once ours has taken its place.
template <class Op>
struct Original {
  static inline c10::KernelFunction kernel;

  template <class... A>
  static decltype(auto) call(c10::DispatchKeySet keys, A&&... args) {
    return call_as(static_cast<typename Op::schema*>(nullptr), keys, std::forward<A>(args)...);
  }

 private:
  template <class R, class... Parameters, class... A>
  static R call_as(R (* /*schema*/)(Parameters...), c10::DispatchKeySet keys, A&&... args) {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    return kernel.call<R, Parameters...>(op, keys, std::forward<A>(args)...);
  }
};

// Before torch 2.15 the dispatcher hands out a kernel that can only be called boxed.
template <class Found>
class BoxedKernel final : public c10::OperatorKernel {
 public:
  explicit BoxedKernel(Found found) : found_(std::move(found)) {}
  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                  torch::jit::Stack* stack) {
    found_.callBoxed(op, keys, stack);
  }

 private:
  const Found found_;
};

template <class Found>
c10::KernelFunction kernel_of(Found found) {
  if constexpr (requires { found.kernelFunction(); }) {
    return found.kernelFunction();
  } else {
    return c10::KernelFunction::makeFromBoxedFunctor(
        std::make_unique<BoxedKernel<Found>>(std::move(found)));
  }
}

// Keeps a registration for as long as the process lives: libtorch's tables are torn down after us
// at exit.
void keep(c10::RegistrationHandleRAII handle);

// libtorch registers its kernels for all of autograd, ours come before those for single backends.
template <class Op, auto Kernel>
void replace_autograd() {
  using c10::DispatchKey;
  auto& dispatcher = c10::Dispatcher::singleton();
  const auto op = dispatcher.findSchemaOrThrow(Op::name, Op::overload_name);
  Original<Op>::kernel = kernel_of(op.getComputedKernelForDispatchKey(DispatchKey::AutogradCPU));
  for (const DispatchKey key :
       {DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA, DispatchKey::AutogradPrivateUse3}) {
    keep(dispatcher.registerImpl(op.operator_name(), key,
                                 c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(Kernel)),
                                 c10::impl::CppSignature::make<typename Op::schema>(),
                                 /*inferred_function_schema=*/nullptr, "torchlift"));
  }
}

// Of scatter_reduce and index_reduce (autodiff/reverse_products.cc).
void install_products();

}  // namespace torchlift::reverse_internal

#endif  // TORCHLIFT_AUTODIFF_REVERSE_KERNELS_H_
