#include <ATen/core/Tensor.h>
#include <ATen/ops/eq_ops.h>
#include <ATen/ops/ge_ops.h>
#include <ATen/ops/gt_ops.h>
#include <ATen/ops/le_ops.h>
#include <ATen/ops/lt_ops.h>
#include <ATen/ops/ne_ops.h>

#include "batching/rules/pointwise.h"

// Comparisons.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    pointwise_rows<ops::eq_Tensor, ops::eq_Scalar, ops::eq__Tensor, ops::eq__Scalar, ops::ne_Tensor,
                   ops::ne_Scalar, ops::ne__Tensor, ops::ne__Scalar, ops::lt_Tensor, ops::lt_Scalar,
                   ops::lt__Tensor, ops::lt__Scalar, ops::le_Tensor, ops::le_Scalar,
                   ops::le__Tensor, ops::le__Scalar, ops::gt_Tensor, ops::gt_Scalar,
                   ops::gt__Tensor, ops::gt__Scalar, ops::ge_Tensor, ops::ge_Scalar,
                   ops::ge__Tensor, ops::ge__Scalar>()};

}  // namespace
}  // namespace torchlift
