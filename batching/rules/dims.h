#ifndef TORCHLIFT_BATCHING_RULES_DIMS_H_
#define TORCHLIFT_BATCHING_RULES_DIMS_H_

// File: batching/rules/dims.h
//
// The vocabulary of batching rules: where the batch dim of a value is, and how to move it. A dim
// the user names is *logical*; a dim of the value is *physical*. All of these are views where views
// can do it.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

#include "core/plumbing.h"

namespace torchlift {

// dim in [-rank, rank) as [0, rank). As in libtorch, a 0-d tensor counts as 1-d here. Throws
// IndexError.
int64_t wrap_dim(int64_t dim, int64_t rank);

// The physical dim of a logical one.
int64_t physical_dim(const BatchedArg& arg, int64_t logical);

// arg's value with its batch dim first; as it is when it has none or the batch dim is first
// already.
at::Tensor batch_first(const BatchedArg& arg);

// batch_first, then with 1-sized dims between the batch dim and the rest up to `rank` logical dims.
// A value without a batch dim is left alone: broadcasting aligns it from the right.
//   [8, 3] for rank 2 -> [8, 1, 3]
at::Tensor aligned(const BatchedArg& arg, int64_t rank);

// batch_first; a value without a batch dim is expanded (a stride-0 view) to have one of `size`.
at::Tensor expanded(const BatchedArg& arg, int64_t size);

// The sizes as the user sees them.
c10::SmallVector<int64_t, 6> logical_sizes(const BatchedArg& arg);

// Merges dim `from` into dim `into` (a dim of what is left after taking `from` out), as its slower
// part:
//   merge_dim([B, 5, 7], from 0, into 0) -> [B*5, 7]
// split_dim undoes it: split_dim([B*5, 7], dim 0, B) -> [B, 5, 7].
at::Tensor merge_dim(const at::Tensor& value, int64_t from, int64_t into);
at::Tensor split_dim(const at::Tensor& value, int64_t dim, int64_t outer_size);

// Value and batch dim as a rule's argument.
inline BatchedArg as_arg(const Batched& b) { return {b.value, b.bdim}; }

// The size of the batch dim among args (at least one of them has one).
int64_t batch_size_of(std::initializer_list<const BatchedArg*> args);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_DIMS_H_
