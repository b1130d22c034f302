// Pooling: the batch dim joins N, or is N where the user has none.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward_ops.h>
#include <ATen/ops/_adaptive_avg_pool2d_ops.h>
#include <ATen/ops/_adaptive_avg_pool3d_backward_ops.h>
#include <ATen/ops/_adaptive_avg_pool3d_ops.h>
#include <ATen/ops/adaptive_max_pool2d_backward_ops.h>
#include <ATen/ops/adaptive_max_pool2d_ops.h>
#include <ATen/ops/adaptive_max_pool3d_backward_ops.h>
#include <ATen/ops/adaptive_max_pool3d_ops.h>
#include <ATen/ops/avg_pool2d_backward_ops.h>
#include <ATen/ops/avg_pool2d_ops.h>
#include <ATen/ops/avg_pool3d_backward_ops.h>
#include <ATen/ops/avg_pool3d_ops.h>
#include <ATen/ops/fractional_max_pool2d_backward_ops.h>
#include <ATen/ops/fractional_max_pool2d_ops.h>
#include <ATen/ops/fractional_max_pool3d_backward_ops.h>
#include <ATen/ops/fractional_max_pool3d_ops.h>
#include <ATen/ops/max_pool1d_ops.h>
#include <ATen/ops/max_pool1d_with_indices.h>
#include <ATen/ops/max_pool2d_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/max_pool2d_ops.h>
#include <ATen/ops/max_pool2d_with_indices_backward_ops.h>
#include <ATen/ops/max_pool2d_with_indices_ops.h>
#include <ATen/ops/max_pool3d_with_indices_backward_ops.h>
#include <ATen/ops/max_pool3d_with_indices_ops.h>
#include <ATen/ops/max_unpool2d_ops.h>
#include <ATen/ops/max_unpool3d_ops.h>

#include <tuple>
#include <vector>

#include "batching/rules/fold.h"
#include "batching/rules/plane_pools.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// libtorch's own decomposition reads the data of tensors that need no gradient.
at::Tensor max_pool1d(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return std::get<0>(
      at::max_pool1d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode));
}

// The windows of a fractional pool start where its random samples, N x C x dims, say; without N
// they are 1 x C x dims.
template <class Op, int64_t Rank>
std::tuple<Batched, Batched> fractional_pool(const Level& level, BatchedArg self,
                                             at::IntArrayRef kernel_size,
                                             at::IntArrayRef output_size, BatchedArg samples) {
  const bool has_n = self.logical_dim() == Rank;
  TORCH_CHECK((has_n || self.logical_dim() == Rank - 1) && samples.logical_dim() == 3, "[vmap] ",
              Op::name, ": expected a tensor of ", Rank - 1, " or ", Rank,
              " dimensions and samples of 3, but got shapes ", at::IntArrayRef(logical_sizes(self)),
              " and ", at::IntArrayRef(logical_sizes(samples)));
  const int64_t size = level.size();
  const int64_t n = has_n ? logical_sizes(self)[0] : 1;
  const at::Tensor x = expanded(self, size);
  const at::Tensor starts = expanded(samples, size).narrow(1, 0, n).flatten(0, 1);
  const auto [out, indices] =
      Op::call(has_n ? x.flatten(0, 1) : x, kernel_size, output_size, starts.contiguous());
  const auto apart = [&](const at::Tensor& t) {
    return Batched{has_n ? t.unflatten(0, at::IntArrayRef({size, n})) : t, 0};
  };
  return {apart(out), apart(indices)};
}

[[maybe_unused]] const RuleSet kFractional{
    rule<ops::fractional_max_pool2d, &fractional_pool<ops::fractional_max_pool2d, 4>>(),
    rule<ops::fractional_max_pool3d, &fractional_pool<ops::fractional_max_pool3d, 5>>(),
    fold_row<ops::fractional_max_pool2d_backward, 4>(),
    fold_row<ops::fractional_max_pool3d_backward, 5>(),
};

std::tuple<Batched, Batched> max_pool2d(const Level& level, BatchedArg self,
                                        at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                        bool ceil_mode) {
  using Op = ops::max_pool2d_with_indices;
  const at::Tensor& x = self.value;
  const bool known_rank = self.logical_dim() == 3 || self.logical_dim() == 4;
  const bool leads = self.bdim < x.dim() - 2;
  const int64_t channels = known_rank && leads ? planes_at_a_time(x) : 0;
  if (channels == 0) {
    return fold_internal::Planes<Op, 4>()(level, self, kernel_size, stride, padding, dilation,
                                          ceil_mode);
  }
  // NOTE [planes as channels]. Where operators are written down, the layout is not chosen here:
  // compile/passes/channels_last.h does, for the whole graph, and the replay.
  const auto [values, indices] =
      max_pool_of_planes(x, channels, kernel_size, stride, padding, dilation, ceil_mode);
  return {{values, self.bdim}, {indices, self.bdim}};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::max_pool2d_with_indices, &max_pool2d>(),
    planes_of_shape_row<ops::max_pool2d_with_indices_backward, 4>(),
    planes_row<ops::max_pool3d_with_indices, 5>(),
    planes_of_shape_row<ops::max_pool3d_with_indices_backward, 5>(),
    planes_row<ops::avg_pool2d, 4>(),
    planes_of_shape_row<ops::avg_pool2d_backward, 4>(),
    planes_row<ops::avg_pool3d, 5>(),
    planes_of_shape_row<ops::avg_pool3d_backward, 5>(),
    planes_row<ops::_adaptive_avg_pool2d, 4>(),
    planes_of_shape_row<ops::_adaptive_avg_pool2d_backward, 4>(),
    planes_row<ops::_adaptive_avg_pool3d, 5>(),
    planes_of_shape_row<ops::_adaptive_avg_pool3d_backward, 5>(),
    planes_row<ops::adaptive_max_pool2d, 4>(),
    planes_of_shape_row<ops::adaptive_max_pool2d_backward, 4>(),
    planes_row<ops::adaptive_max_pool3d, 5>(),
    planes_of_shape_row<ops::adaptive_max_pool3d_backward, 5>(),
    planes_row<ops::max_unpool2d, 4>(),
    planes_row<ops::max_unpool3d, 5>(),
    composite<ops::max_pool1d, &max_pool1d>(),
    composite<ops::max_pool2d, &at::compositeimplicitautograd::max_pool2d>(),
};

}  // namespace
}  // namespace torchlift
