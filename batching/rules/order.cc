// Order statistics: max and min with indices, argmax, median, kthvalue, sort, topk, search in
// sorted sequences.

#include <ATen/core/Tensor.h>
#include <ATen/ops/aminmax_ops.h>
#include <ATen/ops/argmax_ops.h>
#include <ATen/ops/argmin_ops.h>
#include <ATen/ops/bucketize.h>
#include <ATen/ops/bucketize_ops.h>
#include <ATen/ops/full.h>
#include <ATen/ops/kthvalue.h>
#include <ATen/ops/kthvalue_ops.h>
#include <ATen/ops/max_ops.h>
#include <ATen/ops/median.h>
#include <ATen/ops/median_ops.h>
#include <ATen/ops/min_ops.h>
#include <ATen/ops/mode_ops.h>
#include <ATen/ops/nanmedian.h>
#include <ATen/ops/nanmedian_ops.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/searchsorted_ops.h>
#include <ATen/ops/sort_ops.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/topk_ops.h>

#include "batching/rules/reduction.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;
using reduction_internal::finish;

// --- over all dims: of the flattened example -----------------------------------------------------

Batched keep_all(at::Tensor result, int64_t rank, bool keepdim) {
  return {keepdim ? with_ones(result, rank) : std::move(result), 0};
}

template <class Op>
Batched arg_rule(BatchedArg self, std::optional<int64_t> dim, bool keepdim) {
  if (!dim) return keep_all(Op::call(flattened(self), 1, false), self.logical_dim(), keepdim);
  const Dimmed in = dimmed(self);
  const int64_t physical = in.physical(*dim);
  const bool keeps = keepdim && !in.scalar;
  return {Op::call(in.value, physical, keeps), keeps ? in.bdim : bdim_after(in.bdim, {physical})};
}

std::tuple<Batched, Batched> aminmax_rule(BatchedArg self, std::optional<int64_t> dim,
                                          bool keepdim) {
  const auto rank = self.logical_dim();
  if (!dim) {
    auto [low, high] = ops::aminmax::call(flattened(self), 1, false);
    return {keep_all(low, rank, keepdim), keep_all(high, rank, keepdim)};
  }
  const Dimmed in = dimmed(self);
  const int64_t physical = in.physical(*dim);
  const bool keeps = keepdim && !in.scalar;
  const int64_t bdim = keeps ? in.bdim : bdim_after(in.bdim, {physical});
  auto [low, high] = ops::aminmax::call(in.value, physical, keeps);
  return {Batched{low, bdim}, Batched{high, bdim}};
}

template <class DimOp>
Batched median_of_all(BatchedArg self) {
  return {std::get<0>(DimOp::call(flattened(self), 1, /*keepdim=*/false)), 0};
}

// --- along a dim, behind another integer ---------------------------------------------------------

std::tuple<Batched, Batched> kthvalue_rule(BatchedArg self, int64_t k, int64_t dim, bool keepdim) {
  const Dimmed in = dimmed(self);
  const int64_t physical = in.physical(dim);
  const bool keeps = keepdim && !in.scalar;
  return finish(at::kthvalue(in.value, k, physical, keeps),
                keeps ? in.bdim : bdim_after(in.bdim, {physical}), /*drop_last=*/false);
}

std::tuple<Batched, Batched> topk_rule(BatchedArg self, int64_t k, int64_t dim, bool largest,
                                       bool sorted) {
  const Dimmed in = dimmed(self);
  return finish(at::topk(in.value, k, in.physical(dim), largest, sorted), in.bdim,
                /*drop_last=*/in.scalar && k == 1);
}

// --- searchsorted --------------------------------------------------------------------------------

// A sequence that is 1-d to the user serves values of any shape; as a batch [B, N] it wants values
// [B, M].
//   N, (...) -> ...        BN, B(...) -> B(...)        BLN, BLM -> BLM
Batched searchsorted_rule(BatchedArg sequence, BatchedArg self, bool out_int32, bool right,
                          std::optional<std::string_view> side, std::optional<BatchedArg> sorter) {
  const bool sorts = sorter && sorter->value.defined();
  const bool shared = !sequence.batched() && !(sorts && sorter->batched());
  std::optional<at::Tensor> order;
  if (shared && sequence.value.dim() == 1) {
    if (sorts) order = sorter->value;
    return {at::searchsorted(sequence.value, self.value, out_int32, right, side, order), self.bdim};
  }
  const int64_t size =
      sorts ? batch_size_of({&sequence, &self, &*sorter}) : batch_size_of({&sequence, &self});
  if (sorts) order = expanded(*sorter, size);
  const at::Tensor values = expanded(self, size);
  const at::Tensor sequences = expanded(sequence, size);
  if (sequence.logical_dim() != 1) {
    return {at::searchsorted(sequences, values, out_int32, right, side, order), 0};
  }
  const at::Tensor found = at::searchsorted(sequences, flattened({values, 0}).contiguous(),
                                            out_int32, right, side, order);
  return {found.reshape(values.sizes()), 0};
}

Batched searchsorted_scalar(BatchedArg sequence, const at::Scalar& self, bool out_int32, bool right,
                            std::optional<std::string_view> side,
                            std::optional<BatchedArg> sorter) {
  const auto dtype = at::result_type(sequence.value, self);
  const at::Tensor value = at::full({}, self, sequence.value.options().dtype(dtype));
  const at::Tensor cast = sequence.value.to(dtype);
  return searchsorted_rule({cast, sequence.bdim}, {value, std::nullopt}, out_int32, right, side,
                           sorter);
}

Batched bucketize_rule(BatchedArg self, BatchedArg boundaries, bool out_int32, bool right) {
  TORCH_CHECK(boundaries.logical_dim() == 1,
              "[vmap] bucketize: boundaries must have 1 dim, but each example's have ",
              boundaries.logical_dim());
  return searchsorted_rule(boundaries, self, out_int32, right, std::nullopt, std::nullopt);
}

Batched bucketize_scalar(const at::Scalar& self, BatchedArg boundaries, bool out_int32,
                         bool right) {
  return searchsorted_scalar(boundaries, self, out_int32, right, std::nullopt, std::nullopt);
}

[[maybe_unused]] const RuleSet kReductions{
    reduction_rows<ops::max_dim, ops::min_dim, ops::median_dim, ops::nanmedian_dim, ops::mode>()};

[[maybe_unused]] const RuleSet kSorts{along_dim_rows<ops::sort, ops::sort_stable>()};

[[maybe_unused]] const RuleSet kRules{
    rule<ops::argmax, &arg_rule<ops::argmax>>(),
    rule<ops::argmin, &arg_rule<ops::argmin>>(),
    rule<ops::aminmax, &aminmax_rule>(),
    rule<ops::median, &median_of_all<ops::median_dim>>(),
    rule<ops::nanmedian, &median_of_all<ops::nanmedian_dim>>(),
    rule<ops::kthvalue, &kthvalue_rule>(),
    rule<ops::topk, &topk_rule>(),
    rule<ops::searchsorted_Tensor, &searchsorted_rule>(),
    rule<ops::searchsorted_Scalar, &searchsorted_scalar>(),
    rule<ops::bucketize_Tensor, &bucketize_rule>(),
    rule<ops::bucketize_Scalar, &bucketize_scalar>(),
};

}  // namespace
}  // namespace torchlift
