#ifndef TORCHLIFT_BATCHING_RULES_NARROW_KERNEL_H_
#define TORCHLIFT_BATCHING_RULES_NARROW_KERNEL_H_

// File: batching/rules/narrow_kernel.h
//
// Products of matrices of floats with few columns, for narrow_products.cc alone.
//
// NOTE [narrow kernel]
// A vector holds one column of 16 rows of the result, so that none of it is thrown away. Its terms
// are a column of 16 rows of the left operand, which are read along the rows, 4 by 4, and
// transposed in registers: that takes the ports of the processor which multiplications leave free.
// For [256, 128] times [128, 10] it takes 0.7 of the time of MKL's kernel for the transposes with
// the copy after it (NOTE [narrow results]).

#include <ATen/core/Tensor.h>

#include <optional>

namespace torchlift {

// a b + row: [M, K] times [K, N], or [B, M, K] times [B, K, N]; `row`, undefined or one that
// broadcasts to the result, is the same for all M. The result is contiguous.
//
// Nothing where it does not serve: on processors without AVX-512, for other dtypes than float, an N
// that is not in [3, 15], an M below 16, a left operand whose rows do not lie in memory as such,
// and where somebody looks on (core/onlookers.h).
std::optional<at::Tensor> narrow_product(const at::Tensor& a, const at::Tensor& b,
                                         const at::Tensor& row = {});

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_NARROW_KERNEL_H_
