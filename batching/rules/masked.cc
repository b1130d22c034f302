// masked_fill, masked_scatter, masked_select, take and put.

#include <ATen/core/Tensor.h>
#include <ATen/ops/masked_fill_ops.h>
#include <ATen/ops/masked_scatter_backward_ops.h>
#include <ATen/ops/masked_scatter_ops.h>
#include <ATen/ops/masked_select_ops.h>
#include <ATen/ops/put_ops.h>
#include <ATen/ops/take_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "batching/rules/dims.h"
#include "core/error.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// The sizes of an example that both broadcast to.
c10::SmallVector<int64_t, 6> common_sizes(const BatchedArg& a, const BatchedArg& b) {
  const auto left = logical_sizes(a);
  const auto right = logical_sizes(b);
  const size_t rank = std::max(left.size(), right.size());
  c10::SmallVector<int64_t, 6> sizes(rank, 1);
  for (size_t i = 0; i < rank; ++i) {
    const int64_t x = i < rank - left.size() ? 1 : left[i - (rank - left.size())];
    const int64_t y = i < rank - right.size() ? 1 : right[i - (rank - right.size())];
    TORCH_CHECK(x == y || x == 1 || y == 1, "The size of tensor a (", x,
                ") must match the size of tensor b (", y, ") at non-singleton dimension ", i);
    sizes[i] = x == 1 ? y : x;
  }
  return sizes;
}

// [B, numel] of an example expanded to `sizes`.
at::Tensor flat_rows(const BatchedArg& arg, at::IntArrayRef sizes, int64_t batch_size) {
  const auto rank = static_cast<int64_t>(sizes.size());
  c10::SmallVector<int64_t, 6> all{batch_size};
  all.append(sizes.begin(), sizes.end());
  at::Tensor rows = arg.bdim ? aligned(arg, rank) : arg.value;
  return rows.expand(all).reshape({batch_size, c10::multiply_integers(sizes)});
}

at::Tensor with_sizes(const at::Tensor& rows, at::IntArrayRef sizes) {
  c10::SmallVector<int64_t, 6> all{rows.size(0)};
  all.append(sizes.begin(), sizes.end());
  return rows.view(all);
}

int64_t numel_of(const BatchedArg& arg) { return c10::multiply_integers(logical_sizes(arg)); }

// --- masked_fill -------------------------------------------------------------------------------

// self and mask with their dims aligned, self with a batch dim.
struct Masked {
  at::Tensor self;
  at::Tensor mask;
  int64_t bdim;
};

Masked masked(BatchedArg self, BatchedArg mask) {
  const bool alike = self.bdim == mask.bdim && self.value.dim() == mask.value.dim();
  if (alike) return {self.value, mask.value, *self.bdim};
  const int64_t rank = std::max(self.logical_dim(), mask.logical_dim());
  return {aligned(self, rank), aligned(mask, rank), 0};
}

Batched masked_fill_scalar_rule(BatchedArg self, BatchedArg mask, const at::Scalar& value) {
  const Masked m = masked(self, mask);
  return {ops::masked_fill_Scalar::call(m.self, m.mask, value), m.bdim};
}

void check_fits(BatchedArg self, BatchedArg mask) {
  TORCH_CHECK(mask.logical_dim() <= self.logical_dim(), "masked_fill_: a mask of shape ",
              logical_sizes(mask), " cannot be broadcast to the target's, ", logical_sizes(self));
}

void masked_fill__scalar_rule(BatchedArg self, BatchedArg mask, const at::Scalar& value) {
  check_fits(self, mask);
  Masked m = masked(self, mask);
  ops::masked_fill__Scalar::call(m.self, m.mask, value);
}

void check_scalar(BatchedArg value) {
  TORCH_CHECK(value.logical_dim() == 0,
              "masked_fill_ only supports a 0-dimensional value tensor, but got tensor with ",
              value.logical_dim(), " dimension(s).");
}

// A value of each example is a where: [B] -> [B, 1...].
at::Tensor filled_with(BatchedArg self, BatchedArg mask, BatchedArg value) {
  const int64_t rank = std::max(self.logical_dim(), mask.logical_dim());
  const at::Tensor values = aligned(value, rank).to(self.value.scalar_type());
  return at::where(aligned(mask, rank), values, aligned(self, rank));
}

Batched masked_fill_tensor_rule(BatchedArg self, BatchedArg mask, BatchedArg value) {
  check_scalar(value);
  if (value.bdim) return {filled_with(self, mask, value), 0};
  const Masked m = masked(self, mask);
  return {ops::masked_fill_Tensor::call(m.self, m.mask, value.value), m.bdim};
}

void masked_fill__tensor_rule(BatchedArg self, BatchedArg mask, BatchedArg value) {
  check_scalar(value);
  check_fits(self, mask);
  if (value.bdim) {
    batch_first(self).copy_(filled_with(self, mask, value));
    return;
  }
  Masked m = masked(self, mask);
  ops::masked_fill__Tensor::call(m.self, m.mask, value.value);
}

// --- masked_scatter ----------------------------------------------------------------------------

// How many True elements come before each: the place in the source of what goes there. [B, n]
at::Tensor places_in_source(const at::Tensor& mask) {
  return mask.to(at::kLong).cumsum(1).sub(1).clamp_min(0);
}

// self, with the elements of source where the mask is True, in order:
//   result[b, k] = source[b, places[b, k]] where mask[b, k], else self[b, k]
at::Tensor scattered(const Level& level, BatchedArg self, BatchedArg mask, BatchedArg source,
                     at::IntArrayRef sizes) {
  const at::Tensor self_rows = flat_rows(self, sizes, level.size());
  const at::Tensor mask_rows = flat_rows(mask, sizes, level.size());
  TORCH_CHECK(mask.value.scalar_type() == at::kBool,
              "masked_scatter_ only supports boolean masks, ", "but got mask with dtype ",
              mask.value.scalar_type());
  TORCH_CHECK(self.value.scalar_type() == source.value.scalar_type(),
              "masked_scatter: expected self and source to have same dtypes but got ",
              self.value.scalar_type(), " and ", source.value.scalar_type());
  const at::Tensor source_rows =
      expanded(source, level.size()).reshape({level.size(), numel_of(source)});
  // Nothing to take: right if the mask is False everywhere, which the operator finds out.
  if (numel_of(source) == 0 && self_rows.numel() > 0) {
    return with_sizes(self_rows.masked_scatter(mask_rows, source_rows), sizes);
  }
  const at::Tensor taken = source_rows.gather(1, places_in_source(mask_rows));
  return with_sizes(at::where(mask_rows, taken, self_rows), sizes);
}

Batched masked_scatter_rule(const Level& level, BatchedArg self, BatchedArg mask,
                            BatchedArg source) {
  return {scattered(level, self, mask, source, common_sizes(self, mask)), 0};
}

void masked_scatter__rule(const Level& level, BatchedArg self, BatchedArg mask, BatchedArg source) {
  batch_first(self).copy_(scattered(level, self, mask, source, logical_sizes(self)));
}

// The gradient of source: grad where the mask is True, in order, then zeros.
Batched masked_scatter_backward_rule(const Level& level, BatchedArg grad, BatchedArg mask,
                                     at::IntArrayRef sizes) {
  const auto common = common_sizes(grad, mask);
  const at::Tensor grad_rows = flat_rows(grad, common, level.size());
  const at::Tensor mask_rows = flat_rows(mask, common, level.size());
  const at::Tensor zeros =
      at::zeros({level.size(), c10::multiply_integers(sizes)}, grad.value.options());
  if (zeros.numel() == 0) return {with_sizes(zeros, sizes), 0};
  const at::Tensor taken = grad_rows.masked_fill(mask_rows.logical_not(), 0);
  return {with_sizes(zeros.scatter_add(1, places_in_source(mask_rows), taken), sizes), 0};
}

// --- masked_select: only with a mask that all examples share -----------------------------------

Batched masked_select_rule(const Level& level, BatchedArg self, BatchedArg mask) {
  if (mask.bdim) {
    unsupported_error(
        "vmap", "masked_select: the mask of shape ", logical_sizes(mask),
        " differs between examples, so that each would select another number of elements. "
        "Use torchlift.masked_select(x, mask, size=n), which pads to a fixed number, or "
        "torch.where(mask, x, other), x * mask, which keep the shape.");
  }
  const auto sizes = common_sizes(self, mask);
  const at::Tensor chosen = mask.value.expand(sizes).flatten().nonzero().squeeze(1);
  return {flat_rows(self, sizes, level.size()).index_select(1, chosen), 0};
}

// --- take and put ------------------------------------------------------------------------------

// Indices into `numel` elements, [B, K], counted from 0.
at::Tensor index_rows(BatchedArg index, int64_t numel, int64_t batch_size) {
  const at::Tensor rows = expanded(index, batch_size).reshape({batch_size, numel_of(index)});
  return at::where(rows.lt(0), rows.add(numel), rows);
}

Batched take_rule(const Level& level, BatchedArg self, BatchedArg index) {
  if (!self.bdim) return {self.value.take(index.value), index.bdim};
  const int64_t numel = numel_of(self);
  const at::Tensor rows = batch_first(self).reshape({level.size(), numel});
  return {with_sizes(rows.gather(1, index_rows(index, numel, level.size())), logical_sizes(index)),
          0};
}

at::Tensor with_put(const Level& level, BatchedArg self, BatchedArg index, BatchedArg source,
                    bool accumulate) {
  const int64_t numel = numel_of(self);
  TORCH_CHECK(numel_of(index) == numel_of(source),
              "put_(): Expected source and index to have the same ",
              "number of elements, but got source.numel() = ", numel_of(source),
              ", index.numel() = ", numel_of(index));
  const at::Tensor rows = expanded(self, level.size()).reshape({level.size(), numel});
  const at::Tensor places = index_rows(index, numel, level.size());
  const at::Tensor values =
      expanded(source, level.size()).reshape({level.size(), numel_of(source)});
  return with_sizes(
      accumulate ? rows.scatter_add(1, places, values) : rows.scatter(1, places, values),
      logical_sizes(self));
}

Batched put_rule(const Level& level, BatchedArg self, BatchedArg index, BatchedArg source,
                 bool accumulate) {
  return {with_put(level, self, index, source, accumulate), 0};
}

void put__rule(const Level& level, BatchedArg self, BatchedArg index, BatchedArg source,
               bool accumulate) {
  batch_first(self).copy_(with_put(level, self, index, source, accumulate));
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::masked_fill_Scalar, &masked_fill_scalar_rule>(),
    rule<ops::masked_fill__Scalar, &masked_fill__scalar_rule>(),
    rule<ops::masked_fill_Tensor, &masked_fill_tensor_rule>(),
    rule<ops::masked_fill__Tensor, &masked_fill__tensor_rule>(),
    rule<ops::masked_scatter, &masked_scatter_rule>(),
    rule<ops::masked_scatter_, &masked_scatter__rule>(),
    rule<ops::masked_scatter_backward, &masked_scatter_backward_rule>(),
    rule<ops::masked_select, &masked_select_rule>(),
    rule<ops::take, &take_rule>(),
    rule<ops::put, &put_rule>(),
    rule<ops::put_, &put__rule>(),
};

}  // namespace
}  // namespace torchlift
