#ifndef TORCHLIFT_BATCHING_RULES_NARROW_PRODUCTS_H_
#define TORCHLIFT_BATCHING_RULES_NARROW_PRODUCTS_H_

// File: batching/rules/narrow_products.h
//
// Products of matrices, the quicker way round.
//
// NOTE [narrow results]
// A kernel for products of matrices computes vectors of a row of the result. Where rows are shorter
// than a vector (the 10 logits of a classifier), much of each is thrown away, and MKL, which
// libtorch calls, has no good kernel for it on processors other than Intel's: measured on AMD's
// with AVX-512, [256, 128] times [128, 10] takes 2.2 times as long as [10, 128] times [128, 256],
// and up to 50 times where the left operand is a transposed view. So there the transposes are
// multiplied, and the result is copied into the usual layout, which costs 1/K of the product; or,
// where it serves, a kernel of our own computes columns (narrow_kernel.h). Batches of products with
// one column each are the worst of them (64 of [64, 64] times [64, 1] take 7 times as long as
// turned), and what they are turned into needs no copy.

#include <ATen/core/Tensor.h>
#include <c10/core/Scalar.h>

namespace torchlift {

// [M, K] times [K, N], or [B, M, K] times [B, K, N]: at::mm or at::bmm.
at::Tensor product(const at::Tensor& a, const at::Tensor& b);

// beta * self + alpha * product(a, b); self broadcasts to the result: at::addmm or at::baddbmm.
at::Tensor product_added_to(const at::Tensor& self, const at::Tensor& a, const at::Tensor& b,
                            const at::Scalar& beta, const at::Scalar& alpha);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_NARROW_PRODUCTS_H_
