#ifndef TORCHLIFT_CORE_KEYS_H_
#define TORCHLIFT_CORE_KEYS_H_

// File: core/keys.h
//
// The dispatch keys torchlift lives on. Only core/ and the plumbing need them.

#include <c10/core/DispatchKeySet.h>

namespace torchlift {

// NOTE [front and back keys]
// A LiftedTensor carries two keys, so libtorch's dispatcher itself finds us, for user code,
// torch::nn modules and derivative formulas alike.
//  - front, above autograd. Decides: if an argument of the deepest level is tracked by autograd, go
//  on
//    to libtorch's autograd kernel, which records in that level's domain; else apply the rule.
//  - back, below autograd, as a backend: reached from that autograd kernel. Restores the
//  thread-local
//    dispatch state the front saved, then applies the same rule.
// DeferredInit is unused by libtorch itself (torchdistX uses it; core/runtime.cc checks that it is
// free) and sits above autograd and autocast. PrivateUse3 is a backend bit that no device claims.
inline constexpr c10::DispatchKey kFrontKey = c10::DispatchKey::DeferredInit;
inline constexpr c10::DispatchKey kBackKey = c10::DispatchKey::PrivateUse3;

// NOTE [marker key]
// Derivative formulas ask at::isTensorSubclassLike before they choose out-of-place code. Batched
// (of a vmap that libtorch had before functorch) is one of the keys it looks for; nothing else
// reads it. Its own backend fallback must never run, so the front masks it when it redispatches.
inline constexpr c10::DispatchKey kMarkerKey = c10::DispatchKey::Batched;

// NOTE [mode key]
// Random and data-creating operators need not have a lifted argument, so a level that gives them a
// meaning is found by a key in thread-local state (NOTE [random operators] in
// batching/rules/random_mode.cc, NOTE [factories] in core/factory.cc). For every operator but those
// it falls through, which the dispatcher's tables resolve at no cost. It lies below the key that
// substitutes the parameters of functional modules (nn_functional/substitution.cc), so that a rule
// for a random operator sees the value that takes a parameter's place.
inline constexpr c10::DispatchKey kModeKey = c10::DispatchKey::TESTING_ONLY_GenericWrapper;

// NOTE [forward key]
// Included in thread-local state while a function runs under forward mode; its kernels are
// autodiff's (autodiff/forward_mode.h). It comes right before autograd, below the front, so it
// meets plain tensors, and those of a level that are tracked. VmapMode belongs to a vmap that
// libtorch had before functorch; nothing includes it any more, and only random operators still have
// kernels for it, which refuse.
inline constexpr c10::DispatchKey kForwardKey = c10::DispatchKey::VmapMode;

// The keys that an argument may have on the autograd path without being hidden: see
// NOTE [hidden arguments] in core/dispatch.h.
inline constexpr c10::DispatchKeySet kPlainKeys =
    c10::DispatchKeySet({c10::DispatchKey::Dense, c10::DispatchKey::AutogradFunctionality,
                         c10::DispatchKey::AutogradOther, c10::DispatchKey::ADInplaceOrView,
                         kFrontKey, kMarkerKey, kForwardKey}) |
    c10::autocast_dispatch_keyset |
    c10::DispatchKeySet({c10::BackendComponent::CPUBit, c10::BackendComponent::CUDABit,
                         c10::BackendComponent::PrivateUse3Bit});

// What the front passes on: forward mode, autocast, autograd and our back key. Keys that belong to
// the values (conj, sparse, a Python dispatch mode...) take their turn when the rule calls
// operators on those.
inline constexpr c10::DispatchKeySet kRecordKeys =
    (c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kFrontKey) & kPlainKeys) -
    c10::DispatchKeySet(kMarkerKey);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_KEYS_H_
