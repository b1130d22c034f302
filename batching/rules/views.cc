// Operators that return a view of their argument. Every result here shares memory with the value,
// so that writes through it reach the base.

#include <ATen/InferSize.h>
#include <ATen/TensorUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_conj.h>
#include <ATen/ops/_conj_ops.h>
#include <ATen/ops/_neg_view.h>
#include <ATen/ops/_neg_view_ops.h>
#include <ATen/ops/_reshape_alias_ops.h>
#include <ATen/ops/_unsafe_view.h>
#include <ATen/ops/_unsafe_view_ops.h>
#include <ATen/ops/alias.h>
#include <ATen/ops/alias_ops.h>
#include <ATen/ops/detach_ops.h>
#include <ATen/ops/diagonal_ops.h>
#include <ATen/ops/expand_ops.h>
#include <ATen/ops/permute_ops.h>
#include <ATen/ops/select_ops.h>
#include <ATen/ops/slice_ops.h>
#include <ATen/ops/split_ops.h>
#include <ATen/ops/split_with_sizes_ops.h>
#include <ATen/ops/squeeze_ops.h>
#include <ATen/ops/t_ops.h>
#include <ATen/ops/transpose_ops.h>
#include <ATen/ops/unbind_ops.h>
#include <ATen/ops/unfold_ops.h>
#include <ATen/ops/unsafe_split.h>
#include <ATen/ops/unsafe_split_ops.h>
#include <ATen/ops/unsafe_split_with_sizes.h>
#include <ATen/ops/unsafe_split_with_sizes_ops.h>
#include <ATen/ops/unsqueeze_ops.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_complex_ops.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/view_as_real_ops.h>
#include <ATen/ops/view_ops.h>

#include <algorithm>

#include "batching/rules/dims.h"
#include "batching/rules/view_dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- the same dims come out --------------------------------------------------------------------

Batched alias_rule(BatchedArg self) { return {at::alias(self.value), self.bdim}; }

// detach() in a user's function means "not differentiated", in whatever domain, as no_grad() does.
Batched detach_rule(BatchedArg self) { return {self.value.detach(), self.bdim}; }

// Replaces the value, since a value that is a view cannot be detached in place.
Batched detach__rule(BatchedArg self) { return {self.value.detach(), self.bdim}; }

Batched conj_rule(BatchedArg self) { return {at::_conj(self.value), self.bdim}; }

Batched neg_view_rule(BatchedArg self) { return {at::_neg_view(self.value), self.bdim}; }

// --- shapes ------------------------------------------------------------------------------------

int64_t logical_numel(BatchedArg self) {
  int64_t numel = 1;
  for (int64_t dim = 0; dim < self.value.dim(); ++dim) {
    if (dim != *self.bdim) numel *= self.value.size(dim);
  }
  return numel;
}

// [batch size, sizes...], with a -1 in sizes worked out from one example: with no examples at all,
// or with empty ones, the whole value could not tell.
c10::SmallVector<int64_t, 8> sizes_with_batch(BatchedArg self, at::IntArrayRef sizes) {
  c10::SmallVector<int64_t, 8> all{self.value.size(*self.bdim)};
  bool infer = false;
  for (const int64_t size : sizes) infer = infer || size < 0;
  if (infer) {
    const auto inferred = at::infer_size(sizes, logical_numel(self));
    all.append(inferred.begin(), inferred.end());
  } else {
    all.append(sizes.begin(), sizes.end());
  }
  return all;
}

void check_numel(BatchedArg self, at::IntArrayRef all) {
  const int64_t numel = c10::multiply_integers(all.slice(1));
  TORCH_CHECK(numel == logical_numel(self), "shape '", all.slice(1),
              "' is invalid for input of size ", logical_numel(self));
}

// libtorch lays out a view of nothing as if it were contiguous. But a batch of none may be the
// tangent of a tensor that is not batched, and forward mode wants the two to lie alike: so this
// view gets the strides that it would have with examples.
at::Tensor view_of_none(const at::Tensor& value, at::IntArrayRef all) {
  const auto strides = at::detail::computeStride(value.sizes().slice(1), value.strides().slice(1),
                                                 at::DimVector(all.slice(1)));
  if (!strides) return value.view(all);
  c10::SmallVector<int64_t, 8> with_batch{value.stride(0)};
  with_batch.append(strides->begin(), strides->end());
  return value.as_strided(all, with_batch);
}

Batched view_rule(BatchedArg self, at::IntArrayRef sizes) {
  const auto all = sizes_with_batch(self, sizes);
  check_numel(self, all);
  const at::Tensor value = batch_first(self);
  return {value.size(0) == 0 ? view_of_none(value, all) : value.view(all), 0};
}

Batched unsafe_view_rule(BatchedArg self, at::IntArrayRef sizes) {
  const auto all = sizes_with_batch(self, sizes);
  check_numel(self, all);
  // Not a view to anybody, so a copy will do where the batch dim lies in the way of one.
  const at::Tensor value = batch_first(self);
  const bool viewable =
      at::detail::computeStride(value.sizes(), value.strides(), at::IntArrayRef(all)).has_value();
  return {at::_unsafe_view(viewable ? value : value.contiguous(), all), 0};
}

Batched reshape_alias_rule(BatchedArg self, at::IntArrayRef sizes, at::IntArrayRef /*strides*/) {
  return view_rule(self, sizes);
}

Batched view_dtype_rule(BatchedArg self, at::ScalarType dtype) {
  if (c10::elementSize(dtype) == self.value.dtype().itemsize()) {
    return {self.value.view(dtype), self.bdim};
  }
  TORCH_CHECK(self.logical_dim() > 0, "self.dim() cannot be 0 to view ", self.value.scalar_type(),
              " as ", dtype, " (different element sizes)");
  return {batch_first(self).view(dtype), 0};
}

// A -1 keeps the size of an existing dim.
Batched expand_rule(BatchedArg self, at::IntArrayRef sizes, bool /*implicit*/) {
  const auto rank = static_cast<int64_t>(sizes.size());
  const int64_t missing = rank - self.logical_dim();
  TORCH_CHECK(missing >= 0, "expand: the number of sizes provided (", rank,
              ") must be greater or equal to the number of dimensions in the tensor (",
              self.logical_dim(), ")");
  for (int64_t dim = 0; dim < missing; ++dim) {
    TORCH_CHECK(sizes[dim] >= 0, "expand: the size ", sizes[dim],
                " isn't allowed in a leading, non-existing dimension ", dim);
  }
  const int64_t bdim = missing == 0 ? *self.bdim : 0;
  c10::SmallVector<int64_t, 8> all(sizes.begin(), sizes.end());
  all.insert(all.begin() + bdim, self.value.size(*self.bdim));
  return {(missing == 0 ? self.value : aligned(self, rank)).expand(all), bdim};
}

// --- one dim less, or a part of one ------------------------------------------------------------

Batched select_rule(BatchedArg self, int64_t dim, int64_t index) {
  TORCH_CHECK_INDEX(self.logical_dim() > 0, "select() cannot be applied to a 0-dim tensor.");
  const int64_t at = physical_dim(self, dim);
  return {self.value.select(at, index), without_dim(*self.bdim, at)};
}

Batched slice_rule(BatchedArg self, int64_t dim, std::optional<int64_t> start,
                   std::optional<int64_t> end, int64_t step) {
  TORCH_CHECK(self.logical_dim() > 0, "slice() cannot be applied to a 0-dim tensor.");
  return {self.value.slice(physical_dim(self, dim), start, end, step), self.bdim};
}

// All results have the same batch dim.
std::vector<Batched> with_bdim(std::vector<at::Tensor> values, int64_t bdim) {
  std::vector<Batched> results;
  results.reserve(values.size());
  for (at::Tensor& value : values) results.push_back({std::move(value), bdim});
  return results;
}

void check_splittable(BatchedArg self, const char* name) {
  TORCH_CHECK(self.logical_dim() > 0, name, " expects at least a 1-dimensional tensor");
}

std::vector<Batched> split_rule(BatchedArg self, int64_t split_size, int64_t dim) {
  check_splittable(self, "split");
  return with_bdim(self.value.split(split_size, physical_dim(self, dim)), *self.bdim);
}

std::vector<Batched> split_with_sizes_rule(BatchedArg self, at::IntArrayRef sizes, int64_t dim) {
  check_splittable(self, "split_with_sizes");
  return with_bdim(self.value.split_with_sizes(sizes, physical_dim(self, dim)), *self.bdim);
}

std::vector<Batched> unsafe_split_rule(BatchedArg self, int64_t split_size, int64_t dim) {
  check_splittable(self, "unsafe_split");
  return with_bdim(at::unsafe_split(self.value, split_size, physical_dim(self, dim)), *self.bdim);
}

std::vector<Batched> unsafe_split_with_sizes_rule(BatchedArg self, at::IntArrayRef sizes,
                                                  int64_t dim) {
  check_splittable(self, "unsafe_split_with_sizes");
  return with_bdim(at::unsafe_split_with_sizes(self.value, sizes, physical_dim(self, dim)),
                   *self.bdim);
}

std::vector<Batched> unbind_rule(BatchedArg self, int64_t dim) {
  TORCH_CHECK(self.logical_dim() > 0, "unbind() cannot be applied to a 0-dim tensor.");
  const int64_t at = physical_dim(self, dim);
  return with_bdim(self.value.unbind(at), without_dim(*self.bdim, at));
}

// --- dims in another order ---------------------------------------------------------------------

Batched transpose_rule(BatchedArg self, int64_t dim0, int64_t dim1) {
  const int64_t first = physical_dim(self, dim0);
  const int64_t second = physical_dim(self, dim1);
  if (first == second) return alias_rule(self);  // as every transpose of a 0-d example is
  return {self.value.transpose(first, second), self.bdim};
}

Batched t_rule(BatchedArg self) {
  TORCH_CHECK(self.logical_dim() <= 2, "t() expects a tensor with <= 2 dimensions, but self is ",
              self.logical_dim(), "D");
  if (self.logical_dim() < 2) return alias_rule(self);
  return transpose_rule(self, 0, 1);
}

Batched permute_rule(BatchedArg self, at::IntArrayRef dims) {
  TORCH_CHECK(static_cast<int64_t>(dims.size()) == self.logical_dim(), "permute: the tensor has ",
              self.logical_dim(), " dimensions, but an order of ", dims.size(), " was given");
  c10::SmallVector<int64_t, 8> all{*self.bdim};
  for (const int64_t dim : dims) all.push_back(physical_dim(self, dim));
  return {self.value.permute(all), 0};
}

// --- dims of size 1 ----------------------------------------------------------------------------

Batched squeeze_dim_rule(BatchedArg self, int64_t dim) {
  const int64_t rank = self.logical_dim();
  if (rank == 0) {
    wrap_dim(dim, rank);  // throws if out of range
    return alias_rule(self);
  }
  const int64_t at = physical_dim(self, dim);
  const bool goes = self.value.size(at) == 1;
  return {self.value.squeeze(at), goes ? without_dim(*self.bdim, at) : *self.bdim};
}

Batched squeeze_physical(BatchedArg self, at::IntArrayRef dims) {
  int64_t bdim = *self.bdim;
  for (const int64_t dim : dims) {
    if (dim < *self.bdim && self.value.size(dim) == 1) --bdim;
  }
  return {self.value.squeeze(dims), bdim};
}

Batched squeeze_dims_rule(BatchedArg self, at::IntArrayRef dims) {
  if (self.logical_dim() == 0) {
    for (const int64_t dim : dims) wrap_dim(dim, 0);
    return alias_rule(self);
  }
  c10::SmallVector<int64_t, 6> physical;
  for (const int64_t dim : dims) physical.push_back(physical_dim(self, dim));
  return squeeze_physical(self, physical);
}

// All dims but the batch dim, which may have size 1 too.
Batched squeeze_rule(BatchedArg self) {
  c10::SmallVector<int64_t, 6> physical;
  for (int64_t dim = 0; dim < self.value.dim(); ++dim) {
    if (dim != *self.bdim && self.value.size(dim) == 1) physical.push_back(dim);
  }
  if (physical.empty()) return alias_rule(self);
  return squeeze_physical(self, physical);
}

Batched unsqueeze_rule(BatchedArg self, int64_t dim) {
  const int64_t at = wrap_dim(dim, self.logical_dim() + 1);
  if (at < *self.bdim) return {self.value.unsqueeze(at), *self.bdim + 1};
  return {self.value.unsqueeze(at + 1), self.bdim};
}

// --- diagonals and windows ---------------------------------------------------------------------

Batched diagonal_rule(BatchedArg self, int64_t offset, int64_t dim1, int64_t dim2) {
  const int64_t rank = self.logical_dim();
  const int64_t first = wrap_dim(dim1, rank);
  const int64_t second = wrap_dim(dim2, rank);
  TORCH_CHECK(first != second, "diagonal dimensions cannot be identical ", dim1, ", ", dim2);
  const int64_t row = physical_dim(self, first);
  const int64_t column = physical_dim(self, second);
  const int64_t bdim = *self.bdim - (row < *self.bdim ? 1 : 0) - (column < *self.bdim ? 1 : 0);
  return {self.value.diagonal(offset, row, column), bdim};
}

Batched unfold_rule(BatchedArg self, int64_t dim, int64_t size, int64_t step) {
  if (self.logical_dim() == 0) {
    // Windows of one element: [B] -> [B, size], size 0 or 1.
    wrap_dim(dim, 0);
    TORCH_CHECK(size == 0 || size == 1, "maximum size for tensor at dimension 0 is 1 but size is ",
                size);
    return {self.value.unsqueeze(-1).slice(-1, 0, size), self.bdim};
  }
  return {self.value.unfold(physical_dim(self, dim), size, step), self.bdim};
}

// --- complex pairs -----------------------------------------------------------------------------

Batched view_as_real_rule(BatchedArg self) { return {at::view_as_real(self.value), self.bdim}; }

// Whether each pair of the last dim lies together, as the parts of a complex number do.
bool holds_pairs(const at::Tensor& t) {
  const auto strides = t.strides().slice(0, t.dim() - 1);
  return t.stride(-1) == 1 && t.storage_offset() % 2 == 0 &&
         std::all_of(strides.begin(), strides.end(), [](int64_t each) { return each % 2 == 0; });
}

Batched view_as_complex_rule(BatchedArg self) {
  TORCH_CHECK(self.logical_dim() > 0, "Input tensor must have one or more dimensions");
  if (self.value.numel() == 0) {  // Its strides may say nothing.
    const at::Tensor value = batch_first(self);
    return {
        at::view_as_complex(holds_pairs(value) ? value : value.clone(at::MemoryFormat::Contiguous)),
        0};
  }
  const bool last = *self.bdim == self.value.dim() - 1;
  return {at::view_as_complex(last ? batch_first(self) : self.value), last ? 0 : *self.bdim};
}

constexpr OpKind kView = OpKind::kView;

[[maybe_unused]] const RuleSet kViews{
    rule<ops::alias, &alias_rule, kView>(),
    rule<ops::detach, &detach_rule, kView>(),
    rule<ops::_conj, &conj_rule, kView>(),
    rule<ops::_neg_view, &neg_view_rule, kView>(),
    rule<ops::view, &view_rule, kView>(),
    rule<ops::view_dtype, &view_dtype_rule, kView>(),
    rule<ops::_reshape_alias, &reshape_alias_rule, kView>(),
    rule<ops::expand, &expand_rule, kView>(),
    rule<ops::select_int, &select_rule, kView>(),
    rule<ops::slice_Tensor, &slice_rule, kView>(),
    rule<ops::split_Tensor, &split_rule, kView>(),
    rule<ops::split_with_sizes, &split_with_sizes_rule, kView>(),
    rule<ops::unbind_int, &unbind_rule, kView>(),
    rule<ops::transpose_int, &transpose_rule, kView>(),
    rule<ops::t, &t_rule, kView>(),
    rule<ops::permute, &permute_rule, kView>(),
    rule<ops::squeeze, &squeeze_rule, kView>(),
    rule<ops::squeeze_dim, &squeeze_dim_rule, kView>(),
    rule<ops::squeeze_dims, &squeeze_dims_rule, kView>(),
    rule<ops::unsqueeze, &unsqueeze_rule, kView>(),
    rule<ops::diagonal, &diagonal_rule, kView>(),
    rule<ops::unfold, &unfold_rule, kView>(),
    rule<ops::view_as_real, &view_as_real_rule, kView>(),
    rule<ops::view_as_complex, &view_as_complex_rule, kView>(),
};

// Not views to autograd, which is told so by their names.
[[maybe_unused]] const RuleSet kUnsafe{
    rule<ops::_unsafe_view, &unsafe_view_rule>(),
    rule<ops::unsafe_split_Tensor, &unsafe_split_rule>(),
    rule<ops::unsafe_split_with_sizes, &unsafe_split_with_sizes_rule>(),
};

// In place, these change what the tensor shows.
[[maybe_unused]] const RuleSet kMetadata{
    rule<ops::detach_, &detach__rule>(),          rule<ops::squeeze_, &squeeze_rule>(),
    rule<ops::squeeze__dim, &squeeze_dim_rule>(), rule<ops::squeeze__dims, &squeeze_dims_rule>(),
    rule<ops::unsqueeze_, &unsqueeze_rule>(),     rule<ops::t_, &t_rule>(),
    rule<ops::transpose_, &transpose_rule>(),
};

}  // namespace
}  // namespace torchlift
