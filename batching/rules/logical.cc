#include <ATen/core/Tensor.h>
#include <ATen/ops/bitwise_and_ops.h>
#include <ATen/ops/bitwise_left_shift_ops.h>
#include <ATen/ops/bitwise_or_ops.h>
#include <ATen/ops/bitwise_right_shift_ops.h>
#include <ATen/ops/bitwise_xor_ops.h>
#include <ATen/ops/logical_and_ops.h>
#include <ATen/ops/logical_or_ops.h>
#include <ATen/ops/logical_xor_ops.h>
#include <ATen/ops/lshift_ops.h>
#include <ATen/ops/rshift_ops.h>

#include "batching/rules/pointwise.h"

// Bitwise and logical operators, and shifts.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    pointwise_rows<ops::bitwise_and_Tensor, ops::bitwise_and_Scalar, ops::bitwise_and_Scalar_Tensor,
                   ops::bitwise_and__Tensor, ops::bitwise_and__Scalar, ops::bitwise_or_Tensor,
                   ops::bitwise_or_Scalar, ops::bitwise_or_Scalar_Tensor, ops::bitwise_or__Tensor,
                   ops::bitwise_or__Scalar, ops::bitwise_xor_Tensor, ops::bitwise_xor_Scalar,
                   ops::bitwise_xor_Scalar_Tensor, ops::bitwise_xor__Tensor,
                   ops::bitwise_xor__Scalar, ops::bitwise_left_shift_Tensor,
                   ops::bitwise_left_shift_Tensor_Scalar, ops::bitwise_left_shift_Scalar_Tensor,
                   ops::bitwise_left_shift__Tensor, ops::bitwise_left_shift__Tensor_Scalar,
                   ops::bitwise_right_shift_Tensor, ops::bitwise_right_shift_Tensor_Scalar,
                   ops::bitwise_right_shift_Scalar_Tensor, ops::bitwise_right_shift__Tensor,
                   ops::bitwise_right_shift__Tensor_Scalar, ops::__lshift___Tensor,
                   ops::__lshift___Scalar, ops::__rshift___Tensor, ops::__rshift___Scalar,
                   ops::__ilshift___Tensor, ops::__ilshift___Scalar, ops::__irshift___Tensor,
                   ops::__irshift___Scalar, ops::logical_and, ops::logical_and_, ops::logical_or,
                   ops::logical_or_, ops::logical_xor, ops::logical_xor_>()};

}  // namespace
}  // namespace torchlift
