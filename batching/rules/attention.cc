#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_attention_math.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward_ops.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_ops.h>
#include <ATen/ops/scaled_dot_product_attention_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/scaled_dot_product_attention_ops.h>

#include "batching/rules/dims.h"
#include "batching/rules/reduction.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// NOTE [attention of examples]
// scaled_dot_product_attention is decomposed. It chooses its kernel by the shapes that the user
// sees: the fused one, [N, H, L, E] -> [N, H, L, E], whose batch the examples join here, or
// softmax(q k^T) v.

// [B, N, H, L, E] -> [B*N, H, L, E]. The kernels take it for granted that the last stride is 1.
at::Tensor folded(const BatchedArg& arg, int64_t batch) {
  const at::Tensor value = expanded(arg, batch).flatten(0, 1);
  return value.stride(-1) == 1 ? value : value.contiguous();
}

// The mask, which broadcasts to [N, H, L, S], for [B*N, H, L, S].
std::optional<at::Tensor> folded_mask(const std::optional<BatchedArg>& mask, int64_t batch,
                                      int64_t n) {
  if (!mask.has_value()) return std::nullopt;
  const bool shared = mask->logical_dim() < 4 || logical_sizes(*mask)[0] == 1;
  if (!mask->bdim && shared) return mask->value;
  at::Tensor value = batch_first(*mask);
  if (mask->bdim) value = aligned(*mask, 4);
  auto sizes = value.sizes().slice(value.dim() - 3);
  return value.expand({batch, n, sizes[0], sizes[1], sizes[2]}).flatten(0, 1);
}

// [B*N, ...] -> [B, N, ...], N as in q.
Batched split(const at::Tensor& value, int64_t batch, const BatchedArg& q) {
  return {value.unflatten(0, at::IntArrayRef{batch, logical_sizes(q)[0]}), 0};
}

std::tuple<Batched, Batched> flash_rule(const Level& level, BatchedArg q, BatchedArg k,
                                        BatchedArg v, double dropout, bool causal,
                                        std::optional<BatchedArg> mask,
                                        std::optional<double> scale) {
  const int64_t batch = level.size();
  const at::Tensor query = folded(q, batch), key = folded(k, batch), value = folded(v, batch);
  const auto bias = folded_mask(mask, batch, logical_sizes(q)[0]);
  // The fused kernel has no gradient for the mask, and was chosen where nobody asked for one.
  const bool by_math = bias.has_value() && is_tracked_outside(*bias);
  auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
      query, key, value, dropout, causal, by_math ? bias->detach() : bias, scale);
  if (by_math) {
    out = std::get<0>(at::_scaled_dot_product_attention_math(
        query, key, value, bias, dropout, causal, /*dropout_mask=*/std::nullopt, scale));
  }
  return {split(out, batch, q), split(logsumexp, batch, q)};
}

std::tuple<Batched, Batched, Batched> flash_backward_rule(const Level& level, BatchedArg grad,
                                                          BatchedArg q, BatchedArg k, BatchedArg v,
                                                          BatchedArg out, BatchedArg logsumexp,
                                                          double dropout, bool causal,
                                                          std::optional<BatchedArg> mask,
                                                          std::optional<double> scale) {
  const int64_t batch = level.size();
  const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
      folded(grad, batch), folded(q, batch), folded(k, batch), folded(v, batch), folded(out, batch),
      expanded(logsumexp, batch).flatten(0, 1), dropout, causal,
      folded_mask(mask, batch, logical_sizes(q)[0]), scale);
  return {split(dq, batch, q), split(dk, batch, q), split(dv, batch, q)};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_scaled_dot_product_flash_attention_for_cpu, &flash_rule>(),
    rule<ops::_scaled_dot_product_flash_attention_for_cpu_backward, &flash_backward_rule>(),
    composite<ops::scaled_dot_product_attention,
              &at::compositeimplicitautograd::scaled_dot_product_attention>(),
};

}  // namespace
}  // namespace torchlift
