// Fake quantization: rounds as quantization does, and returns ordinary tensors.

#include <ATen/core/Tensor.h>
#include <ATen/ops/fake_quantize_per_channel_affine_cachemask.h>
#include <ATen/ops/fake_quantize_per_channel_affine_cachemask_backward_ops.h>
#include <ATen/ops/fake_quantize_per_channel_affine_cachemask_ops.h>
#include <ATen/ops/fake_quantize_per_tensor_affine_cachemask_backward_ops.h>
#include <ATen/ops/fake_quantize_per_tensor_affine_cachemask_ops.h>
#include <ATen/ops/mul_ops.h>

#include <tuple>

#include "batching/rules/pointwise.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// Scales and zero points that differ between the examples make of B examples of C channels B*C
// channels: BxCx... -> x(BC)...
std::tuple<Batched, Batched> per_channel_rule(const Level& level, BatchedArg self, BatchedArg scale,
                                              BatchedArg zero_point, int64_t axis,
                                              int64_t quant_min, int64_t quant_max) {
  const int64_t dim = wrap_dim(axis, self.logical_dim());
  const at::Tensor x = expanded(self, level.size());
  if (!scale.batched() && !zero_point.batched()) {
    auto [out, mask] = at::fake_quantize_per_channel_affine_cachemask(
        x, scale.value, zero_point.value, dim + 1, quant_min, quant_max);
    return {Batched{out, 0}, Batched{mask, 0}};
  }
  // libtorch takes the least of the zero points, and there are none.
  if (level.size() == 0) return {Batched{x, 0}, Batched{x.to(at::kBool), 0}};
  auto [out, mask] = at::fake_quantize_per_channel_affine_cachemask(
      merge_dim(x, 0, dim), expanded(scale, level.size()).flatten(),
      expanded(zero_point, level.size()).flatten(), dim, quant_min, quant_max);
  return {Batched{split_dim(out, dim, level.size()), dim},
          Batched{split_dim(mask, dim, level.size()), dim}};
}

// The gradient of what was not clamped. (libtorch's wants both of one shape.)
Batched backward_rule(BatchedArg grad, BatchedArg mask) {
  return pointwise<ops::mul_Tensor>(grad, mask);
}

[[maybe_unused]] const RuleSet kRules{
    pointwise_row<ops::fake_quantize_per_tensor_affine_cachemask>(),
    rule<ops::fake_quantize_per_tensor_affine_cachemask_backward, &backward_rule>(),
    rule<ops::fake_quantize_per_channel_affine_cachemask, &per_channel_rule>(),
    rule<ops::fake_quantize_per_channel_affine_cachemask_backward, &backward_rule>(),
};

}  // namespace
}  // namespace torchlift
