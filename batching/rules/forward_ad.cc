// The operators of libtorch's forward mode. Those that make a dual number mean something to
// autograd in the domain of the level at work even where nothing is tracked yet, so they always
// take the autograd path (OpKind::kDomain); on the values there is nothing left to do but to alias.
// The others are what libtorch asks of a tangent before it accepts it.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fw_primal_ops.h>
#include <ATen/ops/_has_same_storage_numel_ops.h>
#include <ATen/ops/_make_dual_ops.h>
#include <ATen/ops/_new_zeros_with_same_feature_meta.h>
#include <ATen/ops/_new_zeros_with_same_feature_meta_ops.h>
#include <ATen/ops/alias.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

Batched make_dual_rule(BatchedArg primal, BatchedArg /*tangent*/, int64_t /*level*/) {
  return {at::alias(primal.value), primal.bdim};
}

Batched fw_primal_rule(BatchedArg self, int64_t /*level*/) {
  return {at::alias(self.value), self.bdim};
}

// Asked to learn whether a view of one can be taken of the other with the same strides. Only the
// storage of one example counts, and a value's storage holds that for every example.
bool has_same_storage_numel_rule(BatchedArg /*self*/, BatchedArg /*other*/) { return true; }

// Any one of the examples; of no examples, what one would look like.
at::Tensor one_example(const BatchedArg& self) {
  if (!self.batched()) return self.value;
  if (self.value.size(*self.bdim) > 0) return self.value.select(*self.bdim, 0);
  return self.value.new_empty(logical_sizes(self));
}

// Zeros of self's dtype, laid out as `other` is, and with a batch dim if either has one.
Batched new_zeros_like_other_rule(BatchedArg self, BatchedArg other, int64_t num_batch_dims) {
  if (other.batched()) {
    // The layout of all examples of `other` at once. Of self, only the batch dims of deeper levels
    // count, which lie in front.
    return {at::_new_zeros_with_same_feature_meta(one_example(self), other.value, num_batch_dims),
            num_batch_dims + *other.bdim};
  }
  return {at::_new_zeros_with_same_feature_meta(batch_first(self), other.value, num_batch_dims + 1),
          0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_make_dual, &make_dual_rule, OpKind::kDomain>(),
    rule<ops::_fw_primal, &fw_primal_rule, OpKind::kDomain>(),
    rule<ops::_has_same_storage_numel, &has_same_storage_numel_rule>(),
    rule<ops::_new_zeros_with_same_feature_meta, &new_zeros_like_other_rule>(),
};

}  // namespace
}  // namespace torchlift
