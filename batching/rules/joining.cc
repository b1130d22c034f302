// Tensors put together: cat, stack, block_diag.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_chunk_cat_ops.h>
#include <ATen/ops/block_diag_ops.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cat_ops.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/stack_ops.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// The batch dim of all, if they have the same one and the same rank.
std::optional<int64_t> common_bdim(const std::vector<Batched>& list) {
  for (const Batched& each : list) {
    if (each.bdim != list[0].bdim || each.value.dim() != list[0].value.dim()) return std::nullopt;
  }
  return list[0].bdim;
}

std::vector<at::Tensor> values_of(const std::vector<Batched>& list) {
  std::vector<at::Tensor> values;
  values.reserve(list.size());
  for (const Batched& each : list) values.push_back(each.value);
  return values;
}

std::vector<at::Tensor> all_expanded(const std::vector<Batched>& list, int64_t batch_size) {
  std::vector<at::Tensor> values;
  values.reserve(list.size());
  for (const Batched& each : list) values.push_back(expanded(as_arg(each), batch_size));
  return values;
}

// cat skips tensors of shape [0] among others of any rank, for old programs' sake.
bool is_skipped(const Batched& each) {
  const auto sizes = logical_sizes(as_arg(each));
  return sizes.size() == 1 && sizes[0] == 0;
}

std::vector<Batched> without_skipped(const std::vector<Batched>& list) {
  std::vector<Batched> kept;
  for (const Batched& each : list) {
    if (!is_skipped(each)) kept.push_back(each);
  }
  return kept.empty() ? list : kept;
}

Batched cat_rule(const Level& level, const std::vector<Batched>& tensors, int64_t dim) {
  for (const Batched& each : tensors) {
    TORCH_CHECK(as_arg(each).logical_dim() > 0, "zero-dimensional tensor (at position ",
                &each - tensors.data(), ") cannot be concatenated");
  }
  if (const auto bdim = common_bdim(tensors)) {
    return {at::cat(values_of(tensors), physical_dim(as_arg(tensors[0]), dim)), bdim};
  }
  const std::vector<Batched> kept = without_skipped(tensors);
  const int64_t at = wrap_dim(dim, as_arg(kept[0]).logical_dim()) + 1;
  return {at::cat(all_expanded(kept, level.size()), at), 0};
}

Batched stack_rule(const Level& level, const std::vector<Batched>& tensors, int64_t dim) {
  const int64_t at = wrap_dim(dim, as_arg(tensors[0]).logical_dim() + 1);
  if (const auto bdim = common_bdim(tensors)) {
    const bool before = at < *bdim;
    return {at::stack(values_of(tensors), before ? at : at + 1), before ? *bdim + 1 : *bdim};
  }
  return {at::stack(all_expanded(tensors, level.size()), at + 1), 0};
}

// Every block padded to the whole width, one below the other. (libtorch's writes into plain zeros.)
at::Tensor block_diag(at::TensorList tensors) {
  std::vector<at::Tensor> blocks;
  int64_t width = 0;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK(t.dim() <= 2,
                "torch.block_diag: Input tensors must have 2 or fewer dimensions. Input ",
                blocks.size(), " has ", t.dim(), " dimensions");
    blocks.push_back(t.dim() == 2   ? t
                     : t.dim() == 1 ? t.unsqueeze(0)
                                    : t.unsqueeze(0).unsqueeze(0));
    width += blocks.back().size(1);
  }
  int64_t left = 0;
  for (at::Tensor& block : blocks) {
    const int64_t columns = block.size(1);
    block = at::constant_pad_nd(block, {left, width - left - columns}, 0);
    left += columns;
  }
  return at::cat(blocks, 0);
}

// Every tensor cut into num_chunks along dim, padded so that they are equal, and flattened from
// there on; the chunks of the same number side by side.
at::Tensor chunk_cat(at::TensorList tensors, int64_t dim, int64_t num_chunks) {
  TORCH_CHECK(num_chunks >= 1, "_chunk_cat expects positive num_chunks");
  TORCH_CHECK(!tensors.empty(), "_chunk_cat expects a non-empty input tensor list");
  dim = wrap_dim(dim, tensors[0].dim());
  std::vector<at::Tensor> chunks;
  for (const at::Tensor& t : tensors) {
    TORCH_CHECK(t.dim() > dim && t.sizes().slice(0, dim) == tensors[0].sizes().slice(0, dim),
                "_chunk_cat expects same sizes of 0,...,dim-1 dimensions for all tensors");
    const int64_t missing = (num_chunks - t.size(dim) % num_chunks) % num_chunks;
    std::vector<int64_t> pad(2 * (t.dim() - dim), 0);
    pad.back() = missing;
    const at::Tensor padded = missing == 0 ? t : at::constant_pad_nd(t, pad, 0);
    std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().begin() + dim);
    sizes.push_back(num_chunks);
    sizes.push_back(padded.numel() == 0 ? 0 : -1);
    chunks.push_back(padded.reshape(sizes));
  }
  return at::cat(chunks, dim + 1);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::cat, &cat_rule>(),
    rule<ops::stack, &stack_rule>(),
    composite<ops::block_diag, &block_diag>(),
    composite<ops::_chunk_cat, &chunk_cat>(),
};

}  // namespace
}  // namespace torchlift
