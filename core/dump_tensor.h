#ifndef TORCHLIFT_CORE_DUMP_TENSOR_H_
#define TORCHLIFT_CORE_DUMP_TENSOR_H_

// File: core/dump_tensor.h
//
// What a tensor is made of, as text: one line for each level it belongs to, from the deepest to the
// plain value, with dims, dispatch keys and autograd state. For people, while they debug.
//
//   vmap level 2 (size 3): shape [5], batch dim 0, Float cpu; leaf, requires grad; keys ...
//     vmap level 1 (size 8): shape [3, 5], batch dim none, Float cpu; no autograd; keys ...
//       plain tensor: shape [3, 5], strides [5, 1], Float cpu; grad_fn SinBackward0; keys ...
//
// Works on tensors of any kind, and on those whose level has ended, which it says.

#include <ATen/core/Tensor.h>

#include <string>

namespace torchlift {

std::string dump_tensor(const at::Tensor& t);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_DUMP_TENSOR_H_
