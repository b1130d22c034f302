#ifndef TORCHLIFT_CORE_DERIVATIVE_CODE_H_
#define TORCHLIFT_CORE_DERIVATIVE_CODE_H_

// File: core/derivative_code.h
//
// What no_grad means under forward mode, whose kernels are in autodiff/forward_mode.h (NOTE [the
// forward key]). It is asked here, too, where core records tangents by itself.

#include <c10/core/AutogradState.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>

#include "core/keys.h"

namespace torchlift {

// libtorch's one dual level.
inline constexpr uint64_t kDual = 0;

// Only ever in the set of excluded keys, where it marks derivative code. It belongs to nested
// tensors under torch.func.vmap.
inline constexpr c10::DispatchKey kDerivativeMark = c10::DispatchKey::BatchedNestedTensor;

// Whether a ForwardScope is open around the code at work, on this thread or the one it works for.
inline bool forward_mode_open() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(kForwardKey);
}

// Whether that code is derivative code, whose GradMode says nothing about tangents.
inline bool in_derivative_code() {
  return c10::impl::tls_local_dispatch_key_set().excluded_.has(kDerivativeMark);
}

// Whether no_grad is on in a function under forward mode: what is computed now is a constant.
inline bool forward_mode_cut() {
  const c10::AutogradState& state = c10::AutogradState::get_tls_state();
  if (C10_LIKELY(state.get_grad_mode()) || !state.get_fw_grad_mode()) return false;
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  return tls.included_.has(kForwardKey) && !tls.excluded_.has(kDerivativeMark) &&
         !tls.excluded_.has(c10::DispatchKey::AutogradFunctionality);
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_DERIVATIVE_CODE_H_
