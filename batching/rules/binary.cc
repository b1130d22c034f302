#include <ATen/core/Tensor.h>
#include <ATen/ops/_add_relu_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/atan2_ops.h>
#include <ATen/ops/complex_ops.h>
#include <ATen/ops/copysign_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/floor_divide_ops.h>
#include <ATen/ops/fmax_ops.h>
#include <ATen/ops/fmin_ops.h>
#include <ATen/ops/fmod_ops.h>
#include <ATen/ops/gcd_ops.h>
#include <ATen/ops/heaviside_ops.h>
#include <ATen/ops/hypot_ops.h>
#include <ATen/ops/igamma_ops.h>
#include <ATen/ops/igammac_ops.h>
#include <ATen/ops/lcm_ops.h>
#include <ATen/ops/ldexp_ops.h>
#include <ATen/ops/logaddexp2_ops.h>
#include <ATen/ops/logaddexp_ops.h>
#include <ATen/ops/maximum_ops.h>
#include <ATen/ops/minimum_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/nextafter_ops.h>
#include <ATen/ops/polar_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/remainder_ops.h>
#include <ATen/ops/rsub_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/xlogy_ops.h>

#include "batching/rules/pointwise.h"

// Arithmetic on two tensors, or a tensor and a number.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{pointwise_rows<
    ops::add_Tensor, ops::add_Scalar, ops::sub_Tensor, ops::sub_Scalar, ops::rsub_Tensor,
    ops::rsub_Scalar, ops::mul_Tensor, ops::mul_Scalar, ops::div_Tensor, ops::div_Scalar,
    ops::div_Tensor_mode, ops::div_Scalar_mode, ops::floor_divide, ops::floor_divide_Scalar,
    ops::pow_Tensor_Tensor, ops::pow_Tensor_Scalar, ops::pow_Scalar, ops::fmod_Tensor,
    ops::fmod_Scalar, ops::remainder_Tensor, ops::remainder_Scalar, ops::remainder_Scalar_Tensor,
    ops::atan2, ops::maximum, ops::minimum, ops::fmax, ops::fmin, ops::hypot, ops::copysign_Tensor,
    ops::copysign_Scalar, ops::logaddexp, ops::logaddexp2, ops::xlogy_Tensor,
    ops::xlogy_Scalar_Self, ops::xlogy_Scalar_Other, ops::heaviside, ops::ldexp_Tensor,
    ops::nextafter, ops::gcd, ops::lcm, ops::igamma, ops::igammac, ops::complex, ops::polar,
    ops::_add_relu_Tensor, ops::_add_relu_Scalar>()};

}  // namespace
}  // namespace torchlift
