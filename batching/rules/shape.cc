// Operators that move, repeat or pad elements: flip, roll, repeat, tril, diag_embed, pads,
// shuffles.

#include <ATen/core/Tensor.h>
#include <ATen/ops/channel_shuffle.h>
#include <ATen/ops/channel_shuffle_ops.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/constant_pad_nd_ops.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/diag_embed_ops.h>
#include <ATen/ops/flip_ops.h>
#include <ATen/ops/pixel_shuffle.h>
#include <ATen/ops/pixel_shuffle_ops.h>
#include <ATen/ops/pixel_unshuffle.h>
#include <ATen/ops/pixel_unshuffle_ops.h>
#include <ATen/ops/reflection_pad1d_backward_ops.h>
#include <ATen/ops/reflection_pad1d_ops.h>
#include <ATen/ops/reflection_pad2d_backward_ops.h>
#include <ATen/ops/reflection_pad2d_ops.h>
#include <ATen/ops/reflection_pad3d_backward_ops.h>
#include <ATen/ops/reflection_pad3d_ops.h>
#include <ATen/ops/repeat_ops.h>
#include <ATen/ops/replication_pad1d_backward_ops.h>
#include <ATen/ops/replication_pad1d_ops.h>
#include <ATen/ops/replication_pad2d_backward_ops.h>
#include <ATen/ops/replication_pad2d_ops.h>
#include <ATen/ops/replication_pad3d_backward_ops.h>
#include <ATen/ops/replication_pad3d_ops.h>
#include <ATen/ops/roll_ops.h>
#include <ATen/ops/rot90_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/rot90_ops.h>
#include <ATen/ops/tril_ops.h>
#include <ATen/ops/triu_ops.h>

#include <array>
#include <tuple>
#include <vector>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- order and repetition ----------------------------------------------------------------------

Batched flip_rule(BatchedArg self, at::IntArrayRef dims) {
  if (self.logical_dim() == 0) {
    for (const int64_t dim : dims) wrap_dim(dim, 0);
    return {self.value.clone(), self.bdim};
  }
  c10::SmallVector<int64_t, 6> physical;
  for (const int64_t dim : dims) physical.push_back(physical_dim(self, dim));
  return {self.value.flip(physical), self.bdim};
}

Batched roll_rule(BatchedArg self, at::IntArrayRef shifts, at::IntArrayRef dims) {
  if (dims.empty()) {  // over all elements of an example
    const at::Tensor rows = batch_first(self);
    const at::Tensor flat = rows.dim() == 1 ? rows.unsqueeze(1) : rows.flatten(1);
    return {flat.roll(shifts, 1).view(rows.sizes()), 0};
  }
  TORCH_CHECK_INDEX(self.logical_dim() > 0, "roll: a 0-dim tensor has no dimension ", dims[0]);
  c10::SmallVector<int64_t, 6> physical;
  for (const int64_t dim : dims) physical.push_back(physical_dim(self, dim));
  return {self.value.roll(shifts, physical), self.bdim};
}

//   self [B, s...] -> [B, 1..., s...], repeats [r...] -> [1, r...]
Batched repeat_rule(BatchedArg self, at::IntArrayRef repeats) {
  const auto rank = static_cast<int64_t>(repeats.size());
  TORCH_CHECK(rank >= self.logical_dim(),
              "Number of dimensions of repeat dims can not be smaller than ",
              "number of dimensions of tensor");
  c10::SmallVector<int64_t, 6> all{1};
  all.append(repeats.begin(), repeats.end());
  return {aligned(self, rank).repeat(all), 0};
}

// --- matrices ----------------------------------------------------------------------------------

// The value with the matrix dims last, and its batch dim.
Batched matrices(BatchedArg self, const char* name) {
  TORCH_CHECK(self.logical_dim() >= 2, name, ": input tensor must have at least 2 dimensions");
  if (*self.bdim < self.value.dim() - 2) return {self.value, self.bdim};
  return {batch_first(self), 0};
}

template <class Op>
Batched triangle_rule(BatchedArg self, int64_t diagonal) {
  const Batched m = matrices(self, Op::name);
  return {Op::call(m.value, diagonal), m.bdim};
}

template <class Op>
void triangle__rule(BatchedArg self, int64_t diagonal) {
  Batched m = matrices(self, Op::name);
  Op::call(m.value, diagonal);
}

Batched diag_embed_rule(BatchedArg self, int64_t offset, int64_t dim1, int64_t dim2) {
  TORCH_CHECK(self.logical_dim() > 0, "diag_embed cannot be applied to a 0-dim tensor.");
  const int64_t rank = self.logical_dim() + 1;
  return {
      at::diag_embed(batch_first(self), offset, wrap_dim(dim1, rank) + 1, wrap_dim(dim2, rank) + 1),
      0};
}

// --- pads --------------------------------------------------------------------------------------

Batched constant_pad_rule(BatchedArg self, at::IntArrayRef pad, const at::Scalar& value) {
  const auto padded = static_cast<int64_t>(pad.size()) / 2;
  TORCH_CHECK(padded <= self.logical_dim(),
              "Length of pad should be no more than twice the number of ",
              "dimensions of the input. Pad length is ", pad.size(), " while the input has ",
              self.logical_dim(), " dimensions.");
  const bool in_front = *self.bdim < self.value.dim() - padded;
  return {at::constant_pad_nd(in_front ? self.value : batch_first(self), pad, value),
          in_front ? *self.bdim : 0};
}

// An operator over [N, C, spatial...] or [C, spatial...]: the batch becomes N, or a part of it.
//   [B, C, S...] as it is;  [B, N, C, S...] -> [B*N, C, S...] -> [B, N, C, S'...]
template <class F, class... Args>
Batched as_images(int64_t spatial, int64_t batch_size, F f, const Args&... args) {
  const auto too_many = [&](const at::Tensor& t) { return t.dim() - spatial == 3; };
  const std::array<at::Tensor, sizeof...(Args)> rows{expanded(args, batch_size)...};
  if (!too_many(rows[0])) return {std::apply(f, rows), 0};
  const int64_t images = rows[0].size(1);
  std::array<at::Tensor, sizeof...(Args)> merged;
  for (size_t i = 0; i < rows.size(); ++i) merged[i] = rows[i].flatten(0, 1);
  const at::Tensor result = std::apply(f, merged);
  return {result.unflatten(0, at::IntArrayRef({batch_size, images})), 0};
}

template <class Op, int64_t kSpatial>
Batched pad_rule(const Level& level, BatchedArg self, at::IntArrayRef padding) {
  TORCH_CHECK(self.logical_dim() == kSpatial + 1 || self.logical_dim() == kSpatial + 2, Op::name,
              ": expected ", kSpatial + 1, "D or ", kSpatial + 2, "D input, but got ",
              self.logical_dim(), "D");
  const auto pad = [&](const at::Tensor& x) {
    return Op::call(x, c10::fromIntArrayRefSlow(padding));
  };
  return as_images(kSpatial, level.size(), pad, self);
}

template <class Op, int64_t kSpatial>
Batched pad_backward_rule(const Level& level, BatchedArg grad, BatchedArg self,
                          at::IntArrayRef padding) {
  const auto backward = [&](const at::Tensor& g, const at::Tensor& x) {
    return Op::call(g, x, c10::fromIntArrayRefSlow(padding));
  };
  return as_images(kSpatial, level.size(), backward, grad, self);
}

// --- shuffles ----------------------------------------------------------------------------------

void check_image(BatchedArg self, const char* name) {
  TORCH_CHECK(self.logical_dim() >= 3, name,
              " expects input to have at least 3 dimensions, but got input ", "with ",
              self.logical_dim(), " dimension(s)");
}

// [0, ..., C, H, W] in the shape that the operator would give: libtorch's leaves empty ones as they
// are.
at::Tensor empty_images(const at::Tensor& rows, int64_t channels, int64_t height, int64_t width) {
  c10::SmallVector<int64_t, 6> sizes(rows.sizes().begin(), rows.sizes().end() - 3);
  for (const int64_t size : {channels, height, width}) sizes.push_back(size);
  return rows.reshape(sizes);
}

Batched pixel_shuffle_rule(BatchedArg self, int64_t factor) {
  check_image(self, "pixel_shuffle");
  const at::Tensor rows = batch_first(self);
  if (rows.size(0) == 0) {
    return {empty_images(rows, rows.size(-3) / (factor * factor), rows.size(-2) * factor,
                         rows.size(-1) * factor),
            0};
  }
  return {at::pixel_shuffle(rows, factor), 0};
}

Batched pixel_unshuffle_rule(BatchedArg self, int64_t factor) {
  check_image(self, "pixel_unshuffle");
  const at::Tensor rows = batch_first(self);
  if (rows.size(0) == 0) {
    return {empty_images(rows, rows.size(-3) * factor * factor, rows.size(-2) / factor,
                         rows.size(-1) / factor),
            0};
  }
  return {at::pixel_unshuffle(rows, factor), 0};
}

//   [B, N, C, S...] -> [B*N, C, S...]
Batched channel_shuffle_rule(BatchedArg self, int64_t groups) {
  check_image(self, "channel_shuffle");
  const at::Tensor rows = batch_first(self);
  const at::Tensor result = at::channel_shuffle(rows.flatten(0, 1), groups);
  return {result.unflatten(0, rows.sizes().slice(0, 2)), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::flip, &flip_rule>(),
    rule<ops::roll, &roll_rule>(),
    composite<ops::rot90, &at::compositeexplicitautograd::rot90>(),
    rule<ops::repeat, &repeat_rule>(),
    rule<ops::tril, &triangle_rule<ops::tril>>(),
    rule<ops::triu, &triangle_rule<ops::triu>>(),
    rule<ops::tril_, &triangle__rule<ops::tril_>>(),
    rule<ops::triu_, &triangle__rule<ops::triu_>>(),
    rule<ops::diag_embed, &diag_embed_rule>(),
    rule<ops::constant_pad_nd, &constant_pad_rule>(),
    rule<ops::pixel_shuffle, &pixel_shuffle_rule>(),
    rule<ops::pixel_unshuffle, &pixel_unshuffle_rule>(),
    rule<ops::channel_shuffle, &channel_shuffle_rule>(),
};

template <class Op, class Backward, int64_t kSpatial>
std::vector<RuleEntry> pad_rows() {
  return {rule<Op, &pad_rule<Op, kSpatial>>(),
          rule<Backward, &pad_backward_rule<Backward, kSpatial>>()};
}

[[maybe_unused]] const RuleSet kPads[] = {
    RuleSet(pad_rows<ops::reflection_pad1d, ops::reflection_pad1d_backward, 1>()),
    RuleSet(pad_rows<ops::reflection_pad2d, ops::reflection_pad2d_backward, 2>()),
    RuleSet(pad_rows<ops::reflection_pad3d, ops::reflection_pad3d_backward, 3>()),
    RuleSet(pad_rows<ops::replication_pad1d, ops::replication_pad1d_backward, 1>()),
    RuleSet(pad_rows<ops::replication_pad2d, ops::replication_pad2d_backward, 2>()),
    RuleSet(pad_rows<ops::replication_pad3d, ops::replication_pad3d_backward, 3>()),
};

}  // namespace
}  // namespace torchlift
