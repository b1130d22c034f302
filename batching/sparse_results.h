#ifndef TORCHLIFT_BATCHING_SPARSE_RESULTS_H_
#define TORCHLIFT_BATCHING_SPARSE_RESULTS_H_

// File: batching/sparse_results.h
//
// NOTE [sparse tensors under vmap]
// Rules work on strided values, so that what would be a sparse tensor that differs between the
// examples is computed dense (batching/rules/sparse.cc): its numbers are the same, and every
// operator has its rule. A mark on it tells vmap to return it as the sparse tensor that it stands
// for. What is computed from it has none, and is dense.
//
// NOTE [sparse tensors in a trace]
// What to_sparse gives at a recording level (core/recorder.h) is dense as well, and stands for a
// sparse tensor, by its memory: so do its detach() and x.data. But outside of vmap libtorch has
// kernels for sparse tensors, whose results may be sparse again, and formulas whose gradients reach
// the elements alone. So the trace refuses operators on it but to_dense, which is made of others
// here, with the gradient that libtorch gives it, and returns it as a COO tensor
// (compile/trace_sparse.h).

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

// `t`, of a recording level, is all that uses its memory, and stands for a COO tensor of its
// nonzero elements.
void mark_recorded_sparse(const at::Tensor& t, int64_t sparse_dims);

// How many of the dims are sparse ones; nothing where t stands for no such tensor.
std::optional<int64_t> recorded_sparse_dims(const at::Tensor& t);

// What vmap, and what a trace, is to return of t, a tensor of the level that ends.
std::optional<int64_t> sparse_dims_of_result(const at::Tensor& t);

// While it lives, operators on this thread may take tensors of a recording level that stand for
// sparse ones as the dense ones that they are.
class ReadsAsDense {
 public:
  ReadsAsDense() { ++depth(); }
  ~ReadsAsDense() { --depth(); }
  ReadsAsDense(const ReadsAsDense&) = delete;
  ReadsAsDense& operator=(const ReadsAsDense&) = delete;

  static bool open() { return depth() > 0; }

 private:
  static int64_t& depth();
};

// The COO tensor of these indices and values as a dense one, made of other operators.
at::Tensor dense_coo(int64_t sparse_dim, c10::SymIntArrayRef size, const at::Tensor& indices,
                     const at::Tensor& values, std::optional<at::ScalarType> dtype);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_SPARSE_RESULTS_H_
