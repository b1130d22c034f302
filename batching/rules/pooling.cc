// Pooling: the batch dim joins N, or is N where the user has none.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_adaptive_avg_pool2d_backward_ops.h>
#include <ATen/ops/_adaptive_avg_pool2d_ops.h>
#include <ATen/ops/_adaptive_avg_pool3d_backward_ops.h>
#include <ATen/ops/_adaptive_avg_pool3d_ops.h>
#include <ATen/ops/adaptive_max_pool2d_backward_ops.h>
#include <ATen/ops/adaptive_max_pool2d_ops.h>
#include <ATen/ops/adaptive_max_pool3d_backward_ops.h>
#include <ATen/ops/adaptive_max_pool3d_ops.h>
#include <ATen/ops/avg_pool2d_backward_ops.h>
#include <ATen/ops/avg_pool2d_ops.h>
#include <ATen/ops/avg_pool3d_backward_ops.h>
#include <ATen/ops/avg_pool3d_ops.h>
#include <ATen/ops/fractional_max_pool2d_backward_ops.h>
#include <ATen/ops/fractional_max_pool2d_ops.h>
#include <ATen/ops/fractional_max_pool3d_backward_ops.h>
#include <ATen/ops/fractional_max_pool3d_ops.h>
#include <ATen/ops/max_pool1d_ops.h>
#include <ATen/ops/max_pool1d_with_indices.h>
#include <ATen/ops/max_pool2d_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/max_pool2d_ops.h>
#include <ATen/ops/max_pool2d_with_indices_backward_ops.h>
#include <ATen/ops/max_pool2d_with_indices_ops.h>
#include <ATen/ops/max_pool3d_with_indices_backward_ops.h>
#include <ATen/ops/max_pool3d_with_indices_ops.h>
#include <ATen/ops/max_unpool2d_ops.h>
#include <ATen/ops/max_unpool3d_ops.h>

#include <tuple>
#include <vector>

#include "batching/rules/fold.h"
#include "core/dispatch.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// libtorch's own decomposition reads the data of tensors that need no gradient.
at::Tensor max_pool1d(const at::Tensor& self, at::IntArrayRef kernel_size, at::IntArrayRef stride,
                      at::IntArrayRef padding, at::IntArrayRef dilation, bool ceil_mode) {
  return std::get<0>(
      at::max_pool1d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode));
}

// The windows of a fractional pool start where its random samples, N x C x dims, say; without N
// they are 1 x C x dims.
template <class Op, int64_t Rank>
std::tuple<Batched, Batched> fractional_pool(const Level& level, BatchedArg self,
                                             at::IntArrayRef kernel_size,
                                             at::IntArrayRef output_size, BatchedArg samples) {
  const bool has_n = self.logical_dim() == Rank;
  TORCH_CHECK((has_n || self.logical_dim() == Rank - 1) && samples.logical_dim() == 3, "[vmap] ",
              Op::name, ": expected a tensor of ", Rank - 1, " or ", Rank,
              " dimensions and samples of 3, but got shapes ", at::IntArrayRef(logical_sizes(self)),
              " and ", at::IntArrayRef(logical_sizes(samples)));
  const int64_t size = level.size();
  const int64_t n = has_n ? logical_sizes(self)[0] : 1;
  const at::Tensor x = expanded(self, size);
  const at::Tensor starts = expanded(samples, size).narrow(1, 0, n).flatten(0, 1);
  const auto [out, indices] =
      Op::call(has_n ? x.flatten(0, 1) : x, kernel_size, output_size, starts.contiguous());
  const auto apart = [&](const at::Tensor& t) {
    return Batched{has_n ? t.unflatten(0, at::IntArrayRef({size, n})) : t, 0};
  };
  return {apart(out), apart(indices)};
}

[[maybe_unused]] const RuleSet kFractional{
    rule<ops::fractional_max_pool2d, &fractional_pool<ops::fractional_max_pool2d, 4>>(),
    rule<ops::fractional_max_pool3d, &fractional_pool<ops::fractional_max_pool3d, 5>>(),
    fold_row<ops::fractional_max_pool2d_backward, 4>(),
    fold_row<ops::fractional_max_pool3d_backward, 5>(),
};

// NOTE [planes as channels]
// A max pool works on each plane (the last two dims) by itself. libtorch's kernel for contiguous
// tensors on CPU takes number after number; that for channels last takes vectors of channels. As
// all leading dims, the batch dim too, are planes alike, any 32 planes that follow each other in
// memory can be taken for the channels of one image. On float tensors of CNNs (26 x 26 and 11 x 11,
// windows of 2 and 3) that is 2.4 to 4 times as fast, the copies to and from that layout included,
// from about 8,000 numbers on; results and indices are the same. Where operators are written down,
// the layout is not chosen here: compile/passes/channels_last.h does, for the whole graph.
constexpr int64_t kWorthCopies = 8192;
constexpr int64_t kVectorBytes = 128;

// How many planes to take at a time: 8, 16 or 32; 0 where the kernel is better called as it is.
int64_t planes_at_a_time(const at::Tensor& x) {
  const bool taken = x.is_cpu() && x.is_contiguous() && x.numel() >= kWorthCopies &&
                     (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble);
  if (!taken || is_lifted(x) || is_tracked(x)) return 0;
  const int64_t planes = x.numel() / (x.size(-1) * x.size(-2));
  int64_t count = kVectorBytes / static_cast<int64_t>(x.element_size());
  while (count >= 8 && planes % count != 0) count /= 2;
  return count >= 8 ? count : 0;
}

std::tuple<Batched, Batched> max_pool2d(const Level& level, BatchedArg self,
                                        at::IntArrayRef kernel_size, at::IntArrayRef stride,
                                        at::IntArrayRef padding, at::IntArrayRef dilation,
                                        bool ceil_mode) {
  using Op = ops::max_pool2d_with_indices;
  const at::Tensor& x = self.value;
  const bool known_rank = self.logical_dim() == 3 || self.logical_dim() == 4;
  const bool leads = self.bdim < x.dim() - 2;
  const int64_t channels = known_rank && leads ? planes_at_a_time(x) : 0;
  if (channels == 0) {
    return fold_internal::Planes<Op, 4>()(level, self, kernel_size, stride, padding, dilation,
                                          ceil_mode);
  }
  const auto [out, indices] = Op::call(
      x.view({-1, channels, x.size(-2), x.size(-1)}).contiguous(c10::MemoryFormat::ChannelsLast),
      kernel_size, stride, padding, dilation, ceil_mode);
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.end()[-2] = out.size(-2);
  sizes.end()[-1] = out.size(-1);
  return {{out.contiguous().view(sizes), self.bdim}, {indices.contiguous().view(sizes), self.bdim}};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::max_pool2d_with_indices, &max_pool2d>(),
    planes_of_shape_row<ops::max_pool2d_with_indices_backward, 4>(),
    planes_row<ops::max_pool3d_with_indices, 5>(),
    planes_of_shape_row<ops::max_pool3d_with_indices_backward, 5>(),
    planes_row<ops::avg_pool2d, 4>(),
    planes_of_shape_row<ops::avg_pool2d_backward, 4>(),
    planes_row<ops::avg_pool3d, 5>(),
    planes_of_shape_row<ops::avg_pool3d_backward, 5>(),
    planes_row<ops::_adaptive_avg_pool2d, 4>(),
    planes_of_shape_row<ops::_adaptive_avg_pool2d_backward, 4>(),
    planes_row<ops::_adaptive_avg_pool3d, 5>(),
    planes_of_shape_row<ops::_adaptive_avg_pool3d_backward, 5>(),
    planes_row<ops::adaptive_max_pool2d, 4>(),
    planes_of_shape_row<ops::adaptive_max_pool2d_backward, 4>(),
    planes_row<ops::adaptive_max_pool3d, 5>(),
    planes_of_shape_row<ops::adaptive_max_pool3d_backward, 5>(),
    planes_row<ops::max_unpool2d, 4>(),
    planes_row<ops::max_unpool3d, 5>(),
    composite<ops::max_pool1d, &max_pool1d>(),
    composite<ops::max_pool2d, &at::compositeimplicitautograd::max_pool2d>(),
};

}  // namespace
}  // namespace torchlift
