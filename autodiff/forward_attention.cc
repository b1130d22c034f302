// Forward mode of attention: libtorch's fused kernels have no formula. Here it is
// softmax(q k^T scale + mask) v (Vaswani et al., "Attention is all you need", 2017).

#include <ATen/core/Tensor.h>
#include <ATen/ops/_safe_softmax.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_ops.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_ops.h>
#include <ATen/ops/logsumexp.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/scaled_dot_product_attention_ops.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A mask of bools stays one.
OptionalTensor precise_mask(const OptionalTensor& mask) {
  if (!mask.has_value() || !mask->defined() || !mask->is_floating_point()) return mask;
  return precise(*mask);
}

// Whatever kernel the device would have chosen.
Tensor attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                 double dropout, bool causal, std::optional<double> scale, bool enable_gqa) {
  return std::get<0>(at::_scaled_dot_product_attention_math(
                         precise(q), precise(k), precise(v), precise_mask(mask), dropout, causal,
                         /*dropout_mask=*/std::nullopt, scale, enable_gqa))
      .to(q.scalar_type());
}

// NHLE, NHSE, NHSE -> NHLE, and log(sum(exp(scores))): NHL
std::tuple<Tensor, Tensor> flash_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                           double /*dropout: 0, or the kernel refuses*/,
                                           bool causal, const OptionalTensor& mask,
                                           std::optional<double> scale) {
  constexpr double kNever = -std::numeric_limits<double>::infinity();
  const double factor = scale.value_or(1 / std::sqrt(static_cast<double>(q.size(-1))));
  Tensor scores = (precise(q) * factor).matmul(precise(k).mT());
  if (causal) {
    const Tensor later = at::ones({q.size(-2), k.size(-2)}, q.options().dtype(at::kBool)).triu(1);
    scores = scores.masked_fill(later, kNever);
  }
  if (mask.has_value() && mask->defined()) {
    scores = mask->scalar_type() == at::kBool ? scores.masked_fill(mask->logical_not(), kNever)
                                              : scores + *mask;
  }
  const Tensor weights = at::_safe_softmax(scores, -1);
  return {weights.matmul(precise(v)).to(q.scalar_type()),
          at::logsumexp(scores, std::vector<int64_t>{-1})};
}

}  // namespace

std::vector<ForwardKernel> attention_formulas() {
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<ops::scaled_dot_product_attention, &attention>());
  kernels.push_back(made<ops::_scaled_dot_product_flash_attention_for_cpu, &flash_attention>());
  kernels.push_back(linear_in_first<ops::_scaled_dot_product_flash_attention_for_cpu_backward>());
  return kernels;
}

}  // namespace torchlift::forward_internal
