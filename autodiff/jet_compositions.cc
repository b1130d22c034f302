// Operators that are written out in others, on tensors of the level. libtorch's formulas would do
// (autodiff/jet_interpreter.cc, NOTE [formulas as series]); these take fewer operators.

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_log_softmax_backward_data_ops.h>
#include <ATen/ops/_log_softmax_ops.h>
#include <ATen/ops/_softmax_backward_data_ops.h>
#include <ATen/ops/_softmax_ops.h>
#include <ATen/ops/add.h>
#include <ATen/ops/addcdiv_ops.h>
#include <ATen/ops/amax.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/erf.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/gelu_backward_ops.h>
#include <ATen/ops/gelu_ops.h>
#include <ATen/ops/glu_backward_ops.h>
#include <ATen/ops/glu_ops.h>
#include <ATen/ops/lerp_ops.h>
#include <ATen/ops/log.h>
#include <ATen/ops/logsumexp_ops.h>
#include <ATen/ops/mse_loss_backward_ops.h>
#include <ATen/ops/mse_loss_ops.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/native_layer_norm_backward_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_backward_ops.h>
#include <ATen/ops/silu_backward_ops.h>
#include <ATen/ops/silu_ops.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh.h>
#include <ATen/ops/tanh_backward_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <cstdint>
#include <limits>
#include <numbers>
#include <numeric>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

#include "autodiff/jet_rules.h"
#include "autodiff/jet_series.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"

namespace torchlift::jet_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Sums and exponentials of 16-bit numbers are made in float, as libtorch's kernels do.
Tensor widened(const Tensor& x) {
  const at::ScalarType type = x.scalar_type();
  return type == at::kHalf || type == at::kBFloat16 ? x.to(at::kFloat) : x;
}

// --- activations ---------------------------------------------------------------------------------

constexpr double kTanhFactor = std::numbers::sqrt2 * std::numbers::inv_sqrtpi;  // sqrt(2 / pi)
constexpr double kCubic = 0.044715;

// The distribution function of the normal distribution, or what gelu takes for it.
Tensor normal_cdf(const Tensor& x, std::string_view approximate) {
  if (approximate == "none") {
    return at::mul(at::add(at::erf(at::mul(x, std::numbers::sqrt2 / 2)), 1), 0.5);
  }
  const Tensor inner = at::mul(at::add(at::mul(at::mul(x * x, x), kCubic), x), kTanhFactor);
  return at::mul(at::add(at::tanh(inner), 1), 0.5);
}

Tensor gelu(const Tensor& self, std::string_view approximate) {
  const Tensor x = widened(self);
  return (x * normal_cdf(x, approximate)).to(self.scalar_type());
}

// The derivative of normal_cdf.
Tensor normal_density(const Tensor& x, const Tensor& cdf, std::string_view approximate) {
  if (approximate == "none") {
    const double factor = std::numbers::inv_sqrtpi / std::numbers::sqrt2;
    return at::mul(at::exp(at::mul(x * x, -0.5)), factor);
  }
  // cdf = (1 + tanh(u)) / 2, so its derivative is 2 cdf (1 - cdf) u'.
  const Tensor slope = at::mul(at::add(at::mul(x * x, 3 * kCubic), 1), 2 * kTanhFactor);
  return (cdf - cdf * cdf) * slope;
}

Tensor gelu_backward(const Tensor& grad, const Tensor& self, std::string_view approximate) {
  const Tensor x = widened(self);
  const Tensor cdf = normal_cdf(x, approximate);
  return (widened(grad) * (cdf + x * normal_density(x, cdf, approximate))).to(grad.scalar_type());
}

Tensor silu(const Tensor& self) {
  const Tensor x = widened(self);
  return (x * at::sigmoid(x)).to(self.scalar_type());
}

Tensor silu_backward(const Tensor& grad, const Tensor& self) {
  const Tensor x = widened(self);
  const Tensor s = at::sigmoid(x);
  return (widened(grad) * (s + x * (s - s * s))).to(grad.scalar_type());
}

Tensor tanh_backward(const Tensor& grad, const Tensor& output) {
  return grad - grad * (output * output).conj();
}

Tensor sigmoid_backward(const Tensor& grad, const Tensor& output) {
  return grad * (output - output * output).conj();
}

std::tuple<Tensor, Tensor> halves(const Tensor& x, int64_t dim) {
  const int64_t half = x.size(dim) / 2;
  return {x.narrow(dim, 0, half), x.narrow(dim, half, half)};
}

Tensor glu(const Tensor& self, int64_t dim) {
  TORCH_CHECK(self.dim() > 0 && self.size(dim) % 2 == 0,
              "[jet] glu: the dim to halve must have an even size, but the shape is ", self.sizes(),
              ", and the dim ", dim);
  const auto [value, gate] = halves(widened(self), dim);
  return (value * at::sigmoid(gate)).to(self.scalar_type());
}

Tensor glu_backward(const Tensor& grad, const Tensor& self, int64_t dim) {
  const auto [value, gate] = halves(widened(self), dim);
  const Tensor s = at::sigmoid(gate), g = widened(grad);
  return at::cat({g * s, g * value * (s - s * s)}, dim).to(grad.scalar_type());
}

// --- softmax -------------------------------------------------------------------------------------

// Of coefficients 0: a number to subtract that keeps the exponentials small, whatever it is.
Tensor largest(const Tensor& x, at::IntArrayRef dims) {
  const Tensor value = primal(x, terms_of({x}).level);
  if (value.numel() == 0) return value.sum(dims, /*keepdim=*/true);
  const Tensor found = at::amax(value, dims, /*keepdim=*/true);
  return at::where(found.abs() == std::numeric_limits<double>::infinity(), at::zeros_like(found),
                   found);
}

Tensor result_of(const Tensor& self, bool half_to_float, const Tensor& result) {
  return half_to_float ? result : result.to(self.scalar_type());
}

Tensor softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  const Tensor x = widened(self);
  const Tensor e = at::exp(x - largest(x, dim));
  return result_of(self, half_to_float, e / e.sum(dim, /*keepdim=*/true));
}

Tensor log_sum_exp(const Tensor& x, at::IntArrayRef dims) {  // The dims are kept.
  const Tensor offset = largest(x, dims);
  return at::log(at::exp(x - offset).sum(dims, /*keepdim=*/true)) + offset;
}

Tensor log_softmax(const Tensor& self, int64_t dim, bool half_to_float) {
  const Tensor x = widened(self);
  return result_of(self, half_to_float, x - log_sum_exp(x, dim));
}

Tensor logsumexp(const Tensor& self, at::IntArrayRef dim, bool keepdim) {
  const Tensor x = widened(self);
  std::vector<int64_t> dims = dim.vec();
  if (dims.empty()) {
    dims.resize(static_cast<size_t>(x.dim()));
    std::iota(dims.begin(), dims.end(), 0);
  }
  const Tensor kept = log_sum_exp(x, dims).to(self.scalar_type());
  return keepdim || self.dim() == 0 ? kept : kept.sum(dims);
}

Tensor softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                        at::ScalarType type) {
  const Tensor y = widened(output);
  const Tensor product = widened(grad) * y;
  return (product - y * product.sum(dim, /*keepdim=*/true)).to(type);
}

Tensor log_softmax_backward(const Tensor& grad, const Tensor& output, int64_t dim,
                            at::ScalarType type) {
  const Tensor g = widened(grad);
  return (g - at::exp(widened(output)) * g.sum(dim, /*keepdim=*/true)).to(type);
}

// --- layer norm ----------------------------------------------------------------------------------

// The last `count` dims of t, or those before.
std::vector<int64_t> last_dims(const Tensor& t, size_t count) {
  std::vector<int64_t> dims(count);
  std::iota(dims.begin(), dims.end(), t.dim() - static_cast<int64_t>(count));
  return dims;
}
std::vector<int64_t> first_dims(const Tensor& t, size_t others) {
  std::vector<int64_t> dims(static_cast<size_t>(t.dim()) - others);
  std::iota(dims.begin(), dims.end(), 0);
  return dims;
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(const Tensor& input, c10::SymIntArrayRef shape,
                                              const OptionalTensor& weight,
                                              const OptionalTensor& bias, double eps) {
  const std::vector<int64_t> dims = last_dims(input, shape.size());
  const Tensor x = widened(input);
  const Tensor mean = x.mean(dims, /*keepdim=*/true);
  const Tensor centered = x - mean;
  const Tensor rstd = at::rsqrt(at::add((centered * centered).mean(dims, /*keepdim=*/true), eps));
  Tensor result = centered * rstd;
  if (weight.has_value() && weight->defined()) result = result * *weight;
  if (bias.has_value() && bias->defined()) result = result + *bias;
  return {result.to(input.scalar_type()), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(const Tensor& grad, const Tensor& input,
                                                       c10::SymIntArrayRef shape,
                                                       const Tensor& mean, const Tensor& rstd,
                                                       const OptionalTensor& weight,
                                                       const OptionalTensor& bias,
                                                       std::array<bool, 3> mask) {
  const std::vector<int64_t> dims = last_dims(input, shape.size());
  const std::vector<int64_t> rows = first_dims(input, shape.size());
  const auto over_rows = [&](const Tensor& t, at::ScalarType type) {
    return (rows.empty() ? t : t.sum(rows)).to(type);
  };
  const bool scaled = weight.has_value() && weight->defined();
  const Tensor g = widened(grad);
  const Tensor normed = (widened(input) - mean) * rstd;
  std::tuple<Tensor, Tensor, Tensor> results;
  if (mask[0]) {
    const Tensor inner = scaled ? g * *weight : g;
    const Tensor along = normed * (inner * normed).mean(dims, /*keepdim=*/true);
    const Tensor result = rstd * (inner - inner.mean(dims, /*keepdim=*/true) - along);
    std::get<0>(results) = result.to(input.scalar_type());
  }
  if (mask[1] && scaled) {
    std::get<1>(results) = over_rows(g * normed, weight->scalar_type());
  }
  if (mask[2] && bias.has_value() && bias->defined()) {
    std::get<2>(results) = over_rows(g, bias->scalar_type());
  }
  return results;
}

// --- sums of products ----------------------------------------------------------------------------

Tensor addcdiv(const Tensor& self, const Tensor& a, const Tensor& b, const at::Scalar& value) {
  return self + at::mul(a / b, value);
}

Tensor lerp(const Tensor& self, const Tensor& end, const Tensor& weight) {
  return self + weight * (end - self);
}

Tensor mse_loss(const Tensor& self, const Tensor& target, int64_t reduction) {
  const Tensor difference = self - target;
  const Tensor square = difference * difference;
  if (reduction == at::Reduction::Mean) return square.mean();
  return reduction == at::Reduction::Sum ? square.sum() : square;
}

Tensor mse_loss_backward(const Tensor& grad, const Tensor& self, const Tensor& target,
                         int64_t reduction) {
  const Tensor difference = self - target;
  const double factor =
      reduction == at::Reduction::Mean ? 2.0 / static_cast<double>(difference.numel()) : 2.0;
  return at::mul(difference, factor) * grad;
}

[[maybe_unused]] const JetRules kRules{
    {
        function_rule<ops::gelu, &gelu>(),
        function_rule<ops::gelu_backward, &gelu_backward>({{0}}),
        function_rule<ops::glu, &glu>(),
        function_rule<ops::glu_backward, &glu_backward>({{0}}),
        function_rule<ops::silu, &silu>(),
        function_rule<ops::silu_backward, &silu_backward>({{0}}),
        function_rule<ops::tanh_backward, &tanh_backward>({{0}}),
        function_rule<ops::sigmoid_backward, &sigmoid_backward>({{0}}),
    },
    {
        function_rule<ops::_softmax, &softmax>(),
        function_rule<ops::_log_softmax, &log_softmax>(),
        function_rule<ops::logsumexp, &logsumexp>(),
        function_rule<ops::_softmax_backward_data, &softmax_backward>({{0}}),
        function_rule<ops::_log_softmax_backward_data, &log_softmax_backward>({{0}}),
    },
    {
        function_rule<ops::native_layer_norm, &layer_norm>(),
        function_rule<ops::native_layer_norm_backward, &layer_norm_backward>(),
    },
    {
        function_rule<ops::addcdiv, &addcdiv>({{0, 1}}),
        function_rule<ops::lerp_Tensor, &lerp>({{0, 1}}),
        function_rule<ops::mse_loss, &mse_loss>(),
        function_rule<ops::mse_loss_backward, &mse_loss_backward>({{0}, {1, 2}}),
    },
};

}  // namespace
}  // namespace torchlift::jet_internal
