#ifndef TORCHLIFT_AUTODIFF_COTANGENTS_H_
#define TORCHLIFT_AUTODIFF_COTANGENTS_H_

// File: autodiff/cotangents.h
//
// What the backward passes of torchlift share: cotangents as a graph needs them. Not for users.

#include <ATen/core/Tensor.h>

namespace torchlift {

// The cotangent of `output` with a batch dim in every level in which the output has one: a view of
// what the examples share. See NOTE [in-place writes into views] in autodiff/reverse.cc.
at::Tensor batched_like(const at::Tensor& cotangent, const at::Tensor& output);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_COTANGENTS_H_
