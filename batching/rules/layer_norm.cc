// Normalization over trailing dims: layer norm, rms norm.

#include <ATen/core/Tensor.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/layer_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/layer_norm_ops.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/native_layer_norm_backward.h>
#include <ATen/ops/native_layer_norm_backward_ops.h>
#include <ATen/ops/native_layer_norm_ops.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <array>

#include "batching/rules/reduction.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

using OptionalArg = std::optional<BatchedArg>;

bool is_defined(const OptionalArg& arg) { return arg && arg->value.defined(); }
bool is_batched(const OptionalArg& arg) { return is_defined(arg) && arg->batched(); }
std::optional<at::Tensor> value_of(const OptionalArg& arg) {
  return is_defined(arg) ? std::optional<at::Tensor>(arg->value) : std::nullopt;
}

// NOTE [batched layer norm]
// The kernel normalizes the trailing dims of any tensor and scales by a weight that all rows share.
// A batch of inputs is only more rows; but weights of their own need a multiplication behind a
// kernel without weights:
//   input B..N, weight N -> kernel;  input (B)..N, weight BN -> kernel(..N) * B1..1N + bias.

// Weight or bias of each example, to be broadcast against values of `rank` logical dims.
at::Tensor affine(const BatchedArg& arg, int64_t rank) { return aligned(arg, rank); }

std::tuple<Batched, Batched, Batched> layer_norm_rule(BatchedArg input, at::IntArrayRef shape,
                                                      OptionalArg weight, OptionalArg bias,
                                                      double eps) {
  const std::optional<int64_t> bdim = input.bdim ? std::optional<int64_t>(0) : std::nullopt;
  const at::Tensor x = batch_first(input);
  if (!is_batched(weight) && !is_batched(bias)) {
    auto [out, mean, rstd] = at::native_layer_norm(x, shape, value_of(weight), value_of(bias), eps);
    return {Batched{out, bdim}, Batched{mean, bdim}, Batched{rstd, bdim}};
  }
  auto [out, mean, rstd] = at::native_layer_norm(x, shape, std::nullopt, std::nullopt, eps);
  const int64_t rank = input.logical_dim();
  at::Tensor scaled = out;
  std::optional<int64_t> out_bdim = bdim;
  for (const OptionalArg* arg : {&weight, &bias}) {
    if (!is_defined(*arg)) continue;
    const at::Tensor factor = affine(**arg, rank);
    // Without a batch of its own, the input broadcasts against B1..1N from the right.
    scaled = arg == &weight ? scaled * factor : scaled + factor;
    if ((*arg)->batched()) out_bdim = 0;
  }
  return {Batched{scaled.to(out.scalar_type()), out_bdim}, Batched{mean, bdim},
          Batched{rstd, bdim}};
}

// Sums all dims between the batch dim and the last `kept`.
at::Tensor sum_rows(const at::Tensor& t, int64_t kept) {
  DimList dims;
  for (int64_t d = 1; d < t.dim() - kept; ++d) dims.push_back(d);
  return dims.empty() ? t : t.sum(dims);
}

// All arguments with the batch first; input, mean, rstd and grad [B, ...].
struct Backward {
  at::Tensor grad, input, mean, rstd;
  int64_t kept;  // number of normalized dims

  // (input - mean) * rstd.
  at::Tensor normalized() const {
    if (is_tracked_outside(input)) return normalized_from_input();
    if (at::isReducedFloatingType(input.scalar_type())) {
      // Rounded products would not cancel.
      return (input.to(at::kFloat) - mean.to(at::kFloat)) * rstd.to(at::kFloat);
    }
    return at::addcmul(-(mean * rstd), input, rstd);  // in one pass
  }

 private:
  // NOTE [statistics are constants]
  // libtorch's native_layer_norm passes no gradient to its input through the mean and rstd it
  // returns. For an autograd outside they must be computed again; of rstd = (var + eps)^-1/2 the
  // eps is what we know.
  at::Tensor normalized_from_input() const {
    DimList dims;
    for (int64_t d = input.dim() - kept; d < input.dim(); ++d) dims.push_back(d);
    const at::Tensor centered = input - input.mean(dims, /*keepdim=*/true);
    const at::Tensor var = centered.square().mean(dims, /*keepdim=*/true);
    const at::Tensor eps = rstd.detach().pow(-2) - var.detach();
    return centered * (var + eps).rsqrt();
  }
};

std::tuple<Batched, Batched, Batched> layer_norm_backward(BatchedArg grad, BatchedArg input,
                                                          at::IntArrayRef shape, BatchedArg mean,
                                                          BatchedArg rstd, OptionalArg weight,
                                                          OptionalArg bias,
                                                          std::array<bool, 3> mask) {
  const bool any = grad.batched() || input.batched() || mean.batched() || rstd.batched();
  if (!any && !is_batched(weight)) {  // no gradient depends on the bias
    auto [d_input, d_weight, d_bias] = at::native_layer_norm_backward(
        grad.value, input.value, shape, mean.value, rstd.value, value_of(weight),
        is_defined(bias) ? std::optional<at::Tensor>(at::zeros(shape, bias->value.options()))
                         : std::nullopt,
        mask);
    return {Batched{d_input, {}}, Batched{d_weight, {}}, Batched{d_bias, {}}};
  }
  const int64_t size = is_batched(weight) ? weight->value.size(*weight->bdim)
                                          : batch_size_of({&grad, &input, &mean, &rstd});
  // The kernel reads mean and rstd as if they were contiguous.
  const Backward args{expanded(grad, size), expanded(input, size),
                      expanded(mean, size).contiguous(), expanded(rstd, size).contiguous(),
                      static_cast<int64_t>(shape.size())};
  std::tuple<Batched, Batched, Batched> result;
  if (mask[0]) {
    const bool apart = is_batched(weight);
    at::Tensor g = args.grad;
    if (apart) g = (g * affine(*weight, input.logical_dim())).to(g.scalar_type());
    std::get<0>(result) = {
        std::get<0>(at::native_layer_norm_backward(g, args.input, shape, args.mean, args.rstd,
                                                   apart ? std::nullopt : value_of(weight),
                                                   std::nullopt, {true, false, false})),
        0};
  }
  if (mask[1] && is_defined(weight)) {
    const at::Tensor each = args.grad * args.normalized();
    std::get<1>(result) = {sum_rows(each, args.kept).to(weight->value.scalar_type()), 0};
  }
  if (mask[2] && (is_defined(bias) || is_defined(weight))) {
    const at::ScalarType dtype = (is_defined(bias) ? bias : weight)->value.scalar_type();
    std::get<2>(result) = {sum_rows(args.grad, args.kept).to(dtype), 0};
  }
  return result;
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::native_layer_norm, &layer_norm_rule>(),
    rule<ops::native_layer_norm_backward, &layer_norm_backward>(),
    composite<ops::layer_norm, &at::compositeimplicitautograd::layer_norm_symint>(),
};

}  // namespace
}  // namespace torchlift
