// Embedding tables.

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward_ops.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/embedding_dense_backward_ops.h>
#include <ATen/ops/embedding_ops.h>
#include <ATen/ops/embedding_renorm.h>
#include <ATen/ops/embedding_renorm_ops.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "batching/rules/reduction.h"
#include "core/boxed.h"
#include "core/promotion.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

// NOTE [one table for all]
// B tables of V rows are one table of B*V rows in which example b's index i is b*V + i. So the
// gradients of a batch of tables are one kernel, and counts by index (scale_grad_by_freq) stay
// apart too. In lookups an index that is out of one table could be in the common one: there such
// ones are moved out of that as well.

// indices [B, ...] as indices into the common table.
at::Tensor in_common_table(const at::Tensor& indices, int64_t rows) {
  const at::Tensor examples = at::arange(indices.size(0), indices.options());
  return indices + with_ones(examples * rows, indices.dim() - 1);
}

// An operator for each example; B kernels, for cases too rare for a formula.
Batched embedding_by_example(const BatchedArg& weight, const BatchedArg& indices,
                             int64_t padding_idx, bool scale_grad_by_freq, bool sparse) {
  const int64_t size = batch_size_of({&weight, &indices});
  const at::Tensor tables = expanded(weight, size);
  const at::Tensor index = expanded(indices, size);
  std::vector<at::Tensor> results;
  for (int64_t b = 0; b < size; ++b) {
    results.push_back(at::embedding(tables.select(0, b), index.select(0, b), padding_idx,
                                    scale_grad_by_freq, sparse));
  }
  return {at::stack(results), 0};
}

// BVD, I -> BID
at::Tensor lookup_shared_index(const at::Tensor& tables, const at::Tensor& indices) {
  at::Tensor rows = tables.index_select(1, indices.flatten());
  if (indices.dim() == 1) return rows;
  c10::SmallVector<int64_t, 8> sizes{rows.size(0)};
  sizes.append(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(rows.size(2));
  return rows.reshape(sizes);
}

// As in_common_table, but what is out of its own table is out of the common one.
at::Tensor checked_in_common_table(const at::Tensor& indices, int64_t rows) {
  const at::Tensor is_out = indices.ne(indices.clamp(0, rows - 1));
  return in_common_table(indices, rows).masked_fill(is_out, -1);
}

// From how many numbers of the result, and of a row, on rows are copied as such. gather, which
// reads an index for each number, starts sooner, and takes up to 5 times as long. Measured.
constexpr int64_t kManyNumbers = int64_t{1} << 13;
constexpr int64_t kWideRow = 4;

// BVD, BI -> BID
at::Tensor lookup_own_index(const at::Tensor& tables, const at::Tensor& indices) {
  const int64_t width = tables.size(2);
  if (width >= kWideRow && tables.is_contiguous() && indices.numel() * width >= kManyNumbers) {
    return at::embedding(tables.flatten(0, 1),
                         checked_in_common_table(indices.to(at::kLong), tables.size(1)));
  }
  const at::Tensor flat = flattened({indices, 0});
  const at::Tensor index = flat.unsqueeze(-1).expand({flat.size(0), flat.size(1), width});
  c10::SmallVector<int64_t, 8> sizes(indices.sizes().begin(), indices.sizes().end());
  sizes.push_back(width);
  return tables.gather(1, index.to(at::kLong)).reshape(sizes);
}

Batched embedding_rule(BatchedArg weight, BatchedArg indices, int64_t padding_idx,
                       bool scale_grad_by_freq, bool sparse) {
  const bool counts = scale_grad_by_freq && indices.batched();
  const bool pads = padding_idx >= 0 && weight.batched();
  const bool scales = scale_grad_by_freq && weight.batched();
  // Gradients that depend on more than the lookup need libtorch's own operator for each example.
  if ((counts || pads || scales) && batch_size_of({&weight, &indices}) > 0 &&
      is_tracked_outside(weight.value)) {
    return embedding_by_example(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  if (!weight.batched()) {
    return {at::embedding(weight.value, indices.value, padding_idx, scale_grad_by_freq, sparse),
            indices.bdim};
  }
  TORCH_CHECK(weight.logical_dim() == 2, "[vmap] embedding: expected a table of 2 dims, but each ",
              "example's has ", weight.logical_dim(), " dims");
  const at::Tensor tables = batch_first(weight);
  if (!indices.batched()) return {lookup_shared_index(tables, indices.value), 0};
  return {lookup_own_index(tables, batch_first(indices)), 0};
}

// I.D, I -> VD for each example
Batched dense_backward(BatchedArg grad, BatchedArg indices, int64_t num_weights,
                       int64_t padding_idx, bool scale_grad_by_freq) {
  if (!indices.batched()) {
    // The tables side by side: I(BD), I -> V(BD)
    const at::Tensor g = grad.value.movedim(*grad.bdim, -2);
    const at::Tensor result = at::embedding_dense_backward(
        g.flatten(-2), indices.value, num_weights, padding_idx, scale_grad_by_freq);
    return {result.unflatten(-1, g.sizes().slice(g.dim() - 2)), 1};
  }
  const int64_t size = batch_size_of({&indices});
  const at::Tensor index = batch_first(indices);
  at::Tensor g = expanded(grad, size);
  if (padding_idx >= 0) g = g.masked_fill((index == padding_idx).unsqueeze(-1), 0);
  const int64_t width = g.size(-1);
  const at::Tensor result = at::embedding_dense_backward(
      g.reshape({index.numel(), width}), in_common_table(index, num_weights).flatten(),
      size * num_weights, /*padding_idx=*/-1, scale_grad_by_freq);
  return {result.view({size, num_weights, width}), 0};
}

// Sparse gradients cannot be batched: under vmap they are dense. (No rule of its own: libtorch
// makes this operator of others, so it has no autograd kernel that a rule could stand below.)
at::Tensor embedding_backward(const at::Tensor& grad, const at::Tensor& indices,
                              c10::SymInt num_weights, c10::SymInt padding_idx,
                              bool scale_grad_by_freq, bool /*sparse*/) {
  return at::embedding_dense_backward_symint(grad, indices, std::move(num_weights),
                                             std::move(padding_idx), scale_grad_by_freq);
}

// Tables one below the other, and the rows that the examples look into.
at::Tensor rows_of_tables(const at::Tensor& tables, const BatchedArg& indices) {
  return in_common_table(expanded(indices, tables.size(0)), tables.size(1)).flatten();
}

Batched embedding_renorm_rule(BatchedArg self, BatchedArg indices, double max_norm,
                              double norm_type) {
  const int64_t size = batch_size_of({&self, &indices});
  const at::Tensor tables = expanded(self, size);
  const at::Tensor result = at::embedding_renorm(
      tables.flatten(0, 1), rows_of_tables(tables, indices), max_norm, norm_type);
  return {result.view(tables.sizes()), 0};
}

// NOTE [a table from outside]
// A row comes out the same however often it is renormalised, and depends on no other row. So a loop
// over examples that look into one table from outside would leave it as one call does with the
// indices of all of them, and each example would find its rows renormalised. A table that the
// function makes is every example's own. Where tables differ between the examples of this level,
// the levels around tell the same: the copy that they see belongs to no level that the tables do
// not belong to.
void renorm_tables(const at::Tensor& tables, const BatchedArg& indices, double max_norm,
                   double norm_type) {
  at::Tensor rows;
  {
    const RuleDepthScope as_tables(depth_of(tables) + 1);
    rows = tables.clone(at::MemoryFormat::Contiguous).flatten(0, 1);
  }
  ops::embedding_renorm_::call(rows, rows_of_tables(tables, indices), max_norm, norm_type);
  tables.copy_(rows.view(tables.sizes()));
}

void embedding_renorm__rule(const c10::OperatorHandle& op, const LevelPtr& level,
                            torch::jit::Stack* stack) {
  const std::vector<c10::IValue> args = torch::jit::pop(*stack, 4);
  at::Tensor self = args[0].toTensor();
  const Lowered indices = lower(args[1].toTensor(), *level);
  const double max_norm = args[2].toDouble(), norm_type = args[3].toDouble();
  if (depth_of(self) < level->depth()) {
    ops::embedding_renorm_::call(self, indices.value.reshape(-1), max_norm, norm_type);
  } else {
    promote(op.schema().name().c_str(), self, level);
    const WriteScope writing(as_lifted(self));
    const Lowered tables = lower(self, *level);
    renorm_tables(batch_first(as_arg(tables)), as_arg(indices), max_norm, norm_type);
  }
  stack->push_back(args[0]);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::embedding, &embedding_rule>(),
    rule<ops::embedding_dense_backward, &dense_backward>(),
    composite<ops::embedding_backward, &embedding_backward>(),
    rule<ops::embedding_renorm, &embedding_renorm_rule>(),
    boxed_rule("aten::embedding_renorm_", "", &embedding_renorm__rule),
};

}  // namespace
}  // namespace torchlift
