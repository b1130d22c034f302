#include <ATen/core/Tensor.h>
#include <ATen/ops/_conj_physical_ops.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/acos_ops.h>
#include <ATen/ops/acosh_ops.h>
#include <ATen/ops/angle_ops.h>
#include <ATen/ops/asin_ops.h>
#include <ATen/ops/asinh_ops.h>
#include <ATen/ops/atan_ops.h>
#include <ATen/ops/atanh_ops.h>
#include <ATen/ops/bitwise_not_ops.h>
#include <ATen/ops/ceil_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/cosh_ops.h>
#include <ATen/ops/deg2rad_ops.h>
#include <ATen/ops/digamma_ops.h>
#include <ATen/ops/erf_ops.h>
#include <ATen/ops/erfc_ops.h>
#include <ATen/ops/erfinv_ops.h>
#include <ATen/ops/exp2_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/expm1_ops.h>
#include <ATen/ops/floor_ops.h>
#include <ATen/ops/frac_ops.h>
#include <ATen/ops/i0_ops.h>
#include <ATen/ops/isinf_ops.h>
#include <ATen/ops/isnan_ops.h>
#include <ATen/ops/isneginf_ops.h>
#include <ATen/ops/isposinf_ops.h>
#include <ATen/ops/lgamma_ops.h>
#include <ATen/ops/log10_ops.h>
#include <ATen/ops/log1p_ops.h>
#include <ATen/ops/log2_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/logical_not_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/rad2deg_ops.h>
#include <ATen/ops/reciprocal_ops.h>
#include <ATen/ops/round_ops.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/sgn_ops.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/sign_ops.h>
#include <ATen/ops/signbit_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sinc_ops.h>
#include <ATen/ops/sinh_ops.h>
#include <ATen/ops/sqrt_ops.h>
#include <ATen/ops/tan_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <ATen/ops/trunc_ops.h>

#include "batching/rules/pointwise.h"

// Operators on each element of one tensor: the batch dim stays where it is.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    pointwise_rows<ops::abs, ops::acos, ops::acosh, ops::angle, ops::asin, ops::asinh, ops::atan,
                   ops::atanh, ops::bitwise_not, ops::ceil, ops::cos, ops::cosh, ops::deg2rad,
                   ops::digamma, ops::erf, ops::erfc, ops::erfinv, ops::exp, ops::exp2, ops::expm1,
                   ops::floor, ops::frac, ops::i0, ops::isinf, ops::isnan, ops::isneginf,
                   ops::isposinf, ops::lgamma, ops::log, ops::log10, ops::log1p, ops::log2,
                   ops::logical_not, ops::neg, ops::rad2deg, ops::reciprocal, ops::round,
                   ops::rsqrt, ops::sgn, ops::sigmoid, ops::sign, ops::signbit, ops::sin, ops::sinc,
                   ops::sinh, ops::sqrt, ops::tan, ops::tanh, ops::trunc, ops::_conj_physical>()};

}  // namespace
}  // namespace torchlift
