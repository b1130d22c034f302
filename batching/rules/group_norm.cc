// Group norm, and weights normalized by their own norm: renorm, weight_norm.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_weight_norm_interface_backward_ops.h>
#include <ATen/ops/_weight_norm_interface_ops.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/native_group_norm.h>
#include <ATen/ops/native_group_norm_backward.h>
#include <ATen/ops/native_group_norm_backward_ops.h>
#include <ATen/ops/native_group_norm_ops.h>
#include <ATen/ops/renorm_ops.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>

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

// NOTE [batched group norm]
// Images are independent, so B*N of them are one call; only weights of their own are applied
// outside of it.

// (B)C -> (B)1C1... to broadcast against an input of `rank` logical dims.
at::Tensor by_channel(const BatchedArg& arg, int64_t rank) {
  const at::Tensor value = batch_first(arg);
  c10::SmallVector<int64_t, 8> sizes;
  if (arg.batched()) sizes.push_back(value.size(0));
  sizes.push_back(1);
  sizes.push_back(value.size(-1));
  sizes.append(rank - 2, 1);
  return value.reshape(sizes);
}

at::Tensor split_images(const at::Tensor& t, int64_t size, int64_t images) {
  return t.defined() ? t.unflatten(0, at::IntArrayRef({size, images})) : t;
}

std::tuple<Batched, Batched, Batched> group_norm(BatchedArg input, OptionalArg weight,
                                                 OptionalArg bias, int64_t n, int64_t c,
                                                 int64_t hxw, int64_t group, double eps) {
  const bool own_affine = is_batched(weight) || is_batched(bias);
  const auto w = own_affine ? std::nullopt : value_of(weight);
  const auto b = own_affine ? std::nullopt : value_of(bias);
  at::Tensor x = batch_first(input);
  const int64_t size = input.batched() ? x.size(0) : 1;
  if (input.batched()) x = x.flatten(0, 1);
  auto [out, mean, rstd] =
      at::native_group_norm(x.contiguous(), w, b, size * n, c, hxw, group, eps);
  std::optional<int64_t> bdim;
  if (input.batched()) {
    bdim = 0;
    out = split_images(out, size, n);
    mean = split_images(mean, size, n);
    rstd = split_images(rstd, size, n);
  }
  const Batched mean_out{mean, bdim};
  const Batched rstd_out{rstd, bdim};
  if (!own_affine) return {Batched{out, bdim}, mean_out, rstd_out};
  at::Tensor scaled = out;
  if (is_defined(weight)) scaled = scaled * by_channel(*weight, input.logical_dim());
  if (is_defined(bias)) scaled = scaled + by_channel(*bias, input.logical_dim());
  return {Batched{scaled.to(out.scalar_type()), 0}, mean_out, rstd_out};
}

// The sums over an image that weight gradients are made of: BNC(HW) -> BNC.
struct ImageSums {
  at::Tensor grad;
  at::Tensor grad_input;
};

// Sum over images of (grad . x - mean * grad) * rstd, mean and rstd by group: BNG -> BNC -> BC
at::Tensor weight_gradient(const ImageSums& sums, const at::Tensor& mean, const at::Tensor& rstd,
                           int64_t group) {
  const int64_t per_group = group == 0 ? 0 : sums.grad.size(-1) / group;
  const auto by_group = [&](const at::Tensor& t) {
    return t.unflatten(-1, at::IntArrayRef({group, per_group}));
  };
  const at::Tensor each =
      (by_group(sums.grad_input) - by_group(sums.grad) * mean.unsqueeze(-1)) * rstd.unsqueeze(-1);
  return each.flatten(2, 3).sum(1);
}

std::tuple<Batched, Batched, Batched> group_norm_backward(BatchedArg grad, BatchedArg input,
                                                          BatchedArg mean, BatchedArg rstd,
                                                          OptionalArg weight, int64_t n, int64_t c,
                                                          int64_t hxw, int64_t group,
                                                          std::array<bool, 3> mask) {
  const int64_t size = is_batched(weight) ? weight->value.size(*weight->bdim)
                                          : batch_size_of({&grad, &input, &mean, &rstd});
  const at::Tensor g = expanded(grad, size);
  const at::Tensor x = expanded(input, size);
  const at::Tensor m = expanded(mean, size);
  const at::Tensor r = expanded(rstd, size);
  std::tuple<Batched, Batched, Batched> result;
  if (mask[0]) {
    const bool apart = is_batched(weight);
    const at::Tensor scaled =
        apart ? (g * by_channel(*weight, input.logical_dim())).to(g.scalar_type()) : g;
    const at::Tensor d_input = std::get<0>(at::native_group_norm_backward(
        scaled.flatten(0, 1).contiguous(), x.flatten(0, 1).contiguous(),
        m.flatten(0, 1).contiguous(), r.flatten(0, 1).contiguous(),
        apart ? std::nullopt : value_of(weight), size * n, c, hxw, group, {true, false, false}));
    std::get<0>(result) = {split_images(d_input, size, n), 0};
  }
  if (!mask[1] && !mask[2]) return result;
  const auto sum_image = [&](const at::Tensor& t) { return t.reshape({size, n, c, hxw}).sum(-1); };
  ImageSums sums{.grad = sum_image(g), .grad_input = {}};
  if (mask[1]) {
    sums.grad_input = sum_image(g * x);
    std::get<1>(result) = {weight_gradient(sums, m, r, group), 0};
  }
  if (mask[2]) std::get<2>(result) = {sums.grad.sum(1), 0};
  return result;
}

// --- renorm --------------------------------------------------------------------------------------

// What each slice is multiplied by so that its norm is at most maxnorm.
at::Tensor renorm_factor(const BatchedArg& self, const at::Scalar& p, int64_t dim,
                         const at::Scalar& maxnorm) {
  TORCH_CHECK(self.logical_dim() > 1,
              "[vmap] renorm: expected at least 2 dims, but each example has ", self.logical_dim());
  const Dimmed in = dimmed(self);
  DimList dims = in.all_dims();
  dims.erase(std::find(dims.begin(), dims.end(), in.physical(dim)));
  const at::Tensor norm = at::linalg_vector_norm(in.value, p, dims, /*keepdim=*/true);
  const at::Tensor scale = maxnorm.toDouble() * (norm + 1e-7).reciprocal();
  return at::where(norm > maxnorm, scale, at::Scalar(1)).to(in.value.scalar_type());
}

Batched renorm(BatchedArg self, const at::Scalar& p, int64_t dim, const at::Scalar& maxnorm) {
  return {self.value * renorm_factor(self, p, dim, maxnorm), self.bdim};
}

void renorm_in_place(BatchedArg self, const at::Scalar& p, int64_t dim, const at::Scalar& maxnorm) {
  self.value.mul_(renorm_factor(self, p, dim, maxnorm));
}

// --- weight norm ---------------------------------------------------------------------------------

// All dims but the batch dim (first) and the logical `dim`.
DimList other_dims(const at::Tensor& v, int64_t dim) {
  const int64_t kept = wrap_dim(dim, v.dim() - 1) + 1;
  DimList dims;
  for (int64_t d = 1; d < v.dim(); ++d) {
    if (d != kept) dims.push_back(d);
  }
  return dims;
}

at::Tensor sum_over(const at::Tensor& t, const DimList& dims) {
  return dims.empty() ? t : t.sum(dims, /*keepdim=*/true);
}

// w = v * (g / |v|), the norm over all dims but `dim`.
std::tuple<Batched, Batched> weight_norm(BatchedArg v, BatchedArg g, int64_t dim) {
  const int64_t size = batch_size_of({&v, &g});
  const at::Tensor value = expanded(v, size);
  const at::Tensor norms = sum_over(value * value, other_dims(value, dim)).sqrt();
  return {Batched{value * (expanded(g, size) / norms), 0}, Batched{norms, 0}};
}

std::tuple<Batched, Batched> weight_norm_backward(BatchedArg grad, BatchedArg v, BatchedArg g,
                                                  BatchedArg norms, int64_t dim) {
  const int64_t size = batch_size_of({&grad, &v, &g, &norms});
  const at::Tensor value = expanded(v, size);
  const at::Tensor gw = expanded(grad, size);
  const at::Tensor norm = expanded(norms, size);
  const at::Tensor along = sum_over(gw * value, other_dims(value, dim)) / norm;
  const at::Tensor grad_v = (expanded(g, size) / norm) * (gw - value * (along / norm));
  return {Batched{grad_v, 0}, Batched{along, 0}};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::native_group_norm, &group_norm>(),
    rule<ops::native_group_norm_backward, &group_norm_backward>(),
    rule<ops::renorm, &renorm>(),
    rule<ops::renorm_, &renorm_in_place>(),
    rule<ops::_weight_norm_interface, &weight_norm>(),
    rule<ops::_weight_norm_interface_backward, &weight_norm_backward>(),
};

}  // namespace
}  // namespace torchlift
