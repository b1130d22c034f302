#ifndef TORCHLIFT_BATCHING_RULES_MATMUL_H_
#define TORCHLIFT_BATCHING_RULES_MATMUL_H_

// File: batching/rules/matmul.h
//
// Matrix products of examples, for the rules of mm, bmm, addmm and the like. Each checks the shapes
// and dtypes that the user sees and throws as libtorch does; each runs one kernel.

#include <ATen/core/Tensor.h>

#include "batching/rules/dims.h"

namespace torchlift {

// [M, K] times [K, N].
Batched mm_product(const BatchedArg& a, const BatchedArg& b);

// [N, M, K] times [N, K, P].
Batched bmm_product(const BatchedArg& a, const BatchedArg& b);

// [M, K] times [K].
Batched mv_product(const BatchedArg& a, const BatchedArg& v);

// Throw unless the user may multiply the two.
void check_mm(const BatchedArg& a, const BatchedArg& b, const char* op);
void check_bmm(const BatchedArg& a, const BatchedArg& b, const char* op);
void check_mv(const BatchedArg& a, const BatchedArg& v, const char* op);

// Whether one of them is a sparse matrix. The products above take one that all examples share.
bool has_sparse(const BatchedArg& a, const BatchedArg& b);

// From how many columns of an example on a bmm is as fast as one mm of the columns of all examples.
// Measured.
inline constexpr int64_t kWideEnough = 16;

// Whether two neighbouring dims of a strided value are one dim in memory, `slow` outside `fast`.
bool can_merge(const at::Tensor& value, int64_t slow, int64_t fast);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_MATMUL_H_
