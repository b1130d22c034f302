// What derivative formulas make of views: a gradient put back into zeros of the base's shape
// (*_backward), and a base with a part replaced (*_scatter).

#include <ATen/core/Tensor.h>
#include <ATen/ops/diagonal_backward.h>
#include <ATen/ops/diagonal_backward_ops.h>
#include <ATen/ops/diagonal_scatter.h>
#include <ATen/ops/diagonal_scatter_ops.h>
#include <ATen/ops/select_backward.h>
#include <ATen/ops/select_backward_ops.h>
#include <ATen/ops/select_scatter.h>
#include <ATen/ops/select_scatter_ops.h>
#include <ATen/ops/slice_backward.h>
#include <ATen/ops/slice_backward_ops.h>
#include <ATen/ops/slice_scatter.h>
#include <ATen/ops/slice_scatter_ops.h>
#include <ATen/ops/unfold_backward.h>
#include <ATen/ops/unfold_backward_ops.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// The base's shape with the batch in front, where batch_first(grad) has it.
c10::SmallVector<int64_t, 6> base_sizes(BatchedArg grad, at::IntArrayRef sizes) {
  c10::SmallVector<int64_t, 6> all{grad.value.size(*grad.bdim)};
  all.append(sizes.begin(), sizes.end());
  return all;
}

// A dim of an example is the next one of [B, example].
int64_t behind_batch(int64_t dim, size_t rank) {
  return wrap_dim(dim, static_cast<int64_t>(rank)) + 1;
}

Batched select_backward_rule(BatchedArg grad, at::IntArrayRef sizes, int64_t dim, int64_t index) {
  return {at::select_backward(batch_first(grad), base_sizes(grad, sizes),
                              behind_batch(dim, sizes.size()), index),
          0};
}

Batched slice_backward_rule(BatchedArg grad, at::IntArrayRef sizes, int64_t dim, int64_t start,
                            int64_t end, int64_t step) {
  return {at::slice_backward(batch_first(grad), base_sizes(grad, sizes),
                             behind_batch(dim, sizes.size()), start, end, step),
          0};
}

Batched diagonal_backward_rule(BatchedArg grad, at::IntArrayRef sizes, int64_t offset, int64_t dim1,
                               int64_t dim2) {
  return {at::diagonal_backward(batch_first(grad), base_sizes(grad, sizes), offset,
                                behind_batch(dim1, sizes.size()), behind_batch(dim2, sizes.size())),
          0};
}

Batched unfold_backward_rule(BatchedArg grad, at::IntArrayRef sizes, int64_t dim, int64_t size,
                             int64_t step) {
  // The windows of a 0-d example: [B, size], size 0 or 1.
  if (sizes.empty()) return {batch_first(grad).sum(1), 0};
  return {at::unfold_backward(batch_first(grad), base_sizes(grad, sizes),
                              behind_batch(dim, sizes.size()), size, step),
          0};
}

void check_dims(BatchedArg self, const char* name) {
  TORCH_CHECK(self.logical_dim() > 0, name, "() cannot be applied to a 0-dim tensor.");
}

size_t rank_of(BatchedArg self) { return static_cast<size_t>(self.logical_dim()); }

Batched select_scatter_rule(const Level& level, BatchedArg self, BatchedArg src, int64_t dim,
                            int64_t index) {
  check_dims(self, "select_scatter");
  return {at::select_scatter(expanded(self, level.size()), expanded(src, level.size()),
                             behind_batch(dim, rank_of(self)), index),
          0};
}

Batched slice_scatter_rule(const Level& level, BatchedArg self, BatchedArg src, int64_t dim,
                           std::optional<int64_t> start, std::optional<int64_t> end, int64_t step) {
  check_dims(self, "slice_scatter");
  return {at::slice_scatter(expanded(self, level.size()), expanded(src, level.size()),
                            behind_batch(dim, rank_of(self)), start, end, step),
          0};
}

Batched diagonal_scatter_rule(const Level& level, BatchedArg self, BatchedArg src, int64_t offset,
                              int64_t dim1, int64_t dim2) {
  return {
      at::diagonal_scatter(expanded(self, level.size()), expanded(src, level.size()), offset,
                           behind_batch(dim1, rank_of(self)), behind_batch(dim2, rank_of(self))),
      0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::select_backward, &select_backward_rule>(),
    rule<ops::slice_backward, &slice_backward_rule>(),
    rule<ops::diagonal_backward, &diagonal_backward_rule>(),
    rule<ops::unfold_backward, &unfold_backward_rule>(),
    rule<ops::select_scatter, &select_scatter_rule>(),
    rule<ops::slice_scatter, &slice_scatter_rule>(),
    rule<ops::diagonal_scatter, &diagonal_scatter_rule>(),
};

}  // namespace
}  // namespace torchlift
