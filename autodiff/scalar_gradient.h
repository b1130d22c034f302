#ifndef TORCHLIFT_AUTODIFF_SCALAR_GRADIENT_H_
#define TORCHLIFT_AUTODIFF_SCALAR_GRADIENT_H_

// File: autodiff/scalar_gradient.h
//
// The gradient of a function of flat lists of tensors that returns one number, as such a function.

#include <ATen/core/Tensor.h>

#include <vector>

#include "autodiff/jacobian_blocks.h"

namespace torchlift {

// The gradients of f's one value by the inputs; `out` gets what f returned, as the caller of this
// differentiation may see it. Throws TransformError, in the name of `transform`, if f returns
// anything else.
std::vector<at::Tensor> scalar_gradient(const char* transform, LeafFunction f,
                                        const std::vector<at::Tensor>& inputs, LeafOutputs& out);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SCALAR_GRADIENT_H_
