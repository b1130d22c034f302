// Operators of neural networks: normalization, pooling by maxima, losses over classes.

#include <ATen/ops/max_pool2d_with_indices.h>
#include <ATen/ops/max_pool3d_with_indices.h>

#include <numeric>

#include "autodiff/dependence_rules.h"

namespace torchlift {
namespace {

using at::Tensor;

std::vector<int64_t> dims_from(int64_t first, int64_t rank) {
  std::vector<int64_t> dims(std::max<int64_t>(rank - first, 0));
  std::iota(dims.begin(), dims.end(), first);
  return dims;
}

// --- layer_norm ----------------------------------------------------------------------------------

Tensor layer_norm(const DependenceCall& call, const Tensor& like, size_t result) {
  const int64_t rank = call.tensor("input").dim();
  const auto normalized = static_cast<int64_t>(call.find("normalized_shape")->toIntVector().size());
  const Tensor groups = any_along(call.mask("input"), dims_from(rank - normalized, rank));
  if (result > 0) return groups;
  const Tensor scale =
      either(align(call.mask("weight"), like.dim()), align(call.mask("bias"), like.dim()));
  return either(groups, scale);
}

Tensor layer_norm_backward(const DependenceCall& call, const Tensor& like, size_t result) {
  if (result > 0) return dense(call, like, result);
  const int64_t rank = like.dim();
  const auto normalized = static_cast<int64_t>(call.find("normalized_shape")->toIntVector().size());
  const auto dims = dims_from(rank - normalized, rank);
  Tensor all;
  for (const char* name : {"grad_out", "input", "mean", "rstd", "weight"}) {
    const Tensor mask = align(call.mask(name), rank);
    if (mask.defined()) all = either(all, any_along(mask, dims));
  }
  return all;
}

// --- group_norm and batch_norm -------------------------------------------------------------------

// Each example on all of itself; scale and shift on all of theirs.
Tensor by_example(const DependenceCall& call, const Tensor& like, size_t result) {
  Tensor all;
  for (const Tensor& t : call.tensors()) {
    const Tensor mask = call.mask(t);
    if (!mask.defined()) continue;
    if (t.dim() < 2 || like.dim() == 0 || t.size(0) != like.size(0)) {
      all = either(all, any_element(mask, like.dim()));
      continue;
    }
    std::vector<int64_t> sizes(like.dim() + 1, 1);
    sizes[0] = call.inputs();
    sizes[1] = like.size(0);
    all = either(all, mask.flatten(2).any(2).reshape(sizes));
  }
  static_cast<void>(result);
  return all;
}

Tensor by_channel(const Tensor& mask, int64_t rank) {
  if (!mask.defined()) return {};
  const Tensor channels = mask.dim() == 2 ? mask : mask.movedim(2, 1).flatten(2).any(2);
  if (rank == 1) return channels;
  std::vector<int64_t> sizes(rank + 1, 1);
  sizes[0] = mask.size(0);
  sizes[2] = channels.size(1);
  return channels.reshape(sizes);
}

// With statistics that are constants, each element for itself.
Tensor batch_norm(const DependenceCall& call, const Tensor& like, size_t result) {
  const c10::IValue* training = call.find("training");
  if (training == nullptr) training = call.find("train");
  const bool constant = training != nullptr && !training->toBool();
  if (constant && like.numel() == 0) return {};
  Tensor all;
  for (const Tensor& t : call.tensors()) {
    const Tensor mask = call.mask(t);
    const bool each = constant && t.dim() == like.dim() && result == 0 && t.dim() > 1;
    all = either(all, each ? mask : by_channel(mask, like.dim()));
  }
  return all;
}

// --- pooling by maxima ---------------------------------------------------------------------------

std::vector<int64_t> ints(const DependenceCall& call, const char* name) {
  return call.find(name)->toIntVector();
}

// The largest of zeros and ones is any of them. Examples and channels of all inputs are one batch.
template <auto Pool, int kSpatial>
Tensor max_pool(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor mask = call.mask("self").to(at::kFloat);
  std::vector<int64_t> sizes{-1, 1};
  const auto image = mask.sizes().slice(mask.dim() - kSpatial);
  sizes.insert(sizes.end(), image.begin(), image.end());
  const Tensor pooled = std::get<0>(Pool(mask.reshape(sizes), ints(call, "kernel_size"),
                                         ints(call, "stride"), ints(call, "padding"),
                                         ints(call, "dilation"), call.find("ceil_mode")->toBool()));
  std::vector<int64_t> shown{call.inputs()};
  shown.insert(shown.end(), like.sizes().begin(), like.sizes().end());
  return pooled.reshape(shown).ne(0);
}

// Each pixel on all of its image.
template <int kSpatial>
Tensor by_image(const DependenceCall& call, const Tensor& /*like*/, size_t /*result*/) {
  std::vector<int64_t> dims(kSpatial);
  std::iota(dims.begin(), dims.end(), -kSpatial);
  const Tensor gradient = call.tensor("grad_output");
  return any_along(call.mask(gradient.defined() ? gradient : call.tensor("self")), dims);
}

// --- losses over classes -------------------------------------------------------------------------

Tensor nll_loss(const DependenceCall& call, const Tensor& like, size_t result) {
  const bool each = call.integer("reduction", 1) == 0 && result == 0;
  const Tensor self = call.tensor("self");
  if (!each || self.dim() < 2 || call.unknown(call.tensor("weight"))) {
    return dense(call, like, result);
  }
  const Tensor any = any_along(call.mask(self), {1});
  return any.defined() ? any.squeeze(2) : any;
}

// Linear in grad_output, times constants.
Tensor nll_loss_backward(const DependenceCall& call, const Tensor& like, size_t result) {
  if (call.unknown(call.tensor("weight"))) return dense(call, like, result);
  const Tensor mask = call.mask("grad_output");
  if (!mask.defined()) return {};
  return mask.dim() == like.dim() && like.dim() > 1 ? mask.unsqueeze(2) : align(mask, like.dim());
}

}  // namespace

const DependenceRows& layer_dependence() {
  using Kind = DependenceKind;
  static const auto* rows = new DependenceRows{
      {"native_layer_norm", Kind::kRule, &layer_norm},
      {"native_layer_norm_backward", Kind::kRule, &layer_norm_backward},
      {"native_group_norm", Kind::kRule, &by_example},
      {"native_batch_norm", Kind::kRule, &batch_norm},
      {"_native_batch_norm_legit_no_training", Kind::kRule, &dense},
      {"native_batch_norm_backward", Kind::kRule, &batch_norm},
      {"max_pool2d_with_indices", Kind::kRule, &max_pool<&at::max_pool2d_with_indices, 2>},
      {"max_pool3d_with_indices", Kind::kRule, &max_pool<&at::max_pool3d_with_indices, 3>},
      {"max_pool2d_with_indices_backward", Kind::kRule, &by_image<2>},
      {"max_pool3d_with_indices_backward", Kind::kRule, &by_image<3>},
      {"adaptive_max_pool2d", Kind::kRule, &by_image<2>},
      {"adaptive_max_pool3d", Kind::kRule, &by_image<3>},
      {"nll_loss_forward", Kind::kRule, &nll_loss},
      {"nll_loss2d_forward", Kind::kRule, &nll_loss},
      {"nll_loss_backward", Kind::kRule, &nll_loss_backward},
      {"nll_loss2d_backward", Kind::kRule, &nll_loss_backward},
  };
  return *rows;
}

}  // namespace torchlift
