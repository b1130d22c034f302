// Resampling: upsample, grid_sample, im2col and their gradients. The batch dim joins N.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_upsample_bicubic2d_aa_backward_ops.h>
#include <ATen/ops/_upsample_bicubic2d_aa_ops.h>
#include <ATen/ops/_upsample_bilinear2d_aa_backward_ops.h>
#include <ATen/ops/_upsample_bilinear2d_aa_ops.h>
#include <ATen/ops/_upsample_nearest_exact1d_backward_ops.h>
#include <ATen/ops/_upsample_nearest_exact1d_ops.h>
#include <ATen/ops/_upsample_nearest_exact2d_backward_ops.h>
#include <ATen/ops/_upsample_nearest_exact2d_ops.h>
#include <ATen/ops/_upsample_nearest_exact3d_backward_ops.h>
#include <ATen/ops/_upsample_nearest_exact3d_ops.h>
#include <ATen/ops/affine_grid_generator_ops.h>
#include <ATen/ops/col2im_ops.h>
#include <ATen/ops/grid_sampler_2d_backward_ops.h>
#include <ATen/ops/grid_sampler_2d_ops.h>
#include <ATen/ops/grid_sampler_3d_backward_ops.h>
#include <ATen/ops/grid_sampler_3d_ops.h>
#include <ATen/ops/im2col_ops.h>
#include <ATen/ops/upsample_bicubic2d_backward_ops.h>
#include <ATen/ops/upsample_bicubic2d_ops.h>
#include <ATen/ops/upsample_bilinear2d_backward_ops.h>
#include <ATen/ops/upsample_bilinear2d_ops.h>
#include <ATen/ops/upsample_linear1d_backward_ops.h>
#include <ATen/ops/upsample_linear1d_ops.h>
#include <ATen/ops/upsample_nearest1d_backward_ops.h>
#include <ATen/ops/upsample_nearest1d_ops.h>
#include <ATen/ops/upsample_nearest2d_backward_ops.h>
#include <ATen/ops/upsample_nearest2d_ops.h>
#include <ATen/ops/upsample_nearest3d_backward_ops.h>
#include <ATen/ops/upsample_nearest3d_ops.h>
#include <ATen/ops/upsample_trilinear3d_backward_ops.h>
#include <ATen/ops/upsample_trilinear3d_ops.h>

#include "batching/rules/fold.h"
#include "core/registry.h"

// Lanczos resampling is younger than torch 2.11.
#if __has_include(<ATen/ops/_upsample_lanczos2d_aa_ops.h>)
#define TORCHLIFT_HAS_LANCZOS 1
#include <ATen/ops/_upsample_lanczos2d_aa_backward_ops.h>
#include <ATen/ops/_upsample_lanczos2d_aa_ops.h>
#else
#define TORCHLIFT_HAS_LANCZOS 0
#endif

namespace torchlift {
namespace {

namespace ops = at::_ops;

// The gradients are told the size of the input, N included.
template <class Op, class... Rest>
Batched upsample_backward(const Level& level, BatchedArg grad, at::IntArrayRef output_size,
                          at::IntArrayRef input_size, Rest... rest) {
  TORCH_CHECK(grad.logical_dim() == static_cast<int64_t>(input_size.size()), "[vmap] ", Op::name,
              ": expected a gradient of ", input_size.size(), " dimensions, but got shape ",
              at::IntArrayRef(logical_sizes(grad)));
  const at::Tensor folded = batch_first(grad).flatten(0, 1);
  std::vector<int64_t> size = input_size.vec();
  size[0] *= level.size();
  const at::Tensor out = Op::call(folded, c10::fromIntArrayRefSlow(output_size),
                                  c10::fromIntArrayRefSlow(size), rest...);
  return {out.unflatten(0, at::IntArrayRef{level.size(), input_size[0]}), 0};
}

template <class Op, class Schema = typename Op::schema>
struct Backward;

template <class Op, class... Rest>
struct Backward<Op,
                at::Tensor(const at::Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef, Rest...)> {
  static RuleEntry row() { return rule<Op, &upsample_backward<Op, Rest...>>(); }
};

Batched affine_grid_rule(const Level& level, BatchedArg theta, at::IntArrayRef size,
                         bool align_corners) {
  TORCH_CHECK(theta.logical_dim() == 3 && !size.empty() && logical_sizes(theta)[0] == size[0],
              "[vmap] affine_grid_generator: expected theta [N, ...] for size [N, ...], but got ",
              at::IntArrayRef(logical_sizes(theta)), " and ", size);
  std::vector<int64_t> all = size.vec();
  all[0] *= level.size();
  const at::Tensor out = ops::affine_grid_generator::call(
      batch_first(theta).flatten(0, 1), c10::fromIntArrayRefSlow(all), align_corners);
  return {out.unflatten(0, at::IntArrayRef{level.size(), size[0]}), 0};
}

[[maybe_unused]] const RuleSet kUpsample{
    fold_row<ops::upsample_nearest1d, 3>(),
    fold_row<ops::upsample_nearest2d, 4>(),
    fold_row<ops::upsample_nearest3d, 5>(),
    fold_row<ops::_upsample_nearest_exact1d, 3>(),
    fold_row<ops::_upsample_nearest_exact2d, 4>(),
    fold_row<ops::_upsample_nearest_exact3d, 5>(),
    fold_row<ops::upsample_linear1d, 3>(),
    fold_row<ops::upsample_bilinear2d, 4>(),
    fold_row<ops::upsample_bicubic2d, 4>(),
    fold_row<ops::upsample_trilinear3d, 5>(),
    fold_row<ops::_upsample_bilinear2d_aa, 4>(),
    fold_row<ops::_upsample_bicubic2d_aa, 4>(),
    Backward<ops::upsample_nearest1d_backward>::row(),
    Backward<ops::upsample_nearest2d_backward>::row(),
    Backward<ops::upsample_nearest3d_backward>::row(),
    Backward<ops::_upsample_nearest_exact1d_backward>::row(),
    Backward<ops::_upsample_nearest_exact2d_backward>::row(),
    Backward<ops::_upsample_nearest_exact3d_backward>::row(),
    Backward<ops::upsample_linear1d_backward>::row(),
    Backward<ops::upsample_bilinear2d_backward>::row(),
    Backward<ops::upsample_bicubic2d_backward>::row(),
    Backward<ops::upsample_trilinear3d_backward>::row(),
    Backward<ops::_upsample_bilinear2d_aa_backward>::row(),
    Backward<ops::_upsample_bicubic2d_aa_backward>::row(),
};

#if TORCHLIFT_HAS_LANCZOS
[[maybe_unused]] const RuleSet kLanczos{
    fold_row<ops::_upsample_lanczos2d_aa, 4>(),
    Backward<ops::_upsample_lanczos2d_aa_backward>::row(),
};
#endif

[[maybe_unused]] const RuleSet kSampling{
    fold_row<ops::grid_sampler_2d, 4>(),
    fold_row<ops::grid_sampler_2d_backward, 4>(),
    fold_row<ops::grid_sampler_3d, 5>(),
    fold_row<ops::grid_sampler_3d_backward, 5>(),
    fold_row<ops::im2col, 4>(),
    fold_row<ops::col2im, 3>(),
    rule<ops::affine_grid_generator, &affine_grid_rule>(),
};

}  // namespace
}  // namespace torchlift
