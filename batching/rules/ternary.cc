#include <ATen/core/Tensor.h>
#include <ATen/ops/addcdiv_ops.h>
#include <ATen/ops/addcmul_ops.h>
#include <ATen/ops/clamp_max_ops.h>
#include <ATen/ops/clamp_min_ops.h>
#include <ATen/ops/clamp_ops.h>
#include <ATen/ops/lerp_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/where_ops.h>

#include "batching/rules/pointwise.h"

// Operators on three operands.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    pointwise_rows<ops::addcmul, ops::addcmul_, ops::addcdiv, ops::addcdiv_, ops::lerp_Tensor,
                   ops::lerp_Scalar, ops::lerp__Tensor, ops::lerp__Scalar, ops::clamp,
                   ops::clamp_Tensor, ops::clamp__Tensor, ops::clamp_min, ops::clamp_min_Tensor,
                   ops::clamp_min__Tensor, ops::clamp_max, ops::clamp_max_Tensor,
                   ops::clamp_max__Tensor>()};

// The condition takes no part in type promotion, and must stay bool.
Batched where_rule(BatchedArg condition, BatchedArg self, BatchedArg other) {
  namespace pi = pointwise_internal;
  pi::LinedUp lined;
  lined(condition);
  lined(self);
  lined(other);
  lined.dtypes_differ = self.value.scalar_type() != other.value.scalar_type();
  if (lined.holds()) {
    return {at::where(condition.value, self.value, other.value), lined.first->bdim};
  }
  pi::Common common;
  common(self);
  common(other);
  common.rank = std::max(common.rank, condition.logical_dim());
  return {
      at::where(aligned(condition, common.rank), pi::align(self, common), pi::align(other, common)),
      0};
}

[[maybe_unused]] const RuleSet kWhere{rule<ops::where_self, &where_rule>()};

}  // namespace
}  // namespace torchlift
