// Whole layers of attention in one operator: nn.MultiheadAttention's and
// nn.TransformerEncoderLayer's fast paths in eval mode, where nothing is differentiated. Here they
// are what they stand for.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_native_multi_head_attention_ops.h>
#include <ATen/ops/_transformer_encoder_layer_fwd_ops.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/layer_norm.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "core/registry.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// libtorch's number for a mask NS. Others are LS or NHLS.
constexpr int64_t kPaddingMask = 1;

// The scores NHLS with a mask: true where nothing is looked at, or numbers to add. (torch.nn hands
// over numbers, 0 and -inf, whatever it was given.)
Tensor masked(const Tensor& scores, const Tensor& mask, std::optional<int64_t> mask_type) {
  const Tensor broadcast = mask_type == kPaddingMask ? mask.unsqueeze(1).unsqueeze(1) : mask;
  if (mask.scalar_type() != at::kBool) return scores + broadcast.to(scores.scalar_type());
  return scores.masked_fill(broadcast, -std::numeric_limits<double>::infinity());
}

// NLE -> NHLD
Tensor split_heads(const Tensor& t, int64_t heads) {
  return t.unflatten(-1, at::IntArrayRef({heads, t.size(-1) / heads})).transpose(1, 2);
}

struct Projection {
  Tensor weight, bias;
};

struct Attended {
  Tensor output;   // NLE
  Tensor weights;  // NHLS
};

// The rows of qkv are those of q, of k and of v.
Attended attend(const Tensor& query, const Tensor& key, const Tensor& value, int64_t heads,
                const Projection& qkv, const Projection& out, const OptionalTensor& mask,
                std::optional<int64_t> mask_type) {
  const std::vector<Tensor> weights = qkv.weight.chunk(3), biases = qkv.bias.chunk(3);
  const auto project = [&](const Tensor& t, int i) {
    return split_heads(at::linear(t, weights[i], biases[i]), heads);
  };
  const Tensor q = project(query, 0), k = project(key, 1), v = project(value, 2);
  Tensor scores = (q / std::sqrt(static_cast<double>(q.size(-1)))).matmul(k.mT());
  if (mask.has_value() && mask->defined()) {
    scores = masked(scores, *mask, mask_type);
  }
  const Tensor chosen = scores.softmax(-1);
  const Tensor joined = chosen.matmul(v).transpose(1, 2).flatten(-2);
  return {at::linear(joined, out.weight, out.bias), chosen};
}

std::tuple<Tensor, Tensor> multi_head_attention(const Tensor& query, const Tensor& key,
                                                const Tensor& value, int64_t /*embed_dim*/,
                                                int64_t heads, const Tensor& qkv_weight,
                                                const Tensor& qkv_bias, const Tensor& proj_weight,
                                                const Tensor& proj_bias, const OptionalTensor& mask,
                                                bool need_weights, bool average_attn_weights,
                                                std::optional<int64_t> mask_type) {
  const Attended attended = attend(query, key, value, heads, {qkv_weight, qkv_bias},
                                   {proj_weight, proj_bias}, mask, mask_type);
  if (!need_weights) return {attended.output, Tensor()};
  return {attended.output, average_attn_weights ? attended.weights.mean(1) : attended.weights};
}

Tensor transformer_encoder_layer(const Tensor& src, int64_t /*embed_dim*/, int64_t heads,
                                 const Tensor& qkv_weight, const Tensor& qkv_bias,
                                 const Tensor& proj_weight, const Tensor& proj_bias, bool use_gelu,
                                 bool norm_first, double eps, const Tensor& norm_weight_1,
                                 const Tensor& norm_bias_1, const Tensor& norm_weight_2,
                                 const Tensor& norm_bias_2, const Tensor& ffn_weight_1,
                                 const Tensor& ffn_bias_1, const Tensor& ffn_weight_2,
                                 const Tensor& ffn_bias_2, const OptionalTensor& mask,
                                 std::optional<int64_t> mask_type) {
  const auto norm = [&](const Tensor& x, const Tensor& weight, const Tensor& bias) {
    return at::layer_norm(x, std::vector<int64_t>{x.size(-1)}, weight, bias, eps);
  };
  const auto attention = [&](const Tensor& x) {
    return attend(x, x, x, heads, {qkv_weight, qkv_bias}, {proj_weight, proj_bias}, mask, mask_type)
        .output;
  };
  const auto feed_forward = [&](const Tensor& x) {
    const Tensor hidden = at::linear(x, ffn_weight_1, ffn_bias_1);
    return at::linear(use_gelu ? at::gelu(hidden) : at::relu(hidden), ffn_weight_2, ffn_bias_2);
  };
  if (norm_first) {
    const Tensor x = src + attention(norm(src, norm_weight_1, norm_bias_1));
    return x + feed_forward(norm(x, norm_weight_2, norm_bias_2));
  }
  const Tensor x = norm(src + attention(src), norm_weight_1, norm_bias_1);
  return norm(x + feed_forward(x), norm_weight_2, norm_bias_2);
}

[[maybe_unused]] const RuleSet kRules{
    composite<ops::_native_multi_head_attention, &multi_head_attention>(),
    composite<ops::_transformer_encoder_layer_fwd, &transformer_encoder_layer>(),
};

}  // namespace
}  // namespace torchlift
