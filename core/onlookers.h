#ifndef TORCHLIFT_CORE_ONLOOKERS_H_
#define TORCHLIFT_CORE_ONLOOKERS_H_

// File: core/onlookers.h
//
// Whether an operator on plain tensors may be computed without being called: whether nobody but
// libtorch's kernels would see it.

#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "core/dispatch.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"

namespace torchlift {

// Whether no code of others takes part in this thread's operators: a dispatch mode of Python's, a
// transform of torch.func, a tracer, what stands in for parameters or state
// (nn_functional/substitution.h). Levels of ours may be open, which look at their own tensors.
inline bool has_no_modes() {
  constexpr c10::DispatchKeySet kUsual = c10::default_included_set | c10::autocast_dispatch_keyset |
                                         kPlainKeys | c10::DispatchKeySet(kModeKey);
  return !c10::impl::dispatch_mode_enabled() &&
         kUsual.has_all(c10::impl::tls_local_dispatch_key_set().included_);
}

// Whether a profiler, or whoever else asks libtorch to be told, counts this thread's operators.
inline bool is_profiled() { return at::hasCallbacks(); }

// Whether t is a tensor of libtorch's own kind, which no level and no autograd follows.
// Its numbers are those in its memory: it is neither sparse nor a view that conjugates or negates.
inline bool is_unfollowed(const at::Tensor& t) {
  return kPlainKeys.has_all(t.key_set()) && !is_lifted(t) && !is_tracked(t);
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_ONLOOKERS_H_
