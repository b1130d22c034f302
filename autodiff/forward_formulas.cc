// Forward mode of operators for which libtorch has no formula, or (in C++ programs) none without
// Python: where an argument has a tangent, the operator is made of others.

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_batch_norm_with_update_ops.h>
#include <ATen/ops/_log_softmax_backward_data_ops.h>
#include <ATen/ops/_log_softmax_ops.h>
#include <ATen/ops/_native_batch_norm_legit_ops.h>
#include <ATen/ops/_softmax_backward_data_ops.h>
#include <ATen/ops/_softmax_ops.h>
#include <ATen/ops/batch_norm_backward_ops.h>
#include <ATen/ops/clamp.h>
#include <ATen/ops/huber_loss_backward_ops.h>
#include <ATen/ops/linalg_vector_norm_ops.h>
#include <ATen/ops/logsumexp_ops.h>
#include <ATen/ops/mish_backward_ops.h>
#include <ATen/ops/mse_loss_backward_ops.h>
#include <ATen/ops/mse_loss_ops.h>
#include <ATen/ops/native_batch_norm_backward_ops.h>
#include <ATen/ops/native_batch_norm_ops.h>
#include <ATen/ops/native_group_norm_backward_ops.h>
#include <ATen/ops/native_group_norm_ops.h>
#include <ATen/ops/native_layer_norm_backward_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>
#include <ATen/ops/nll_loss2d_backward_ops.h>
#include <ATen/ops/nll_loss_backward_ops.h>
#include <ATen/ops/norm_ops.h>
#include <ATen/ops/real.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu_backward_ops.h>
#include <ATen/ops/softplus.h>
#include <ATen/ops/tanh.h>

#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/dispatch.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                        at::ScalarType dtype) {
  const Tensor weights = precise(output), product = precise(grad) * weights;
  return (product - weights * product.sum(dim, /*keepdim=*/true)).to(dtype);
}

Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                            at::ScalarType dtype) {
  const Tensor g = precise(grad);
  return (g - precise(output).exp() * g.sum(dim, /*keepdim=*/true)).to(dtype);
}

Tensor precise_logsumexp(const Tensor& self, at::IntArrayRef dims, bool keepdim) {
  // Any constant will do; the largest entry, or real part, keeps exp in range.
  const Tensor values = self.detach();
  Tensor largest = (values.is_complex() ? at::real(values) : values).amax(dims, /*keepdim=*/true);
  largest = largest.masked_fill(largest.abs() == std::numeric_limits<double>::infinity(), 0);
  const Tensor result = (self - largest).exp().sum(dims, /*keepdim=*/true).log() + largest;
  return keepdim ? result : result.squeeze(dims);
}

Tensor logsumexp(const Tensor& self, at::IntArrayRef dims, bool keepdim) {
  return precise_logsumexp(precise(self), dims, keepdim).to(self.scalar_type());
}

Tensor precise_log_softmax(const Tensor& self, int64_t dim) {
  const Tensor x = precise(self);
  return x.dim() == 0 ? x * 0 : x - precise_logsumexp(x, {dim}, /*keepdim=*/true);
}

at::ScalarType softmax_type(const Tensor& self, bool half_to_float) {
  return half_to_float ? at::kFloat : self.scalar_type();
}

Tensor log_softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  return precise_log_softmax(self, dim).to(softmax_type(self, half_to_float));
}

Tensor softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  return precise_log_softmax(self, dim).exp().to(softmax_type(self, half_to_float));
}

// libtorch's tangent has shape [1], which it then refuses.
Tensor norm(const Tensor& self, const at::Scalar& p) {
  return ops::linalg_vector_norm::call(self, p, std::nullopt, /*keepdim=*/false, std::nullopt);
}

// sum or mean over a loss, by libtorch's number for it.
Tensor reduced(const Tensor& loss, int64_t reduction) {
  if (reduction == at::Reduction::Mean) return loss.mean();
  return reduction == at::Reduction::Sum ? loss.sum() : loss;
}

Tensor averaged(const Tensor& grad, const Tensor& like, int64_t reduction) {
  return reduction == at::Reduction::Mean ? grad / static_cast<double>(like.numel()) : grad;
}

Tensor mse_loss(const Tensor& self, const Tensor& target, int64_t reduction) {
  const Tensor difference = self - target;
  return reduced(difference * difference, reduction);
}

Tensor mse_loss_backward(const Tensor& grad, const Tensor& self, const Tensor& target,
                         int64_t reduction) {
  return averaged((self - target) * 2 * grad, self, reduction);
}

Tensor huber_loss_backward(const Tensor& grad, const Tensor& self, const Tensor& target,
                           int64_t reduction, double delta) {
  return averaged(at::clamp(self - target, -delta, delta) * grad, self, reduction);
}

// x sigmoid(x), differentiated.
Tensor silu_backward(const Tensor& grad, const Tensor& self) {
  const Tensor s = at::sigmoid(self);
  return grad * s * (self * (1 - s) + 1);
}

// x tanh(softplus(x)), differentiated.
Tensor mish_backward(const Tensor& grad, const Tensor& self) {
  const Tensor t = at::tanh(at::softplus(self));
  return grad * (t + self * at::sigmoid(self) * (1 - t * t));
}

using ThreeGradients = std::tuple<Tensor, Tensor, Tensor>;

// The gradient of x_hat = (x - mean) rstd by x, over the dims that were normalised.
Tensor normalised_backward(const Tensor& grad, const Tensor& x_hat, const Tensor& rstd,
                           at::IntArrayRef dims) {
  const Tensor mean = grad.mean(dims, /*keepdim=*/true);
  const Tensor slope = (grad * x_hat).mean(dims, /*keepdim=*/true);
  return (grad - mean - x_hat * slope) * rstd;
}

// (x - mean) rstd over these dims, and rstd, as functions of x: the numbers that a forward pass
// saved have no tangents of their own.
std::pair<Tensor, Tensor> normalised(const Tensor& x, at::IntArrayRef dims, const Tensor& rstd) {
  const Tensor centred = x - x.mean(dims, /*keepdim=*/true);
  const Tensor variance = (centred * centred).mean(dims, /*keepdim=*/true);
  // rstd = (variance + eps)^(-1/2)
  const Tensor eps = rstd.detach().pow(-2) - variance.detach();
  Tensor slope = (variance + eps).rsqrt();
  return {centred * slope, slope};
}

ThreeGradients layer_norm_backward(const Tensor& grad, const Tensor& input,
                                   c10::SymIntArrayRef shape, const Tensor& /*mean*/,
                                   const Tensor& saved_rstd, const OptionalTensor& weight,
                                   const OptionalTensor& bias, std::array<bool, 3> mask) {
  const auto rank = static_cast<int64_t>(shape.size()), batch_dims = input.dim() - rank;
  std::vector<int64_t> dims, outer;
  for (int64_t i = 0; i < input.dim(); ++i) (i < batch_dims ? outer : dims).push_back(i);
  const auto [x_hat, rstd] =
      dims.empty() ? std::pair(input * 0, saved_rstd) : normalised(input, dims, saved_rstd);
  const auto to_weight = [&](const Tensor& t) { return outer.empty() ? t : t.sum(outer); };
  const bool scaled = weight.has_value() && weight->defined();
  ThreeGradients result;
  if (mask[0]) {
    const Tensor inner = scaled ? grad * *weight : grad;
    std::get<0>(result) = dims.empty() ? inner * 0 : normalised_backward(inner, x_hat, rstd, dims);
  }
  if (mask[1] && scaled) std::get<1>(result) = to_weight(grad * x_hat);
  if (mask[2] && bias.has_value() && bias->defined()) std::get<2>(result) = to_weight(grad);
  return result;
}

using Normalised = std::tuple<Tensor, Tensor, Tensor>;  // output, mean, rstd

Normalised layer_norm(const Tensor& input, c10::SymIntArrayRef shape, const OptionalTensor& weight,
                      const OptionalTensor& bias, double eps) {
  std::vector<int64_t> dims;
  for (auto i = static_cast<int64_t>(shape.size()); i > 0; --i) dims.push_back(-i);
  const Tensor mean = input.mean(dims, /*keepdim=*/true);
  const Tensor centred = input - mean;
  const Tensor rstd = ((centred * centred).mean(dims, /*keepdim=*/true) + eps).rsqrt();
  Tensor output = centred * rstd;
  if (weight.has_value() && weight->defined()) output = output * *weight;
  if (bias.has_value() && bias->defined()) output = output + *bias;
  return {output, mean, rstd};
}

Normalised group_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      c10::SymInt n, c10::SymInt c, c10::SymInt hxw, int64_t groups, double eps) {
  const int64_t batch = n.guard_int(__FILE__, __LINE__), channels = c.guard_int(__FILE__, __LINE__);
  const int64_t pixels = hxw.guard_int(__FILE__, __LINE__);
  const Tensor x = input.reshape({batch, groups, channels / groups, pixels});
  const std::vector<int64_t> dims = {2, 3};
  const Tensor mean = x.mean(dims, /*keepdim=*/true);
  const Tensor centred = x - mean;
  const Tensor rstd = ((centred * centred).mean(dims, /*keepdim=*/true) + eps).rsqrt();
  const auto per_channel = [&](const Tensor& t) {
    return t.reshape({1, groups, channels / groups, 1});
  };
  Tensor output = centred * rstd;
  if (weight.has_value() && weight->defined()) output = output * per_channel(*weight);
  if (bias.has_value() && bias->defined()) output = output + per_channel(*bias);
  return {output.reshape(input.sizes()), mean.reshape({batch, groups}),
          rstd.reshape({batch, groups})};
}

ThreeGradients group_norm_backward(const Tensor& grad, const Tensor& input, const Tensor& /*mean*/,
                                   const Tensor& saved_rstd, const OptionalTensor& weight,
                                   c10::SymInt n, c10::SymInt c, c10::SymInt hxw, int64_t groups,
                                   std::array<bool, 3> mask) {
  const int64_t batch = n.guard_int(__FILE__, __LINE__), channels = c.guard_int(__FILE__, __LINE__);
  const int64_t pixels = hxw.guard_int(__FILE__, __LINE__);
  const std::vector<int64_t> grouped = {batch, groups, channels / groups, pixels};
  const auto [x_hat, r] =
      normalised(input.reshape(grouped), {2, 3}, saved_rstd.reshape({batch, groups, 1, 1}));
  const Tensor g = grad.reshape(grouped);
  ThreeGradients result;
  if (mask[0]) {
    const bool scaled = weight.has_value() && weight->defined();
    const Tensor inner = scaled ? g * weight->reshape({1, groups, channels / groups, 1}) : g;
    std::get<0>(result) = normalised_backward(inner, x_hat, r, {2, 3}).reshape(input.sizes());
  }
  const std::vector<int64_t> outer = {0, 3};
  if (mask[1]) std::get<1>(result) = (g * x_hat).sum(outer).reshape({channels});
  if (mask[2]) std::get<2>(result) = g.sum(outer).reshape({channels});
  return result;
}

// Dims of x but the channels', and the shape of a tensor of channels beside x.
std::pair<std::vector<int64_t>, std::vector<int64_t>> channel_dims(const Tensor& x) {
  std::vector<int64_t> dims, shape(x.dim(), 1);
  for (int64_t i = 0; i < x.dim(); ++i) {
    if (i != 1) dims.push_back(i);
  }
  shape[1] = x.size(1);
  return {dims, shape};
}

bool has(const OptionalTensor& t) { return t.has_value() && t->defined(); }

// A statistic of the batch as a constant, to be added to `running`: of no level of forward mode
// that `running` is outside of.
Tensor as_statistic(const Tensor& value, const Tensor& running) {
  Tensor constant = value.detach();
  while (const LiftedTensorImpl* impl = as_lifted(constant)) {
    if (depth_of(running) >= depth_of(constant) || impl->level().kind() == LevelKind::kVmap) break;
    constant = impl->value().detach();
  }
  return constant.reshape(running.sizes());
}

Normalised batch_norm(const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
                      const OptionalTensor& running_mean, const OptionalTensor& running_var,
                      bool training, double momentum, double eps) {
  const auto [dims, shape] = channel_dims(input);
  const int64_t channels = input.size(1);
  const Tensor mean = training ? input.mean(dims, /*keepdim=*/true) : running_mean->reshape(shape);
  const Tensor centred = input - mean;
  const Tensor variance =
      training ? (centred * centred).mean(dims, /*keepdim=*/true) : running_var->reshape(shape);
  if (training && has(running_mean)) {
    Tensor stat = *running_mean;
    stat.mul_(1 - momentum).add_(as_statistic(mean, stat), momentum);
  }
  if (training && has(running_var)) {
    Tensor stat = *running_var;
    const auto count = static_cast<double>(input.numel() / channels);
    stat.mul_(1 - momentum).add_(as_statistic(variance, stat), momentum * count / (count - 1));
  }
  const Tensor slope = (variance + eps).rsqrt();
  Tensor output = centred * slope;
  if (has(weight)) output = output * weight->reshape(shape);
  if (has(bias)) output = output + bias->reshape(shape);
  return {output, training ? mean.reshape({channels}) : input.new_zeros({0}),
          training ? slope.reshape({channels}) : input.new_zeros({0})};
}

Normalised batch_norm_legit(const Tensor& input, const OptionalTensor& weight,
                            const OptionalTensor& bias, Tensor& running_mean, Tensor& running_var,
                            bool training, double momentum, double eps) {
  return batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps);
}

Normalised batch_norm_no_stats(const Tensor& input, const OptionalTensor& weight,
                               const OptionalTensor& bias, bool training, double momentum,
                               double eps) {
  return batch_norm(input, weight, bias, {}, {}, training, momentum, eps);
}

// The last result is memory for the operator's own backward, which is not asked for here.
std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_with_update(
    const Tensor& input, const OptionalTensor& weight, const OptionalTensor& bias,
    Tensor& running_mean, Tensor& running_var, double momentum, double eps) {
  auto [output, mean, slope] = batch_norm(input, weight, bias, running_mean, running_var,
                                          /*training=*/true, momentum, eps);
  Tensor reserve = input.new_empty({0}, at::TensorOptions().dtype(at::kByte));
  return {std::move(output), std::move(mean), std::move(slope), std::move(reserve)};
}

ThreeGradients batch_norm_backward(const Tensor& grad, const Tensor& input,
                                   const OptionalTensor& weight, const OptionalTensor& running_mean,
                                   const OptionalTensor& running_var,
                                   const OptionalTensor& /*save_mean*/,
                                   const OptionalTensor& /*save_invstd*/, bool training, double eps,
                                   std::array<bool, 3> mask) {
  const auto [dims, shape] = channel_dims(input);
  const Tensor mean = training ? input.mean(dims, /*keepdim=*/true) : running_mean->reshape(shape);
  const Tensor centred = input - mean;
  const Tensor variance =
      training ? (centred * centred).mean(dims, /*keepdim=*/true) : running_var->reshape(shape);
  const Tensor slope = (variance + eps).rsqrt();
  const Tensor x_hat = centred * slope;
  ThreeGradients result;
  if (mask[0]) {
    const Tensor inner = has(weight) ? grad * weight->reshape(shape) : grad;
    std::get<0>(result) = training ? normalised_backward(inner, x_hat, slope, dims) : inner * slope;
  }
  if (mask[1]) std::get<1>(result) = (grad * x_hat).sum(dims);
  if (mask[2]) std::get<2>(result) = grad.sum(dims);
  return result;
}

}  // namespace

std::vector<ForwardKernel> forward_formulas() {
  constexpr MadeWhen kRecorded = MadeWhen::kDualAndRecorded;
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<ops::_softmax_backward_data, &softmax_backward>());
  kernels.push_back(made<ops::_log_softmax_backward_data, &log_softmax_backward>());
  kernels.push_back(made<ops::logsumexp, &logsumexp, kRecorded>());
  kernels.push_back(made<ops::_softmax, &softmax, kRecorded>());
  kernels.push_back(made<ops::_log_softmax, &log_softmax, kRecorded>());
  kernels.push_back(made<ops::mse_loss, &mse_loss>());
  kernels.push_back(made<ops::mse_loss_backward, &mse_loss_backward>());
  kernels.push_back(made<ops::huber_loss_backward, &huber_loss_backward>());
  kernels.push_back(made<ops::silu_backward, &silu_backward>());
  kernels.push_back(made<ops::mish_backward, &mish_backward>());
  kernels.push_back(made<ops::native_layer_norm, &layer_norm>());
  kernels.push_back(made<ops::native_layer_norm_backward, &layer_norm_backward>());
  kernels.push_back(linear_in_first<ops::nll_loss_backward, Others::kConstant>());
  kernels.push_back(linear_in_first<ops::nll_loss2d_backward, Others::kConstant>());
  kernels.push_back(made<ops::native_batch_norm, &batch_norm>());
  kernels.push_back(made<ops::_native_batch_norm_legit, &batch_norm_legit>());
  kernels.push_back(made<ops::_native_batch_norm_legit_no_stats, &batch_norm_no_stats>());
  kernels.push_back(made<ops::_batch_norm_with_update, &batch_norm_with_update>());
  kernels.push_back(linear_in_first<ops::batch_norm_backward>());
  kernels.push_back(made<ops::native_batch_norm_backward, &batch_norm_backward>());
  kernels.push_back(made<ops::native_group_norm, &group_norm>());
  kernels.push_back(made<ops::norm_Scalar, &norm>());
  kernels.push_back(made<ops::native_group_norm_backward, &group_norm_backward>());
  return kernels;
}

}  // namespace torchlift::forward_internal
