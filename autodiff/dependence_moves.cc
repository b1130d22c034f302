// Operators that move elements about, or add them up with positive weights.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros.h>

#include "autodiff/dependence_rules.h"

namespace torchlift {
namespace {

using at::Tensor;

// As far as `like` goes, and no further; with nothing where it goes beyond the mask. Not along dim.
Tensor fit(const Tensor& mask, const Tensor& like, int64_t dim) {
  Tensor result = mask;
  for (int64_t d = 0; d < like.dim(); ++d) {
    if (d == dim) continue;
    const int64_t size = like.size(d), given = result.size(d + 1);
    if (given > size) result = result.narrow(d + 1, 0, size);
    if (given == size || given > size) continue;
    std::vector<int64_t> sizes = result.sizes().vec();
    sizes[d + 1] = size;
    const Tensor wider = at::zeros(sizes, result.options());
    wider.narrow(d + 1, 0, given).copy_(result);
    result = wider;
  }
  return result;
}

// With unknown indices along dim: any of those that could be meant.
Tensor any_index(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  int64_t dim = call.integer("dim", 0);
  if (dim < 0) dim += like.dim();
  if (like.dim() == 0) return dense(call, like, 0);
  const bool reads = call.op().schema().name() == "aten::gather" ||
                     call.op().schema().name() == "aten::index_select";
  Tensor all;
  for (const Tensor& t : call.tensors()) {
    const Tensor mask = align(call.mask(t), like.dim());
    if (!mask.defined()) continue;
    const bool stays = !reads && t.is_same(call.tensor("self"));
    all = either(all, stays ? mask : fit(any_along(mask, {dim}), like, dim));
  }
  return all;
}

// An unknown place may get any of the values.
Tensor any_place(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const char* values = call.find("values") != nullptr ? "values" : "source";
  return either(align(call.mask("self"), like.dim()), any_element(call.mask(values), like.dim()));
}

}  // namespace

const DependenceRows& move_dependence() {
  using Kind = DependenceKind;
  static const auto* rows = [] {
    auto* all = new DependenceRows{
        {"gather", Kind::kMoves, &any_index},
        {"index_select", Kind::kMoves, &any_index},
        {"scatter", Kind::kMoves, &any_index},
        {"scatter_add", Kind::kAdds, &any_index},
        {"index_add", Kind::kAdds, &any_index},
        {"index_copy", Kind::kMoves, &any_index},
        {"index_put", Kind::kAdds, &any_place},
        {"_unsafe_index_put", Kind::kAdds, &any_place},
        {"put", Kind::kAdds, &any_place},
        {"masked_fill", Kind::kMoves, &any_of_all},
        {"masked_scatter", Kind::kMoves, &any_place},
        // These multiply, or choose by size.
        {"scatter.reduce", Kind::kRule, &any_index},
        {"scatter.value_reduce", Kind::kRule, &any_index},
        {"scatter_reduce", Kind::kRule, &any_index},
        {"index_reduce", Kind::kRule, &any_index},
        {"avg_pool2d_backward", Kind::kAdds, nullptr, {"grad_output"}},
        {"avg_pool3d_backward", Kind::kAdds, nullptr, {"grad_output"}},
        {"_adaptive_avg_pool2d_backward", Kind::kAdds, nullptr, {"grad_output"}},
        {"_adaptive_avg_pool3d_backward", Kind::kAdds, nullptr, {"grad_output"}},
    };
    for (const char* name : {"_unsafe_view",
                             "_reshape_copy",
                             "_unsafe_index",
                             "_stack",
                             "alias_copy",
                             "as_strided_copy",
                             "as_strided_scatter",
                             "block_diag",
                             "cat",
                             "channel_shuffle",
                             "constant_pad_nd",
                             "diag_embed",
                             "diagonal_backward",
                             "diagonal_copy",
                             "diagonal_scatter",
                             "embedding",
                             "expand_copy",
                             "flip",
                             "im2col",
                             "index",
                             "index_fill",
                             "masked_select",
                             "narrow_copy",
                             "permute_copy",
                             "pixel_shuffle",
                             "pixel_unshuffle",
                             "reflection_pad1d",
                             "reflection_pad2d",
                             "reflection_pad3d",
                             "repeat",
                             "replication_pad1d",
                             "replication_pad2d",
                             "replication_pad3d",
                             "roll",
                             "rot90",
                             "select_backward",
                             "select_copy",
                             "select_scatter",
                             "slice_backward",
                             "slice_copy",
                             "slice_scatter",
                             "split_copy",
                             "split_with_sizes_copy",
                             "squeeze_copy",
                             "stack",
                             "t_copy",
                             "take",
                             "transpose_copy",
                             "tril",
                             "triu",
                             "unbind_copy",
                             "unfold_copy",
                             "unsafe_split",
                             "unsafe_split_with_sizes",
                             "unsqueeze_copy",
                             "upsample_nearest1d",
                             "upsample_nearest2d",
                             "upsample_nearest3d",
                             "_upsample_nearest_exact1d",
                             "_upsample_nearest_exact2d",
                             "_upsample_nearest_exact3d",
                             "view_copy"}) {
      all->push_back({name, Kind::kMoves});
    }
    for (const char* name : {"trace",
                             "col2im",
                             "unfold_backward",
                             "embedding_dense_backward",
                             "avg_pool1d",
                             "avg_pool2d",
                             "avg_pool3d",
                             "adaptive_avg_pool1d",
                             "_adaptive_avg_pool2d",
                             "_adaptive_avg_pool3d",
                             "upsample_linear1d",
                             "upsample_bilinear2d",
                             "upsample_trilinear3d",
                             "upsample_linear1d_backward",
                             "upsample_bilinear2d_backward",
                             "upsample_trilinear3d_backward",
                             "upsample_nearest1d_backward",
                             "upsample_nearest2d_backward",
                             "upsample_nearest3d_backward",
                             "_upsample_nearest_exact1d_backward",
                             "_upsample_nearest_exact2d_backward",
                             "_upsample_nearest_exact3d_backward"}) {
      all->push_back({name, Kind::kAdds});
    }
    for (const char* name : {"reflection_pad1d_backward", "reflection_pad2d_backward",
                             "reflection_pad3d_backward", "replication_pad1d_backward",
                             "replication_pad2d_backward", "replication_pad3d_backward"}) {
      all->push_back({name, Kind::kAdds, nullptr, {"grad_output"}});
    }
    return all;
  }();
  return *rows;
}

}  // namespace torchlift
