#ifndef TORCHLIFT_AUTODIFF_HESSIAN_BLOCKS_H_
#define TORCHLIFT_AUTODIFF_HESSIAN_BLOCKS_H_

// File: autodiff/hessian_blocks.h
//
// Hessians of functions of flat lists of tensors: below the typed API (autodiff/jacobian.h) and the
// Python one.
//
// NOTE [how a Hessian is computed]
// Forward over reverse mode costs about three times (1 + n) runs of f for n input numbers, in many
// operators: those of f, those of its backward pass, and what forward mode makes of both. For a few
// numbers, Taylor mode has to carry 1 + n + n^2 values through f (autodiff/jet_scope.h), which is
// no more, in a fifth of the operators. So it is taken for up to kFewNumbers, unless that f calls
// what has no Taylor series, or the caller asks for chunks or for a convention of complex numbers.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "autodiff/jacobian_blocks.h"

namespace torchlift {

inline constexpr int64_t kFewNumbers = 3;

// blocks[i * inputs + j][k]: the derivative of value i by inputs j and k, [...value, ...input j,
// ...input k]. By Taylor mode where takes_taylor_mode says so; then f is called a second time if it
// calls what has no series.
JacobianBlocks hessian_blocks(LeafFunction f, const std::vector<at::Tensor>& inputs,
                              const ChunkOptions& chunks, ComplexNumbers numbers);

// Its parts.
bool takes_taylor_mode(const std::vector<at::Tensor>& inputs, const ChunkOptions& chunks,
                       ComplexNumbers numbers);
// Throws UnsupportedError where f calls what has no Taylor series.
JacobianBlocks taylor_hessian(LeafFunction f, const std::vector<at::Tensor>& inputs);
JacobianBlocks forward_over_reverse(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                    const ChunkOptions& chunks, ComplexNumbers numbers);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_HESSIAN_BLOCKS_H_
