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

#include "batching/rules/fold.h"
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

[[maybe_unused]] const RuleSet kRules{
    fold_row<ops::max_pool2d_with_indices, 4>(),
    fold_row<ops::max_pool2d_with_indices_backward, 4>(),
    fold_row<ops::max_pool3d_with_indices, 5>(),
    fold_row<ops::max_pool3d_with_indices_backward, 5>(),
    fold_row<ops::avg_pool2d, 4>(),
    fold_row<ops::avg_pool2d_backward, 4>(),
    fold_row<ops::avg_pool3d, 5>(),
    fold_row<ops::avg_pool3d_backward, 5>(),
    fold_row<ops::_adaptive_avg_pool2d, 4>(),
    fold_row<ops::_adaptive_avg_pool2d_backward, 4>(),
    fold_row<ops::_adaptive_avg_pool3d, 5>(),
    fold_row<ops::_adaptive_avg_pool3d_backward, 5>(),
    fold_row<ops::adaptive_max_pool2d, 4>(),
    fold_row<ops::adaptive_max_pool2d_backward, 4>(),
    fold_row<ops::adaptive_max_pool3d, 5>(),
    fold_row<ops::adaptive_max_pool3d_backward, 5>(),
    fold_row<ops::max_unpool2d, 4>(),
    fold_row<ops::max_unpool3d, 5>(),
    composite<ops::max_pool1d, &max_pool1d>(),
    composite<ops::max_pool2d, &at::compositeimplicitautograd::max_pool2d>(),
};

}  // namespace
}  // namespace torchlift
