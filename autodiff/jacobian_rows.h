#ifndef TORCHLIFT_AUTODIFF_JACOBIAN_ROWS_H_
#define TORCHLIFT_AUTODIFF_JACOBIAN_ROWS_H_

// File: autodiff/jacobian_rows.h
//
// The rows and columns of Jacobians: lists of tensors laid end to end, a chunk at a time.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "core/lifted_tensor.h"

namespace torchlift {

// The sizes of a, then those of b.
std::vector<int64_t> joined(at::IntArrayRef a, at::IntArrayRef b);

// How many numbers the first `count` tensors hold.
int64_t total_numel(const std::vector<at::Tensor>& tensors, size_t count);

// The device of the inputs of one function; CPU if there are none.
c10::Device device_of(const std::vector<at::Tensor>& inputs);

// Rows [start, start + count) of the identity of all tensors laid end to end, in the columns that
// belong to one of them: [count, ...its shape]. `offset`: how many numbers come before it.
// Undefined where they are all zero.
at::Tensor basis_rows(const at::Tensor& like, int64_t offset, int64_t start, int64_t count);

// ... of each of them.
std::vector<at::Tensor> basis_rows_of(const std::vector<at::Tensor>& tensors, int64_t start,
                                      int64_t count);

// A lowered value with its batch dim, of `size`, in front; repeated if it has none.
at::Tensor rows_of(const Lowered& lowered, int64_t size);

// Puts the chunks of one list of rows together: [total, ...]. What nobody records is written into
// a tensor that is allocated once.
class RowJoiner {
 public:
  explicit RowJoiner(int64_t total) : total_(total) {}

  void add(int64_t start, at::Tensor rows);
  at::Tensor join();

 private:
  int64_t total_;
  at::Tensor whole_;
  std::vector<at::Tensor> pieces_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_JACOBIAN_ROWS_H_
