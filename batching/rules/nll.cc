// The negative log likelihood losses and cross entropy.

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/cross_entropy_loss_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/cross_entropy_loss_ops.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nll_loss2d_backward.h>
#include <ATen/ops/nll_loss2d_backward_ops.h>
#include <ATen/ops/nll_loss2d_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/nll_loss2d_forward.h>
#include <ATen/ops/nll_loss2d_forward_ops.h>
#include <ATen/ops/nll_loss2d_ops.h>
#include <ATen/ops/nll_loss_backward.h>
#include <ATen/ops/nll_loss_backward_ops.h>
#include <ATen/ops/nll_loss_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/nll_loss_forward.h>
#include <ATen/ops/nll_loss_forward_ops.h>
#include <ATen/ops/nll_loss_nd.h>
#include <ATen/ops/nll_loss_nd_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/nll_loss_nd_ops.h>
#include <ATen/ops/nll_loss_ops.h>
#include <ATen/ops/scatter.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "batching/rules/reduction.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

// NOTE [nll rows]
// One example is [C] with target [], [N, C] with [N], or (2d) [N, C, H, W] with [N, H, W]; with a
// batch B in front, the class dim is 1 + (logical rank > 1). Every (b, n, h, w) is a *row*. The
// rules take the loss of each row with reduction none, by libtorch's kernel with B folded into N,
// and reduce by example: the mean divides by the example's own total weight. When only one of self
// and target is batched, or the class weights are, nothing can be folded without copies, and rows
// are gathered instead.

bool is_defined(const std::optional<BatchedArg>& arg) { return arg && arg->value.defined(); }

struct Rows {
  at::Tensor self;                   // [B, (N,) C, ...]
  at::Tensor target;                 // [B, (N,) ...]
  std::optional<at::Tensor> weight;  // [C], or [B, C] if weight_batched
  bool weight_batched;
  int64_t class_dim;
  int64_t ignore_index;

  // Whether libtorch's kernel can take all rows at once.
  bool folds;

  int64_t batch() const { return target.size(0); }
  bool has_n() const { return target.dim() > 1; }

  at::Tensor folded(const at::Tensor& t) const { return has_n() ? t.flatten(0, 1) : t; }
  at::Tensor unfolded(const at::Tensor& t) const {
    return has_n() ? t.unflatten(0, at::IntArrayRef({batch(), target.size(1)})) : t;
  }
};

Rows rows_of(const BatchedArg& self, const BatchedArg& target,
             const std::optional<BatchedArg>& weight, int64_t ignore_index) {
  const bool weight_batched = is_defined(weight) && weight->bdim.has_value();
  int64_t size = 0;
  if (weight_batched) {
    size = weight->value.size(*weight->bdim);
  } else {
    size = batch_size_of({&self, &target});
  }
  Rows rows{.self = expanded(self, size),
            .target = expanded(target, size),
            .weight = std::nullopt,
            .weight_batched = weight_batched,
            .class_dim = self.logical_dim() > 1 ? 2 : 1,
            .ignore_index = ignore_index,
            .folds = self.batched() && target.batched() && !weight_batched};
  if (is_defined(weight)) rows.weight = batch_first(*weight);
  return rows;
}

// The targets with ignored ones replaced by a class that exists.
at::Tensor safe_target(const Rows& rows) {
  return rows.target.masked_fill(rows.target == rows.ignore_index, 0);
}

// The weight of each row: 0 where ignored.
at::Tensor row_weights(const Rows& rows) {
  const at::Tensor kept = rows.target != rows.ignore_index;
  if (!rows.weight.has_value()) return kept.to(rows.self.scalar_type());
  const at::Tensor safe = safe_target(rows);
  at::Tensor per_row;
  if (rows.weight_batched) {
    per_row = rows.weight->gather(1, flattened({safe, 0})).reshape(safe.sizes());
  } else {
    per_row = rows.weight->index_select(0, safe.flatten()).reshape(safe.sizes());
  }
  return per_row * kept;
}

at::Tensor gathered_losses(const Rows& rows) {
  const at::Tensor index = safe_target(rows).unsqueeze(rows.class_dim);
  const at::Tensor picked = rows.self.gather(rows.class_dim, index).squeeze(rows.class_dim);
  // where, since an ignored row's -inf times 0 would be nan.
  const at::Tensor weighted = rows.weight.has_value() ? picked * row_weights(rows) : picked;
  return weighted.neg().masked_fill(rows.target == rows.ignore_index, 0);
}

template <bool kIs2d>
at::Tensor row_losses(const Rows& rows) {
  if (!rows.folds) return gathered_losses(rows);
  const at::Tensor self = rows.folded(rows.self);
  const at::Tensor target = rows.folded(rows.target);
  if constexpr (kIs2d) {
    return rows.unfolded(std::get<0>(
        at::nll_loss2d_forward(self, target, rows.weight, at::Reduction::None, rows.ignore_index)));
  } else {
    return rows.unfolded(std::get<0>(
        at::nll_loss_forward(self, target, rows.weight, at::Reduction::None, rows.ignore_index)));
  }
}

// [B, ...] -> [B]
at::Tensor sum_rows(const at::Tensor& t) { return t.dim() == 1 ? t : t.flatten(1).sum(-1); }

template <bool kIs2d>
std::tuple<Batched, Batched> nll_forward(BatchedArg self, BatchedArg target,
                                         std::optional<BatchedArg> weight, int64_t reduction,
                                         int64_t ignore_index) {
  const Rows rows = rows_of(self, target, weight, ignore_index);
  const at::Tensor losses = row_losses<kIs2d>(rows);
  if (reduction == at::Reduction::None) {
    return {Batched{losses, 0}, Batched{at::zeros({}, losses.options()), std::nullopt}};
  }
  const at::Tensor total_weight = sum_rows(row_weights(rows));
  const at::Tensor total = sum_rows(losses);
  if (reduction == at::Reduction::Sum) return {Batched{total, 0}, Batched{total_weight, 0}};
  return {Batched{total / total_weight, 0}, Batched{total_weight, 0}};
}

// The cotangent of each row's loss, [B, ...] like target.
at::Tensor row_cotangents(const Rows& rows, const BatchedArg& grad, int64_t reduction,
                          const BatchedArg& total_weight) {
  if (reduction == at::Reduction::None) return expanded(grad, rows.batch());
  at::Tensor g = expanded(grad, rows.batch());
  if (reduction == at::Reduction::Mean) {
    g = g / batch_first(total_weight);
  }
  return with_ones(g, rows.target.dim() - 1).expand(rows.target.sizes());
}

at::Tensor scattered_grads(const Rows& rows, const at::Tensor& cotangents) {
  const at::Tensor ignored = rows.target == rows.ignore_index;
  const at::Tensor weighted = rows.weight.has_value() ? cotangents * row_weights(rows) : cotangents;
  const at::Tensor source = weighted.neg().masked_fill(ignored, 0);
  const at::Tensor zeros = at::zeros(rows.self.sizes(), source.options());
  return zeros.scatter(rows.class_dim, safe_target(rows).unsqueeze(rows.class_dim),
                       source.unsqueeze(rows.class_dim));
}

template <bool kIs2d>
Batched nll_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                     std::optional<BatchedArg> weight, int64_t reduction, int64_t ignore_index,
                     BatchedArg total_weight) {
  const int64_t size = is_defined(weight)
                           ? batch_size_of({&grad, &self, &target, &total_weight, &*weight})
                           : batch_size_of({&grad, &self, &target, &total_weight});
  const at::Tensor self_value = expanded(self, size);
  const at::Tensor target_value = expanded(target, size);
  const Rows rows = rows_of({self_value, 0}, {target_value, 0}, weight, ignore_index);
  const at::Tensor cotangents = row_cotangents(rows, grad, reduction, total_weight);
  if (!rows.folds || !self.batched() || !target.batched()) {
    return {scattered_grads(rows, cotangents), 0};
  }
  // The kernel looks at the total weight only for a mean. A trace keeps it as a constant, which
  // must not be another one each time.
  const at::Tensor unused = at::zeros({}, self.value.options());
  const at::Tensor g = rows.folded(cotangents);
  const at::Tensor x = rows.folded(rows.self);
  const at::Tensor t = rows.folded(rows.target);
  if constexpr (kIs2d) {
    return {rows.unfolded(at::nll_loss2d_backward(g, x, t, rows.weight, at::Reduction::None,
                                                  ignore_index, unused)),
            0};
  } else {
    return {rows.unfolded(at::nll_loss_backward(g, x, t, rows.weight, at::Reduction::None,
                                                ignore_index, unused)),
            0};
  }
}

// --- cross entropy -------------------------------------------------------------------------------

// The smoothing term of a mean divides by the weights of the targets that count.
at::Tensor smoothing_weight(const at::Tensor& target, const at::Tensor& ignored,
                            const std::optional<at::Tensor>& weight, const at::Tensor& like) {
  if (!weight.has_value() || !weight->defined())
    return ignored.logical_not().sum().to(like.scalar_type());
  const at::Tensor safe = target.masked_fill(ignored, 0).flatten();
  return weight->gather(0, safe).masked_fill(ignored.flatten(), 0).sum();
}

// libtorch's decomposition writes the ignored targets into its losses in place, which cannot be
// done when only the targets are batched. This one does not.
at::Tensor smoothed_cross_entropy(const at::Tensor& self, const at::Tensor& target,
                                  const std::optional<at::Tensor>& weight, int64_t reduction,
                                  c10::SymInt ignore_index, double smoothing) {
  const int64_t class_dim = self.dim() == 1 ? 0 : 1;
  const at::Tensor input = at::log_softmax(self, class_dim, self.scalar_type());
  const at::Tensor nll = at::nll_loss_nd_symint(input, target, weight, reduction, ignore_index);
  at::Tensor scaled = input;
  if (weight.has_value() && weight->defined()) {
    c10::SmallVector<int64_t, 6> sizes(input.dim(), 1);
    sizes[class_dim] = weight->size(0);
    scaled = input * weight->view(sizes);
  }
  const at::Tensor ignored = target == ignore_index.guard_int(__FILE__, __LINE__);
  at::Tensor smooth = scaled.sum(class_dim).neg().masked_fill(ignored, 0);
  if (reduction != at::Reduction::None) smooth = smooth.sum();
  if (reduction == at::Reduction::Mean) {
    smooth = smooth / smoothing_weight(target, ignored, weight, smooth);
  }
  return nll * (1 - smoothing) + smooth * (smoothing / static_cast<double>(self.size(class_dim)));
}

at::Tensor cross_entropy(const at::Tensor& self, const at::Tensor& target,
                         const std::optional<at::Tensor>& weight, int64_t reduction,
                         c10::SymInt ignore_index, double smoothing) {
  const bool probabilities = self.sizes() == target.sizes();
  if (smoothing > 0 && smoothing <= 1 && !probabilities) {
    return smoothed_cross_entropy(self, target, weight, reduction, std::move(ignore_index),
                                  smoothing);
  }
  return at::compositeimplicitautograd::cross_entropy_loss_symint(
      self, target, weight, reduction, std::move(ignore_index), smoothing);
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::nll_loss_forward, &nll_forward<false>>(),
    rule<ops::nll_loss_backward, &nll_backward<false>>(),
    rule<ops::nll_loss2d_forward, &nll_forward<true>>(),
    rule<ops::nll_loss2d_backward, &nll_backward<true>>(),
    composite<ops::cross_entropy_loss, &cross_entropy>(),
    composite<ops::nll_loss_nd, &at::compositeimplicitautograd::nll_loss_nd_symint>(),
    composite<ops::nll_loss, &at::compositeimplicitautograd::nll_loss_symint>(),
    composite<ops::nll_loss2d, &at::compositeimplicitautograd::nll_loss2d_symint>(),
};

}  // namespace
}  // namespace torchlift
