// The operators of libtorch's forward mode. They mean something to autograd in the domain of the
// level at work even where nothing is tracked yet, so they always take the autograd path
// (OpKind::kDomain); on the values there is nothing left to do but to alias.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_fw_primal_ops.h>
#include <ATen/ops/_make_dual_ops.h>
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

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_make_dual, &make_dual_rule, OpKind::kDomain>(),
    rule<ops::_fw_primal, &fw_primal_rule, OpKind::kDomain>(),
};

}  // namespace
}  // namespace torchlift
