// Multi-class margin losses.

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/multi_margin_loss.h>
#include <ATen/ops/multi_margin_loss_backward.h>
#include <ATen/ops/multi_margin_loss_backward_ops.h>
#include <ATen/ops/multi_margin_loss_ops.h>
#include <ATen/ops/multilabel_margin_loss_backward.h>
#include <ATen/ops/multilabel_margin_loss_backward_ops.h>
#include <ATen/ops/multilabel_margin_loss_forward.h>
#include <ATen/ops/multilabel_margin_loss_forward_ops.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/sum.h>

#include "batching/rules/reduction.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

// NOTE [margin rows]
// An example is one row [C] or several [N, C]. All rows of the batch go to libtorch's kernel at
// once with reduction none, [B*N, C] -> [B*N]; then each example's rows are reduced.

// BNC -> (BN)C; BC stays. Likewise for what has one value a row.
at::Tensor rows(const at::Tensor& t, bool has_n) { return has_n ? t.flatten(0, 1) : t; }

at::Tensor unrows(const at::Tensor& t, bool has_n, int64_t size, int64_t n) {
  return has_n ? t.unflatten(0, at::IntArrayRef({size, n})) : t;
}

at::Tensor reduce_rows(const at::Tensor& losses, int64_t reduction) {
  if (reduction == at::Reduction::None || losses.dim() == 1) return losses;
  return reduction == at::Reduction::Mean ? losses.mean(1) : losses.sum(1);
}

// The cotangent of each row, [B] or [B, N].
at::Tensor row_cotangents(const BatchedArg& grad, int64_t reduction, bool has_n, int64_t size,
                          int64_t n) {
  const at::Tensor g = expanded(grad, size);
  if (reduction == at::Reduction::None || !has_n) return g;
  const at::Tensor each = reduction == at::Reduction::Mean ? g / static_cast<double>(n) : g;
  return each.unsqueeze(-1).expand({size, n});
}

std::optional<at::Tensor> value_of(const std::optional<BatchedArg>& arg) {
  return arg && arg->value.defined() ? std::optional<at::Tensor>(arg->value) : std::nullopt;
}

bool is_batched(const std::optional<BatchedArg>& arg) {
  return arg && arg->value.defined() && arg->batched();
}

int64_t size_with(const std::optional<BatchedArg>& weight,
                  std::initializer_list<const BatchedArg*> args) {
  return is_batched(weight) ? weight->value.size(*weight->bdim) : batch_size_of(args);
}

// The kernel has one weight for all rows, so examples with their own go one by one.
template <class F>
Batched by_example(int64_t size, const F& f) {
  TORCH_CHECK(size > 0,
              "[vmap] multi_margin_loss: class weights that differ by example need at least "
              "one example");
  std::vector<at::Tensor> results;
  for (int64_t b = 0; b < size; ++b) results.push_back(f(b));
  return {at::stack(results), 0};
}

Batched multi_margin(BatchedArg self, BatchedArg target, const at::Scalar& p,
                     const at::Scalar& margin, std::optional<BatchedArg> weight,
                     int64_t reduction) {
  const int64_t size = size_with(weight, {&self, &target});
  const at::Tensor x = expanded(self, size);
  const at::Tensor t = expanded(target, size);
  if (is_batched(weight)) {
    const at::Tensor w = batch_first(*weight);
    return by_example(size, [&](int64_t b) {
      return at::multi_margin_loss(x.select(0, b), t.select(0, b), p, margin, w.select(0, b),
                                   reduction);
    });
  }
  const bool has_n = x.dim() == 3;
  const at::Tensor losses = at::multi_margin_loss(rows(x, has_n), rows(t, has_n), p, margin,
                                                  value_of(weight), at::Reduction::None);
  return {reduce_rows(unrows(losses, has_n, size, x.size(1)), reduction), 0};
}

Batched multi_margin_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                              const at::Scalar& p, const at::Scalar& margin,
                              std::optional<BatchedArg> weight, int64_t reduction) {
  const int64_t size = size_with(weight, {&grad, &self, &target});
  const at::Tensor x = expanded(self, size);
  const at::Tensor t = expanded(target, size);
  if (is_batched(weight)) {
    const at::Tensor w = batch_first(*weight);
    const at::Tensor g = expanded(grad, size);
    return by_example(size, [&](int64_t b) {
      return at::multi_margin_loss_backward(g.select(0, b), x.select(0, b), t.select(0, b), p,
                                            margin, w.select(0, b), reduction);
    });
  }
  const bool has_n = x.dim() == 3;
  const int64_t n = x.size(1);
  const at::Tensor g = row_cotangents(grad, reduction, has_n, size, n);
  const at::Tensor result =
      at::multi_margin_loss_backward(rows(g, has_n), rows(x, has_n), rows(t, has_n), p, margin,
                                     value_of(weight), at::Reduction::None);
  return {unrows(result, has_n, size, n), 0};
}

std::tuple<Batched, Batched> multilabel_margin(BatchedArg self, BatchedArg target,
                                               int64_t reduction) {
  const int64_t size = batch_size_of({&self, &target});
  const at::Tensor x = expanded(self, size);
  const bool has_n = x.dim() == 3;
  const int64_t n = x.size(1);
  auto [losses, is_target] = at::multilabel_margin_loss_forward(
      rows(x, has_n), rows(expanded(target, size), has_n), at::Reduction::None);
  return {Batched{reduce_rows(unrows(losses, has_n, size, n), reduction), 0},
          Batched{unrows(is_target, has_n, size, n), 0}};
}

Batched multilabel_margin_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                                   int64_t reduction, BatchedArg is_target) {
  const int64_t size = batch_size_of({&grad, &self, &target, &is_target});
  const at::Tensor x = expanded(self, size);
  const bool has_n = x.dim() == 3;
  const int64_t n = x.size(1);
  const at::Tensor g = row_cotangents(grad, reduction, has_n, size, n);
  const at::Tensor result = at::multilabel_margin_loss_backward(
      rows(g, has_n), rows(x, has_n), rows(expanded(target, size), has_n), at::Reduction::None,
      rows(expanded(is_target, size), has_n));
  return {unrows(result, has_n, size, n), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::multi_margin_loss, &multi_margin>(),
    rule<ops::multi_margin_loss_backward, &multi_margin_backward>(),
    rule<ops::multilabel_margin_loss_forward, &multilabel_margin>(),
    rule<ops::multilabel_margin_loss_backward, &multilabel_margin_backward>(),
};

}  // namespace
}  // namespace torchlift
