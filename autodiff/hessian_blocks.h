#ifndef TORCHLIFT_AUTODIFF_HESSIAN_BLOCKS_H_
#define TORCHLIFT_AUTODIFF_HESSIAN_BLOCKS_H_

// File: autodiff/hessian_blocks.h
//
// Hessians of functions of flat lists of tensors: below the typed API (autodiff/jacobian.h) and the
// Python one.
//
// NOTE [how a Hessian is computed]
// Forward over reverse mode carries 1 + n values through f, for n input numbers, and through its
// backward pass, which is about 3 (1 + n) times the work of f, in many operators: those of f, those
// of the backward pass, and what forward mode makes of both. Taylor mode carries 1 + n + n^2 values
// through f alone (autodiff/jet_scope.h): for n = 2 that is less work, in a fifth of the operators;
// for n = 3 already a little more where tensors are large. So it is taken for up to kFewNumbers,
// unless f calls what has no Taylor series, or the caller asks for chunks or for a convention of
// complex numbers.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "autodiff/jacobian_blocks.h"

namespace torchlift {

inline constexpr int64_t kFewNumbers = 2;

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
