// embedding_bag: rows of a table, added up in bags.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_assert_async.h>
#include <ATen/ops/_embedding_bag.h>
#include <ATen/ops/_embedding_bag_backward_ops.h>
#include <ATen/ops/_embedding_bag_forward_only_ops.h>
#include <ATen/ops/_embedding_bag_ops.h>
#include <ATen/ops/_embedding_bag_per_sample_weights_backward_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding_bag_ops.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/searchsorted.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>
#include <vector>

#include "batching/rules/reduction.h"
#include "core/error.h"
#include "core/registry.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using EmbeddingBag = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using BatchedBag = std::tuple<Batched, Batched, Batched, Batched>;

// libtorch's number for the largest entries of a bag; 0 is their sum and 1 the mean.
constexpr int64_t kMean = 1, kMax = 2;

// --- forward: one call ---------------------------------------------------------------------------
//
// B examples with I indices in M bags are one with B*I indices in B*M bags, over one table, or, of
// B tables of V rows, over the B*V rows of all.

struct CommonBags {
  Tensor table;    // VD or (BV)D
  Tensor indices;  // (BI)
  Tensor offsets;  // (BM)
  int64_t padding = -1;
};

// BI, the numbers of rows in the common table. An index out of its own table may be in that, so all
// are looked at. Padding has one number for all, which no other index has.
Tensor in_common_table(const Tensor& indices, int64_t rows, int64_t padding) {
  at::_assert_async((indices.ge(0) & indices.lt(rows)).all(),
                    "[vmap] embedding_bag: an index is out of the range of its table");
  const Tensor first_rows = at::arange(indices.size(0), indices.options()).unsqueeze(1) * rows;
  const Tensor common = indices + first_rows;
  return padding < 0 ? common : at::where(indices.eq(padding), at::Scalar(padding), common);
}

// One table for each example, if `apart`.
CommonBags common_bags(const BatchedArg& weight, const BatchedArg& indices,
                       const BatchedArg& offsets, int64_t size, int64_t padding, bool apart) {
  CommonBags common{.padding = padding};
  Tensor index = expanded(indices, size);
  const Tensor start = expanded(offsets, size);
  if (apart) {
    const Tensor tables = expanded(weight, size);
    index = in_common_table(index, tables.size(1), padding);
    common.table = tables.flatten(0, 1).contiguous();
  } else {
    common.table = weight.value;
  }
  const Tensor first = at::arange(size, start.options()).unsqueeze(1) * index.size(1);
  common.offsets = (start + first).flatten();
  common.indices = index.flatten();
  return common;
}

template <class Op>
BatchedBag embedding_bag_rule(const Level& level, BatchedArg weight, BatchedArg indices,
                              BatchedArg offsets, bool scale_grad_by_freq, int64_t mode,
                              bool sparse, std::optional<BatchedArg> per_sample_weights,
                              bool include_last_offset, int64_t padding_idx) {
  const int64_t size = level.size(), starts = logical_sizes(offsets)[0];
  // The last offset is the end of the last bag: one more bag has what is left, and is dropped.
  const int64_t bags = include_last_offset ? starts - 1 : starts;
  // A gradient outside of the level that counts how often an example uses a row.
  const bool counts = scale_grad_by_freq && is_tracked_outside(weight.value);
  const bool apart_tables = weight.batched() || counts;
  const CommonBags common = common_bags(weight, indices, offsets, size, padding_idx, apart_tables);
  OptionalTensor factors;
  if (per_sample_weights.has_value()) {
    factors = expanded(*per_sample_weights, size).flatten().contiguous();
  }
  auto [output, to_bag, sizes, largest] =
      Op::call(common.table, common.indices, common.offsets, scale_grad_by_freq, mode, sparse,
               factors, /*include_last_offset=*/false, common.padding);
  const auto apart = [&](const Tensor& t) {
    if (t.dim() == 0 || t.size(0) != size * starts) return Batched{t.new_zeros({size, 0}), 0};
    return Batched{t.unflatten(0, at::IntArrayRef({size, starts})).narrow(1, 0, bags), 0};
  };
  Batched rows = apart(largest);
  if (apart_tables && mode == kMax && rows.value.dim() == 3) {
    const Tensor first_rows = at::arange(size, rows.value.options()) * logical_sizes(weight)[0];
    rows.value = rows.value - first_rows.reshape({size, 1, 1});
  }
  // Nobody reads which bag an index is in: the backward here works that out again.
  return {apart(output), Batched{to_bag.new_zeros({size, 0}), 0}, apart(sizes), rows};
}

// --- backward, as operators on one example -------------------------------------------------------

struct Entries {
  Tensor bag;      // I, the bag of each index
  Tensor counted;  // I, 1, or 0 where it is padding or behind the last bag
};

Entries entries_of(const Tensor& indices, const Tensor& offsets, int64_t bags, int64_t padding,
                   at::ScalarType dtype) {
  const Tensor places = at::arange(indices.size(0), offsets.options());
  const Tensor bag =
      at::searchsorted(offsets.narrow(0, 0, bags), places, /*out_int32=*/false, /*right=*/true) - 1;
  Tensor counted = indices.ne(padding);
  if (offsets.size(0) > bags) counted = counted & places.lt(offsets.narrow(0, bags, 1));
  return {bag, counted.to(dtype)};
}

// MD -> VD
Tensor backward_of_max(const Tensor& grad, const Tensor& bag_size, const Tensor& largest,
                       int64_t rows) {
  const Tensor filled = bag_size.gt(0).to(grad.scalar_type()).unsqueeze(1);
  return at::zeros({rows, grad.size(1)}, grad.options())
      .scatter_add(0, largest.to(at::kLong).clamp_min(0), grad * filled);
}

Tensor embedding_bag_backward(const Tensor& grad, const Tensor& indices, const Tensor& offsets,
                              const Tensor& /*offset2bag*/, const Tensor& bag_size,
                              const Tensor& largest, c10::SymInt num_weights,
                              bool scale_grad_by_freq, int64_t mode, bool sparse,
                              const OptionalTensor& per_sample_weights, int64_t padding_idx) {
  if (sparse) {
    unsupported_error("vmap",
                      "embedding_bag with sparse=True: a sparse gradient cannot be batched. "
                      "Use sparse=False.");
  }
  const int64_t rows = num_weights.guard_int(__FILE__, __LINE__);
  if (mode == kMax) return backward_of_max(grad, bag_size, largest, rows);
  const auto [bag, counted] =
      entries_of(indices, offsets, grad.size(0), padding_idx, grad.scalar_type());
  Tensor factor = counted;
  if (per_sample_weights.has_value() && per_sample_weights->defined()) {
    factor = factor * *per_sample_weights;
  }
  if (mode == kMean) {
    const Tensor sizes = at::zeros({grad.size(0)}, grad.options()).index_add(0, bag, counted);
    factor = factor / sizes.clamp_min(1).index_select(0, bag);
  }
  if (scale_grad_by_freq) {
    const Tensor uses =
        at::zeros({rows}, grad.options()).index_add(0, indices, at::ones_like(counted));
    factor = factor / uses.index_select(0, indices);
  }
  return at::zeros({rows, grad.size(1)}, grad.options())
      .index_add(0, indices, grad.index_select(0, bag) * factor.unsqueeze(1));
}

// I: how the sum of a bag changes with the factor of an index
Tensor per_sample_weights_backward(const Tensor& grad, const Tensor& weight, const Tensor& indices,
                                   const Tensor& offsets, const Tensor& /*offset2bag*/,
                                   int64_t /*mode: sum*/, int64_t padding_idx) {
  const auto [bag, counted] =
      entries_of(indices, offsets, grad.size(0), padding_idx, grad.scalar_type());
  return (grad.index_select(0, bag) * weight.index_select(0, indices)).sum(1) * counted;
}

// --- the operators that users call ---------------------------------------------------------------

// libtorch's asks whether the table requires a gradient, and if not, takes an operator that has
// none. But a gradient outside of the level may track what the table holds.
EmbeddingBag embedding_bag_padded(const Tensor& weight, const Tensor& indices,
                                  const Tensor& offsets, bool scale_grad_by_freq, int64_t mode,
                                  bool sparse, const OptionalTensor& per_sample_weights,
                                  bool include_last_offset, std::optional<int64_t> padding_idx) {
  int64_t padding = -1;
  if (padding_idx.has_value()) {
    const int64_t rows = weight.size(0);
    TORCH_CHECK(*padding_idx >= -rows && *padding_idx < rows,
                "padding_idx must be within the number of embeddings, -", rows, " through ",
                rows - 1, ", but got ", *padding_idx);
    padding = *padding_idx < 0 ? *padding_idx + rows : *padding_idx;
  }
  return at::_embedding_bag(weight, indices.contiguous(), offsets.contiguous(), scale_grad_by_freq,
                            mode, sparse, per_sample_weights, include_last_offset, padding);
}

EmbeddingBag embedding_bag(const Tensor& weight, const Tensor& indices, const Tensor& offsets,
                           bool scale_grad_by_freq, int64_t mode, bool sparse,
                           const OptionalTensor& per_sample_weights, bool include_last_offset) {
  return embedding_bag_padded(weight, indices, offsets, scale_grad_by_freq, mode, sparse,
                              per_sample_weights, include_last_offset, std::nullopt);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::_embedding_bag, &embedding_bag_rule<ops::_embedding_bag>>(),
    rule<ops::_embedding_bag_forward_only, &embedding_bag_rule<ops::_embedding_bag_forward_only>>(),
    composite<ops::_embedding_bag_backward, &embedding_bag_backward>(),
    composite<ops::_embedding_bag_per_sample_weights_backward, &per_sample_weights_backward>(),
    composite<ops::embedding_bag, &embedding_bag>(),
    composite<ops::embedding_bag_padding_idx, &embedding_bag_padded>(),
};

}  // namespace
}  // namespace torchlift
