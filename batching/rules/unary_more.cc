#include <ATen/core/Tensor.h>
#include <ATen/ops/frexp_ops.h>
#include <ATen/ops/logit_ops.h>
#include <ATen/ops/mvlgamma_ops.h>
#include <ATen/ops/nan_to_num_ops.h>
#include <ATen/ops/polygamma_ops.h>
#include <ATen/ops/round_ops.h>

#include "batching/rules/pointwise.h"

// Operators on each element of one tensor that take numbers besides.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    pointwise_rows<ops::frexp_Tensor, ops::logit, ops::mvlgamma, ops::nan_to_num, ops::polygamma,
                   ops::round_decimals>()};

}  // namespace
}  // namespace torchlift
