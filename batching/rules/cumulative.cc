// Running sums, products and extrema.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_logcumsumexp_ops.h>
#include <ATen/ops/cummax_ops.h>
#include <ATen/ops/cummin_ops.h>
#include <ATen/ops/cumprod_ops.h>
#include <ATen/ops/cumsum_ops.h>
#include <ATen/ops/logcumsumexp_ops.h>

#include "batching/rules/reduction.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

[[maybe_unused]] const RuleSet kRules{
    along_dim_rows<ops::cumsum, ops::cumprod, ops::logcumsumexp, ops::_logcumsumexp, ops::cummax,
                   ops::cummin>()};

[[maybe_unused]] const RuleSet kInPlace{
    rule<ops::cumsum_, along_dim_in_place<ops::cumsum_>>(),
    rule<ops::cumprod_, along_dim_in_place<ops::cumprod_>>(),
};

}  // namespace
}  // namespace torchlift
