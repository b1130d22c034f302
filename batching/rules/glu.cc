#include <ATen/core/Tensor.h>
#include <ATen/ops/glu_backward_jvp_ops.h>
#include <ATen/ops/glu_backward_ops.h>
#include <ATen/ops/glu_jvp_ops.h>
#include <ATen/ops/glu_ops.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

// Gated linear units: one half of a dim gates the other.

namespace torchlift {
namespace {

namespace ops = at::_ops;

Batched glu_rule(BatchedArg self, int64_t dim) {
  TORCH_CHECK(self.logical_dim() > 0, "glu does not support 0-dimensional tensors");
  return {ops::glu::call(self.value, physical_dim(self, dim)), self.bdim};
}

// The derivatives take tensors of which some have half the size along dim: [B, ...] each, dim + 1.
template <class Op, class... Args>
Batched along_dim(const Level& level, int64_t dim, const BatchedArg& first, const Args&... rest) {
  const int64_t physical = wrap_dim(dim, first.logical_dim()) + 1;
  return {Op::call(expanded(first, level.size()), expanded(rest, level.size())..., physical), 0};
}

Batched glu_backward_rule(const Level& level, BatchedArg grad, BatchedArg self, int64_t dim) {
  return along_dim<ops::glu_backward>(level, dim, grad, self);
}

Batched glu_jvp_rule(const Level& level, BatchedArg glu, BatchedArg x, BatchedArg dx, int64_t dim) {
  return along_dim<ops::glu_jvp>(level, dim, glu, x, dx);
}

Batched glu_backward_jvp_rule(const Level& level, BatchedArg grad_x, BatchedArg grad_glu,
                              BatchedArg x, BatchedArg dgrad_glu, BatchedArg dx, int64_t dim) {
  return along_dim<ops::glu_backward_jvp>(level, dim, grad_x, grad_glu, x, dgrad_glu, dx);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::glu, &glu_rule>(),
    rule<ops::glu_backward, &glu_backward_rule>(),
    rule<ops::glu_jvp, &glu_jvp_rule>(),
    rule<ops::glu_backward_jvp, &glu_backward_jvp_rule>(),
};

}  // namespace
}  // namespace torchlift
