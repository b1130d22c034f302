// segment_reduce: its lengths and offsets take leading dims, of which the batch dim is one more.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_segment_reduce_backward.h>
#include <ATen/ops/_segment_reduce_backward_ops.h>
#include <ATen/ops/segment_reduce.h>
#include <ATen/ops/segment_reduce_ops.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

using Segments = std::optional<BatchedArg>;

std::optional<at::Tensor> in_front(const Segments& segments, int64_t size) {
  if (!segments.has_value()) return std::nullopt;
  return expanded(*segments, size).contiguous();
}

int64_t behind_batch(const BatchedArg& data, int64_t axis) {
  return wrap_dim(axis, data.logical_dim()) + 1;
}

Batched segment_reduce_rule(const Level& level, BatchedArg data, c10::string_view reduce,
                            Segments lengths, Segments indices, Segments offsets, int64_t axis,
                            bool unsafe, const std::optional<at::Scalar>& initial) {
  const int64_t size = level.size();
  unsafe = unsafe || size == 0;  // The check takes the minimum of the lengths, and there are none.
  return {at::segment_reduce(expanded(data, size), reduce, in_front(lengths, size),
                             in_front(indices, size), in_front(offsets, size),
                             behind_batch(data, axis), unsafe, initial),
          0};
}

Batched segment_reduce_backward_rule(const Level& level, BatchedArg grad, BatchedArg output,
                                     BatchedArg data, c10::string_view reduce, Segments lengths,
                                     Segments offsets, int64_t axis,
                                     const std::optional<at::Scalar>& initial) {
  const int64_t size = level.size();
  return {at::_segment_reduce_backward(
              expanded(grad, size).contiguous(), expanded(output, size).contiguous(),
              expanded(data, size).contiguous(), reduce, in_front(lengths, size),
              in_front(offsets, size), behind_batch(data, axis), initial),
          0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::segment_reduce, &segment_reduce_rule>(),
    rule<ops::_segment_reduce_backward, &segment_reduce_backward_rule>(),
};

}  // namespace
}  // namespace torchlift
