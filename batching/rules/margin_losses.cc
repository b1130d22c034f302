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
// An example is one class [], one row [C] or several [N, C]; its target [] or [1] or [N]. All rows
// of the batch go to libtorch's kernel at once with reduction none, [B*N, C] -> [B*N]; then each
// example's rows are reduced.
struct Rows {
  int64_t size;
  int64_t n;

  Rows(const at::Tensor& x, int64_t batch_size)
      : size(batch_size), n(x.dim() == 3 ? x.size(1) : 1) {}

  // [B], [B, C] or [B, N, C] -> [B*N, C].
  static at::Tensor of(const at::Tensor& x) {
    if (x.dim() == 1) return x.unsqueeze(1);
    return x.dim() == 3 ? x.flatten(0, 1) : x;
  }

  // The losses [B*N] of rows as the result; `by_row` if the example's loss has a dim for N.
  at::Tensor reduced(const at::Tensor& losses, int64_t reduction, bool by_row) const {
    const at::Tensor each = losses.view({size, n});
    if (reduction == at::Reduction::None) return by_row ? each : each.squeeze(1);
    return reduction == at::Reduction::Mean ? each.mean(1) : each.sum(1);
  }

  // The cotangent of the result, [B] or [B, N], as those of the rows, [B*N].
  at::Tensor cotangents(const BatchedArg& grad, int64_t reduction) const {
    const at::Tensor g = expanded(grad, size);
    if (g.dim() == 2) return g.flatten();
    const at::Tensor each = reduction == at::Reduction::Mean ? g / static_cast<double>(n) : g;
    return each.unsqueeze(1).expand({size, n}).flatten();
  }
};

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
  std::vector<at::Tensor> results;
  for (int64_t b = 0; b < size; ++b) results.push_back(f(b));
  return {at::stack(results), 0};
}

void check_target(const BatchedArg& target, const Rows& rows) {
  const auto sizes = logical_sizes(target);
  TORCH_CHECK(c10::multiply_integers(sizes) == rows.n,
              "[vmap] multi_margin_loss: expected one target for each of ", rows.n,
              " rows, but got a target of shape ", at::IntArrayRef(sizes));
}

Batched multi_margin(BatchedArg self, BatchedArg target, const at::Scalar& p,
                     const at::Scalar& margin, std::optional<BatchedArg> weight,
                     int64_t reduction) {
  const int64_t size = size_with(weight, {&self, &target});
  const at::Tensor x = expanded(self, size);
  const at::Tensor t = expanded(target, size);
  const Rows rows(x, size);
  check_target(target, rows);
  if (is_batched(weight) && size > 0) {
    const at::Tensor w = batch_first(*weight);
    return by_example(size, [&](int64_t b) {
      return at::multi_margin_loss(x.select(0, b), t.select(0, b), p, margin, w.select(0, b),
                                   reduction);
    });
  }
  const at::Tensor losses = size == 0
                                ? x.new_zeros({0})
                                : at::multi_margin_loss(Rows::of(x), t.flatten(), p, margin,
                                                        value_of(weight), at::Reduction::None);
  return {rows.reduced(losses, reduction, target.logical_dim() > 0), 0};
}

Batched multi_margin_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                              const at::Scalar& p, const at::Scalar& margin,
                              std::optional<BatchedArg> weight, int64_t reduction) {
  const int64_t size = size_with(weight, {&grad, &self, &target});
  const at::Tensor x = expanded(self, size);
  const at::Tensor t = expanded(target, size);
  if (size == 0) return {x.new_zeros(x.sizes()), 0};
  if (is_batched(weight)) {
    const at::Tensor w = batch_first(*weight);
    const at::Tensor g = expanded(grad, size);
    return by_example(size, [&](int64_t b) {
      return at::multi_margin_loss_backward(g.select(0, b), x.select(0, b), t.select(0, b), p,
                                            margin, w.select(0, b), reduction);
    });
  }
  const Rows rows(x, size);
  check_target(target, rows);
  const at::Tensor result =
      at::multi_margin_loss_backward(rows.cotangents(grad, reduction), Rows::of(x), t.flatten(), p,
                                     margin, value_of(weight), at::Reduction::None);
  return {result.view(x.sizes()), 0};
}

std::tuple<Batched, Batched> multilabel_margin(BatchedArg self, BatchedArg target,
                                               int64_t reduction) {
  const int64_t size = batch_size_of({&self, &target});
  const at::Tensor x = expanded(self, size);
  const at::Tensor t = expanded(target, size);
  const Rows rows(x, size);
  const auto [losses, is_target] =
      at::multilabel_margin_loss_forward(Rows::of(x), Rows::of(t), at::Reduction::None);
  return {Batched{rows.reduced(losses, reduction, self.logical_dim() == 2), 0},
          Batched{is_target.view(t.sizes()), 0}};
}

Batched multilabel_margin_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                                   int64_t reduction, BatchedArg is_target) {
  const int64_t size = batch_size_of({&grad, &self, &target, &is_target});
  const at::Tensor x = expanded(self, size);
  const Rows rows(x, size);
  const at::Tensor result = at::multilabel_margin_loss_backward(
      rows.cotangents(grad, reduction), Rows::of(x), Rows::of(expanded(target, size)),
      at::Reduction::None, Rows::of(expanded(is_target, size)));
  return {result.view(x.sizes()), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::multi_margin_loss, &multi_margin>(),
    rule<ops::multi_margin_loss_backward, &multi_margin_backward>(),
    rule<ops::multilabel_margin_loss_forward, &multilabel_margin>(),
    rule<ops::multilabel_margin_loss_backward, &multilabel_margin_backward>(),
};

}  // namespace
}  // namespace torchlift
