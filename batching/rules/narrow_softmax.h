#ifndef TORCHLIFT_BATCHING_RULES_NARROW_SOFTMAX_H_
#define TORCHLIFT_BATCHING_RULES_NARROW_SOFTMAX_H_

// File: batching/rules/narrow_softmax.h
//
// NOTE [softmax over few numbers]
// libtorch's kernel for a softmax along the last dim takes vectors out of a row. Where a row is
// shorter than a vector (the 10 logits of a classifier), that costs ten times what the kernel for
// other dims takes, whose vectors go across the rows. So such rows are laid out as columns, 256 of
// them at a time, and the result is laid out as rows again. It has the same bits.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace torchlift {

// at::_softmax, at::_log_softmax. x: any shape.
at::Tensor softmax_along(const at::Tensor& x, int64_t dim, bool half_to_float);
at::Tensor log_softmax_along(const at::Tensor& x, int64_t dim, bool half_to_float);

// at::_softmax_backward_data, at::_log_softmax_backward_data. grad and output have the same shape.
at::Tensor softmax_backward_along(const at::Tensor& grad, const at::Tensor& output, int64_t dim,
                                  at::ScalarType input_dtype);
at::Tensor log_softmax_backward_along(const at::Tensor& grad, const at::Tensor& output, int64_t dim,
                                      at::ScalarType input_dtype);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_NARROW_SOFTMAX_H_
