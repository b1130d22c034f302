#include <ATen/core/Tensor.h>
#include <ATen/ops/_add_relu_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/atan2_ops.h>
#include <ATen/ops/copysign_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/floor_divide_ops.h>
#include <ATen/ops/fmod_ops.h>
#include <ATen/ops/gcd_ops.h>
#include <ATen/ops/heaviside_ops.h>
#include <ATen/ops/hypot_ops.h>
#include <ATen/ops/igamma_ops.h>
#include <ATen/ops/igammac_ops.h>
#include <ATen/ops/lcm_ops.h>
#include <ATen/ops/ldexp_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/nextafter_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/remainder_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/xlogy_ops.h>

#include "batching/rules/pointwise.h"

// Arithmetic on two tensors, or a tensor and a number, in place.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    pointwise_rows<ops::add__Tensor, ops::add__Scalar, ops::sub__Tensor, ops::sub__Scalar,
                   ops::mul__Tensor, ops::mul__Scalar, ops::div__Tensor, ops::div__Scalar,
                   ops::div__Tensor_mode, ops::div__Scalar_mode, ops::floor_divide__Tensor,
                   ops::floor_divide__Scalar, ops::pow__Tensor, ops::pow__Scalar, ops::fmod__Tensor,
                   ops::fmod__Scalar, ops::remainder__Tensor, ops::remainder__Scalar, ops::atan2_,
                   ops::hypot_, ops::copysign__Tensor, ops::copysign__Scalar, ops::xlogy__Tensor,
                   ops::xlogy__Scalar_Other, ops::heaviside_, ops::ldexp_, ops::nextafter_,
                   ops::gcd_, ops::lcm_, ops::igamma_, ops::igammac_, ops::_add_relu__Tensor,
                   ops::_add_relu__Scalar>()};

}  // namespace
}  // namespace torchlift
