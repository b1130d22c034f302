// Operators with one index along one dim: index_select, index_add, index_copy, index_fill,
// index_reduce. With an index of its own for each example they become gathers and scatters, the
// index repeated along other dims.

#include <ATen/core/Tensor.h>
#include <ATen/ops/index_add_ops.h>
#include <ATen/ops/index_copy_ops.h>
#include <ATen/ops/index_fill_ops.h>
#include <ATen/ops/index_reduce_ops.h>
#include <ATen/ops/index_select_ops.h>
#include <ATen/ops/scatter_add_ops.h>
#include <ATen/ops/scatter_ops.h>
#include <ATen/ops/scatter_reduce_ops.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>

#include "batching/rules/dims.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// [B, ...], a 0-d example as one of 1 element.
at::Tensor rows_of(const BatchedArg& arg, int64_t batch_size) {
  const at::Tensor value = expanded(arg, batch_size);
  return arg.logical_dim() == 0 ? value.unsqueeze(-1) : value;
}

// A batched index [B, N] (N = 1 for a 0-d one) along dim `at` of a tensor with these sizes:
//   [B, N] -> [B, 1..., N, 1...] -> [B, sizes..., N, sizes...]
at::Tensor spread(const BatchedArg& index, at::IntArrayRef sizes, int64_t at) {
  at::Tensor rows = batch_first(index);
  TORCH_CHECK_INDEX(rows.dim() <= 2, "Index is supposed to be a vector, but got one of ",
                    index.logical_dim(), " dimensions");
  rows = (rows.dim() == 1 ? rows.unsqueeze(-1) : rows).to(at::kLong);
  c10::SmallVector<int64_t, 6> shape(sizes.size(), 1);
  shape[0] = sizes[0];
  shape[at] = rows.size(1);
  c10::SmallVector<int64_t, 6> full(sizes.begin(), sizes.end());
  full[at] = rows.size(1);
  return rows.reshape(shape).expand(full);
}

// --- reading -----------------------------------------------------------------------------------

// Every example reads the same tensor: one index_select of all indices.
//   index [B, N] -> [B*N];  [..., D, ...] -> [..., B*N, ...] -> [..., B, N, ...]
Batched select_shared(const at::Tensor& self, int64_t dim, const BatchedArg& index) {
  const at::Tensor rows = batch_first(index);
  const int64_t at = wrap_dim(dim, self.dim());
  const int64_t per_example = rows.dim() == 1 ? 1 : rows.size(1);
  const at::Tensor source = self.dim() == 0 ? self.unsqueeze(0) : self;
  const at::Tensor all = source.index_select(at, rows.flatten());
  const at::Tensor split = all.unflatten(at, at::IntArrayRef({rows.size(0), per_example}));
  return {self.dim() == 0 ? split.select(1, 0) : split, at};
}

Batched index_select_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index) {
  TORCH_CHECK_INDEX(index.logical_dim() <= 1,
                    "index_select(): Index is supposed to be a vector, but got ",
                    index.logical_dim(), " dimensions");
  const bool scalar = self.logical_dim() == 0;
  if (scalar) {
    TORCH_CHECK(c10::multiply_integers(logical_sizes(index)) == 1,
                "index_select(): Index to scalar can have only 1 value");
  }
  if (!self.bdim) return select_shared(self.value, dim, index);
  if (!index.bdim && !scalar) {
    return {self.value.index_select(physical_dim(self, dim), index.value), self.bdim};
  }
  const at::Tensor rows = rows_of(self, level.size());
  const int64_t at = wrap_dim(dim, self.logical_dim()) + 1;
  const at::Tensor result = index.bdim ? rows.gather(at, spread(index, rows.sizes(), at))
                                       : rows.index_select(at, index.value);
  return {scalar ? result.select(1, 0) : result, 0};
}

// --- writing -----------------------------------------------------------------------------------

// index_add and the like, for a shared index; scatter_add and the like, with the index spread over
// the source, for an index of each example. IndexOp and ScatterOp are both out-of-place or both in
// place.
//   self [B, ..., D, ...], source [B, ..., N, ...], index [N] or [B, N]
struct Writing {
  at::Tensor rows;
  int64_t at;
  at::Tensor source;
  at::Tensor index;
  bool shared;
};

// As index_add and the like demand; a scatter would let a smaller source or index pass.
void check_source(const at::Tensor& rows, const at::Tensor& source, const BatchedArg& index,
                  int64_t at) {
  const int64_t count = index.logical_dim() == 0 ? 1 : index.value.size(*index.bdim == 0 ? 1 : 0);
  bool fits = source.dim() == rows.dim();
  for (int64_t dim = 1; fits && dim < rows.dim(); ++dim) {
    fits = source.size(dim) == (dim == at ? count : rows.size(dim));
  }
  TORCH_CHECK_INDEX(fits, "the source of shape ", source.sizes().slice(1),
                    " must have the shape of self, ", rows.sizes().slice(1),
                    ", but for the size of the index, ", count, ", along dimension ", at - 1);
}

Writing writing_of(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                   BatchedArg source) {
  const at::Tensor rows = rows_of(self, level.size());
  const at::Tensor values = rows_of(source, level.size());
  const int64_t at = wrap_dim(dim, self.logical_dim()) + 1;
  if (!index.bdim) return {rows, at, values, index.value, true};
  TORCH_CHECK_INDEX(index.logical_dim() <= 1, "Index is supposed to be a vector, but got one of ",
                    index.logical_dim(), " dimensions");
  check_source(rows, values, index, at);
  return {rows, at, values, spread(index, values.sizes(), at), false};
}

Batched in_shape_of(BatchedArg self, const at::Tensor& result) {
  return {self.logical_dim() == 0 ? result.squeeze(1) : result, 0};
}

template <class IndexOp, class ScatterOp>
at::Tensor add(Writing w, const at::Scalar& alpha) {
  if (w.shared) return IndexOp::call(w.rows, w.at, w.index, w.source, alpha);
  return ScatterOp::call(w.rows, w.at, w.index, alpha.equal(1) ? w.source : w.source.mul(alpha));
}

template <class IndexOp, class ScatterOp>
at::Tensor copy(Writing w) {
  if (w.shared) return IndexOp::call(w.rows, w.at, w.index, w.source);
  return ScatterOp::call(w.rows, w.at, w.index, w.source);
}

template <class IndexOp, class ScatterOp>
at::Tensor reduce(Writing w, c10::string_view how, bool include_self) {
  if (w.shared) return IndexOp::call(w.rows, w.at, w.index, w.source, how, include_self);
  return ScatterOp::call(w.rows, w.at, w.index, w.source, how, include_self);
}

Batched index_add_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                       BatchedArg source, const at::Scalar& alpha) {
  const Writing w = writing_of(level, self, dim, index, source);
  return in_shape_of(self, add<ops::index_add, ops::scatter_add>(w, alpha));
}

void index_add__rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                     BatchedArg source, const at::Scalar& alpha) {
  add<ops::index_add_, ops::scatter_add_>(writing_of(level, self, dim, index, source), alpha);
}

Batched index_copy_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                        BatchedArg source) {
  const Writing w = writing_of(level, self, dim, index, source);
  return in_shape_of(self, copy<ops::index_copy, ops::scatter_src>(w));
}

void index_copy__rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                      BatchedArg source) {
  copy<ops::index_copy_, ops::scatter__src>(writing_of(level, self, dim, index, source));
}

Batched index_reduce_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                          BatchedArg source, c10::string_view how, bool include_self) {
  const Writing w = writing_of(level, self, dim, index, source);
  return in_shape_of(self,
                     reduce<ops::index_reduce, ops::scatter_reduce_two>(w, how, include_self));
}

void index_reduce__rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                        BatchedArg source, c10::string_view how, bool include_self) {
  reduce<ops::index_reduce_, ops::scatter_reduce__two>(writing_of(level, self, dim, index, source),
                                                       how, include_self);
}

// --- filling -----------------------------------------------------------------------------------

// Unlike the others, a fill takes negative indices.
struct Filling {
  at::Tensor rows;
  int64_t at;
  at::Tensor index;  // [N], or spread over [B, ..., N, ...]
  bool shared;
};

Filling filling_of(const Level& level, BatchedArg self, int64_t dim, BatchedArg index) {
  const at::Tensor rows = rows_of(self, level.size());
  const int64_t at = wrap_dim(dim, self.logical_dim()) + 1;
  const int64_t size = rows.size(at);
  const at::Tensor wrapped = at::where(index.value.lt(0), index.value.add(size), index.value);
  if (!index.bdim) return {rows, at, wrapped, true};
  return {rows, at, spread(BatchedArg{wrapped, index.bdim}, rows.sizes(), at), false};
}

template <class FillOp, class ScatterOp>
at::Tensor fill(const Filling& f, const at::Scalar& value) {
  at::Tensor rows = f.rows;
  if (f.shared) return FillOp::call(rows, f.at, f.index, value);
  return ScatterOp::call(rows, f.at, f.index, value);
}

Batched index_fill_scalar_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                               const at::Scalar& value) {
  const Filling f = filling_of(level, self, dim, index);
  return in_shape_of(self, fill<ops::index_fill_int_Scalar, ops::scatter_value>(f, value));
}

void index_fill__scalar_rule(const Level& level, BatchedArg self, int64_t dim, BatchedArg index,
                             const at::Scalar& value) {
  fill<ops::index_fill__int_Scalar, ops::scatter__value>(filling_of(level, self, dim, index),
                                                         value);
}

// With a value that is a tensor. libtorch's derivative for the value looks for the unique indices,
// which are not as many in each example; a mask knows them too.
at::Tensor filled_places(const at::Tensor& self, int64_t dim, const at::Tensor& index,
                         const at::Tensor& value) {
  TORCH_CHECK(value.dim() == 0,
              "index_fill_ only supports a 0-dimensional value tensor, but got tensor ", "with ",
              value.dim(), " dimension(s).");
  return at::zeros_like(self, self.options().dtype(at::kBool)).index_fill(dim, index, true);
}

at::Tensor index_fill_tensor(const at::Tensor& self, int64_t dim, const at::Tensor& index,
                             const at::Tensor& value) {
  return self.masked_fill(filled_places(self, dim, index, value), value);
}

at::Tensor& index_fill__tensor(at::Tensor& self, int64_t dim, const at::Tensor& index,
                               const at::Tensor& value) {
  return self.masked_fill_(filled_places(self, dim, index, value), value);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::index_select, &index_select_rule>(),
    rule<ops::index_add, &index_add_rule>(),
    rule<ops::index_add_, &index_add__rule>(),
    rule<ops::index_copy, &index_copy_rule>(),
    rule<ops::index_copy_, &index_copy__rule>(),
    rule<ops::index_reduce, &index_reduce_rule>(),
    rule<ops::index_reduce_, &index_reduce__rule>(),
    rule<ops::index_fill_int_Scalar, &index_fill_scalar_rule>(),
    rule<ops::index_fill__int_Scalar, &index_fill__scalar_rule>(),
    composite<ops::index_fill_int_Tensor, &index_fill_tensor>(),
    composite<ops::index_fill__int_Tensor, &index_fill__tensor>(),
};

}  // namespace
}  // namespace torchlift
