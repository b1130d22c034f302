#ifndef TORCHLIFT_AUTODIFF_FORWARD_KERNELS_H_
#define TORCHLIFT_AUTODIFF_FORWARD_KERNELS_H_

// File: autodiff/forward_kernels.h
//
// The forward key's kernels for operators that are met often (no boxing on the way) or that know
// what to do with constants. See NOTE [the forward key] in autodiff/forward_mode.h.

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/CppSignature.h>

#include <optional>
#include <string>
#include <vector>

#include "autodiff/forward_mode.h"

namespace torchlift::forward_internal {

inline constexpr c10::DispatchKeySet kBelowForward =
    c10::DispatchKeySet(c10::DispatchKeySet::FULL_AFTER, kForwardKey);

struct ForwardKernel {
  std::string name;
  std::string overload;
  c10::KernelFunction kernel;
  std::optional<c10::impl::CppSignature> signature;
};

std::vector<ForwardKernel> forward_kernels();
// Those that libtorch has no formula for, or a wrong one; among the above. One file each.
std::vector<ForwardKernel> forward_formulas();
std::vector<ForwardKernel> attention_formulas();
std::vector<ForwardKernel> distance_formulas();
std::vector<ForwardKernel> embedding_formulas();
std::vector<ForwardKernel> linalg_formulas();
std::vector<ForwardKernel> loss_formulas();
std::vector<ForwardKernel> sampling_formulas();
std::vector<ForwardKernel> scatter_formulas();

// The kernel of all other operators.
c10::KernelFunction boxed_kernel();

}  // namespace torchlift::forward_internal

#endif  // TORCHLIFT_AUTODIFF_FORWARD_KERNELS_H_
