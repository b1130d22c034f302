#include <ATen/core/Tensor.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/acos_ops.h>
#include <ATen/ops/acosh_ops.h>
#include <ATen/ops/asin_ops.h>
#include <ATen/ops/asinh_ops.h>
#include <ATen/ops/atan_ops.h>
#include <ATen/ops/atanh_ops.h>
#include <ATen/ops/bitwise_not_ops.h>
#include <ATen/ops/ceil_ops.h>
#include <ATen/ops/clamp_max_ops.h>
#include <ATen/ops/clamp_min_ops.h>
#include <ATen/ops/clamp_ops.h>
#include <ATen/ops/conj_physical_ops.h>
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
#include <ATen/ops/lgamma_ops.h>
#include <ATen/ops/log10_ops.h>
#include <ATen/ops/log1p_ops.h>
#include <ATen/ops/log2_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/logical_not_ops.h>
#include <ATen/ops/logit_ops.h>
#include <ATen/ops/mvlgamma_ops.h>
#include <ATen/ops/nan_to_num_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/polygamma_ops.h>
#include <ATen/ops/rad2deg_ops.h>
#include <ATen/ops/reciprocal_ops.h>
#include <ATen/ops/round_ops.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/sgn_ops.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/sign_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sinc_ops.h>
#include <ATen/ops/sinh_ops.h>
#include <ATen/ops/sqrt_ops.h>
#include <ATen/ops/tan_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <ATen/ops/trunc_ops.h>

#include "batching/rules/pointwise.h"

// Operators on each element of one tensor, in place.

namespace torchlift {
namespace {

namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{pointwise_rows<
    ops::abs_, ops::acos_, ops::acosh_, ops::asin_, ops::asinh_, ops::atan_, ops::atanh_,
    ops::bitwise_not_, ops::ceil_, ops::cos_, ops::cosh_, ops::deg2rad_, ops::digamma_, ops::erf_,
    ops::erfc_, ops::erfinv_, ops::exp_, ops::exp2_, ops::expm1_, ops::floor_, ops::frac_, ops::i0_,
    ops::lgamma_, ops::log_, ops::log10_, ops::log1p_, ops::log2_, ops::logical_not_, ops::neg_,
    ops::rad2deg_, ops::reciprocal_, ops::round_, ops::rsqrt_, ops::sgn_, ops::sigmoid_, ops::sign_,
    ops::sin_, ops::sinc_, ops::sinh_, ops::sqrt_, ops::tan_, ops::tanh_, ops::trunc_,
    ops::conj_physical_, ops::clamp_, ops::clamp_max_, ops::clamp_min_, ops::mvlgamma_,
    ops::nan_to_num_, ops::polygamma_, ops::round__decimals, ops::logit_>()};

}  // namespace
}  // namespace torchlift
