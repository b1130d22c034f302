#ifndef TORCHLIFT_AUTODIFF_FORWARD_MODE_H_
#define TORCHLIFT_AUTODIFF_FORWARD_MODE_H_

// File: autodiff/forward_mode.h
//
// What torchlift adds to libtorch's forward mode, operator by operator, on the threads and for the
// time that a ForwardScope (autodiff/forward.h) is open.
//
// NOTE [the forward key]
// Plain tensors with a tangent never meet our front kernel, and forward mode has no switch that
// follows GradMode. So a ForwardScope includes one more key in the thread's dispatch state, and its
// kernels, which come before autograd, do three things:
//
//  - no_grad. An operator that the user's function calls with GradMode off gets arguments without
//    tangents. So no_grad means the same to forward mode as to reverse mode: what is computed under
//    it is a constant. (libtorch's detach drops the tangent by itself.) In derivative code, where
//    GradMode is off because nobody asked for another derivative, tangents go on: the backward pass
//    of a Pullback is marked as such.
//  - constants. Where only some arguments have a tangent, libtorch gives the others a ZeroTensor,
//    and multiplying with one costs it hundreds of microseconds where Python is loaded: the shape
//    is worked out by a reference written in Python. Linear operators of one argument with a
//    tangent are done without any zeros, and products and sums that still meet a ZeroTensor know
//    the answer.
//  - formulas. Operators for which libtorch has no formula, or a wrong one (layer_norm and
//    batch_norm take their saved statistics for constants), are made of others.
//
// Both marks, the key and derivative code (core/derivative_code.h), lie in the thread's dispatch
// state, which the autograd engine hands on to its threads.

#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "core/derivative_code.h"  // IWYU pragma: export

namespace torchlift {

// Held while the user's function runs. Installs the kernels when first used.
class ForwardModeScope {
 public:
  ForwardModeScope();

 private:
  c10::impl::ForceDispatchKeyGuard guard_;
};

// Held by derivative code.
class DerivativeScope {
 public:
  DerivativeScope() {
    if (C10_UNLIKELY(forward_mode_open())) guard_.emplace(kDerivativeMark);
  }

 private:
  std::optional<c10::impl::ExcludeDispatchKeyGuard> guard_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_FORWARD_MODE_H_
