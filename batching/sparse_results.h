#ifndef TORCHLIFT_BATCHING_SPARSE_RESULTS_H_
#define TORCHLIFT_BATCHING_SPARSE_RESULTS_H_

// File: batching/sparse_results.h
//
// NOTE [sparse tensors under vmap]
// Rules work on strided values, so that what would be a sparse tensor that differs between the
// examples is computed dense (batching/rules/sparse.cc): its numbers are the same, and every
// operator has its rule. A mark on it tells vmap to return it as the sparse tensor that it stands
// for. What is computed from it has none, and is dense.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace torchlift {

// `t`, a lifted tensor, stands for a COO tensor whose first dims are sparse ones.
void mark_sparse(const at::Tensor& t, int64_t sparse_dims);

bool is_marked_sparse(const at::Tensor& t);

// `batch`, which vmap is about to return for `t`, with the examples in `dim`: as a COO tensor if t
// is marked.
at::Tensor as_marked(at::Tensor batch, const at::Tensor& t, int64_t dim);

// The COO tensor of these indices and values as a dense one, made of other operators.
at::Tensor dense_coo(int64_t sparse_dim, c10::SymIntArrayRef size, const at::Tensor& indices,
                     const at::Tensor& values, std::optional<at::ScalarType> dtype);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_SPARSE_RESULTS_H_
