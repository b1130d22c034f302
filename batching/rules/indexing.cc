// x[i, :, j] and x[i, :, j] = v: index and index_put, with any of the tensors batched.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_index_put_impl_ops.h>
#include <ATen/ops/_unsafe_index_ops.h>
#include <ATen/ops/_unsafe_index_put_ops.h>
#include <ATen/ops/_unsafe_masked_index_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/_unsafe_masked_index_ops.h>
#include <ATen/ops/_unsafe_masked_index_put_accumulate_compositeexplicitautograd_dispatch.h>
#include <ATen/ops/_unsafe_masked_index_put_accumulate_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/index_ops.h>
#include <ATen/ops/index_put_ops.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "batching/rules/dims.h"
#include "batching/rules/index_places.h"
#include "core/error.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;
namespace explicit_kernels = at::compositeexplicitautograd;

using Indices = std::vector<std::optional<Batched>>;

bool is_mask(const Batched& index) {
  return index.value.scalar_type() == at::kBool || index.value.scalar_type() == at::kByte;
}

int64_t logical_rank(const Batched& index) { return index.value.dim() - (index.bdim ? 1 : 0); }

[[noreturn]] void throw_batched_mask(const char* op, const Batched& mask) {
  unsupported_error("vmap", op, ": the boolean mask of shape ", logical_sizes(as_arg(mask)),
                    " differs between examples, so that each would select another number of "
                    "elements: x[mask] has no "
                    "shape that fits all. Use torchlift.masked_select(x, mask, size=n), which pads "
                    "to a fixed number, or torch.where(mask, x, other), x * mask, masked_fill, "
                    "which keep the shape.");
}

// One index tensor for every indexed dim; a mask that all examples share is the indices of its True
// elements.
class IndexList {
 public:
  IndexList(const char* op, const Indices& indices) {
    for (const std::optional<Batched>& index : indices) {
      if (!index) {
        entries_.push_back(std::nullopt);
      } else if (is_mask(*index)) {
        if (index->bdim) throw_batched_mask(op, *index);
        add_mask(index->value);
      } else {
        add(*index);
      }
    }
  }

  bool batched() const { return batched_; }
  int64_t rank() const { return rank_; }
  const Indices& entries() const { return entries_; }

  Places places(const BatchedArg& self) const {
    std::vector<bool> indexed;
    for (const auto& entry : entries_) indexed.push_back(entry.has_value());
    TORCH_CHECK_INDEX(static_cast<int64_t>(indexed.size()) <= self.logical_dim(),
                      "too many indices for tensor of dimension ", self.logical_dim(), " (got ",
                      indexed.size(), ")");
    return places_of(indexed, self.logical_dim(), rank_);
  }

  // For a value with the batch in front that all indices share: [:, entries...].
  // For one that batched indices go into: [arange(B), entries...], [B, rank dims...] each.
  c10::List<std::optional<at::Tensor>> behind_batch(int64_t batch_size, c10::Device device) const {
    c10::List<std::optional<at::Tensor>> list;
    list.push_back(batched_ ? std::optional<at::Tensor>(examples(batch_size, device))
                            : std::nullopt);
    append_to(list);
    return list;
  }

  // For a value that all examples share.
  c10::List<std::optional<at::Tensor>> plain() const {
    c10::List<std::optional<at::Tensor>> list;
    append_to(list);
    return list;
  }

 private:
  void add(const Batched& index) {
    batched_ = batched_ || index.bdim.has_value();
    rank_ = std::max(rank_, logical_rank(index));
    entries_.push_back(index);
  }

  void add_mask(const at::Tensor& mask) {
    for (const at::Tensor& positions : mask.nonzero().unbind(1)) add({positions, std::nullopt});
    // A 0-d mask indexes no dim; it adds one, which rules do not do.
    TORCH_CHECK_INDEX(mask.dim() > 0,
                      "[vmap] a 0-d boolean index is not supported: use torch.where");
  }

  // 0, 1... along the batch: [B, 1...].
  at::Tensor examples(int64_t batch_size, c10::Device device) const {
    std::vector<int64_t> sizes(rank_ + 1, 1);
    sizes[0] = batch_size;
    return at::arange(batch_size, at::TensorOptions().dtype(at::kLong).device(device)).view(sizes);
  }

  void append_to(c10::List<std::optional<at::Tensor>>& list) const {
    for (const std::optional<Batched>& entry : entries_) {
      list.push_back(entry ? std::optional<at::Tensor>(aligned(as_arg(*entry), rank_))
                           : std::nullopt);
    }
  }

  Indices entries_;
  bool batched_ = false;
  int64_t rank_ = 0;
};

// --- reading -----------------------------------------------------------------------------------

template <class Op>
Batched index_rule(const Level& level, BatchedArg self, const Indices& indices) {
  const IndexList list("index", indices);
  const Places places = list.places(self);
  if (!self.bdim) {
    // One index of rank + 1 dims, of which the batch is the first: it stands where the index does.
    return {Op::call(self.value, list.plain()), places.leading};
  }
  const at::Tensor result =
      Op::call(batch_first(self), list.behind_batch(level.size(), self.value.device()));
  if (!list.batched()) return {result, places.adjacent ? 0 : places.rank};
  if (places.leading == 0 || places.rank == 0) return {result, 0};
  return {result.permute(order_behind_leading(places)), 0};
}

// --- writing -----------------------------------------------------------------------------------

// The values in the shape that the operator has for what it indexes, or one that broadcasts to it:
//   [B or 1, 1..., values...] of 1 + result_rank dims, then moved as the index moves.
at::Tensor values_for(const BatchedArg& values, const IndexList& list, const Places& places) {
  const int64_t rank = places.result_rank();
  TORCH_CHECK_INDEX(values.logical_dim() <= rank, "shape mismatch: value tensor of shape ",
                    logical_sizes(values), " cannot be broadcast to an indexing result of ", rank,
                    " dimensions");
  at::Tensor rows = batch_first(values);
  c10::SmallVector<int64_t, 8> sizes(1 + rank - values.logical_dim(), 1);
  if (values.bdim) sizes[0] = rows.size(0);
  sizes.append(rows.sizes().begin() + (values.bdim ? 1 : 0), rows.sizes().end());
  rows = rows.view(sizes);
  if (!list.batched()) return places.adjacent ? rows : rows.movedim(0, places.rank);
  if (places.leading == 0 || places.rank == 0) return rows;
  return rows.permute(order_in_front_of_leading(places));
}

// x[mask] = v with a mask of each example (of this level, or of one around), which where() can do
// if v has one value for all places the mask selects: v has no dim for them.
bool fills_by_mask(const Indices& indices, const BatchedArg& self, const BatchedArg& values) {
  if (indices.empty() || !indices[0] || !is_mask(*indices[0])) return false;
  if (!indices[0]->bdim && !is_lifted(indices[0]->value)) return false;
  for (size_t i = 1; i < indices.size(); ++i) {
    if (indices[i]) return false;
  }
  const int64_t mask_rank = logical_rank(*indices[0]);
  return mask_rank <= self.logical_dim() && values.logical_dim() <= self.logical_dim() - mask_rank;
}

//   mask [B or 1, mask...] -> [B or 1, mask..., 1...];  values [B, v...] -> [B, 1..., v...]
at::Tensor filled_by_mask(const Level& level, BatchedArg self, const Batched& mask,
                          BatchedArg values, bool accumulate) {
  const int64_t rank = self.logical_dim();
  const at::Tensor rows_of_mask = mask.bdim ? batch_first(as_arg(mask)) : mask.value.unsqueeze(0);
  at::Tensor where = rows_of_mask.to(at::kBool);
  while (where.dim() <= rank) where = where.unsqueeze(-1);
  const at::Tensor rows = expanded(self, level.size());
  const at::Tensor source = aligned(values, rank).to(self.value.scalar_type());
  return at::where(where, accumulate ? rows.add(source) : source, rows);
}

template <class Op, class... Flags>
Batched index_put_rule(const Level& level, BatchedArg self, const Indices& indices,
                       BatchedArg values, bool accumulate, Flags... flags) {
  if (fills_by_mask(indices, self, values)) {
    return {filled_by_mask(level, self, *indices[0], values, accumulate), 0};
  }
  const IndexList list("index_put", indices);
  const Places places = list.places(self);
  return {
      Op::call(expanded(self, level.size()), list.behind_batch(level.size(), self.value.device()),
               values_for(values, list, places), accumulate, flags...),
      0};
}

template <class Op, class... Flags>
void index_put__rule(const Level& level, BatchedArg self, const Indices& indices, BatchedArg values,
                     bool accumulate, Flags... flags) {
  at::Tensor target = batch_first(self);
  if (fills_by_mask(indices, self, values)) {
    target.copy_(filled_by_mask(level, self, *indices[0], values, accumulate));
    return;
  }
  const IndexList list("index_put_", indices);
  const Places places = list.places(self);
  Op::call(target, list.behind_batch(level.size(), self.value.device()),
           values_for(values, list, places), accumulate, flags...);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::index_Tensor, &index_rule<ops::index_Tensor>>(),
    rule<ops::_unsafe_index_Tensor, &index_rule<ops::_unsafe_index_Tensor>>(),
    rule<ops::index_put, &index_put_rule<ops::index_put>>(),
    rule<ops::_unsafe_index_put, &index_put_rule<ops::_unsafe_index_put>>(),
    rule<ops::index_put_, &index_put__rule<ops::index_put_>>(),
    composite<ops::_unsafe_masked_index, &explicit_kernels::_unsafe_masked_index>(),
    composite<ops::_unsafe_masked_index_put_accumulate,
              &explicit_kernels::_unsafe_masked_index_put_accumulate>(),
    rule<ops::_index_put_impl_, &index_put__rule<ops::_index_put_impl_, bool>>(),
};

}  // namespace
}  // namespace torchlift
