// Losses that compare an input with a target element by element, then reduce.

#include <ATen/ExpandUtils.h>
#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/binary_cross_entropy.h>
#include <ATen/ops/binary_cross_entropy_backward.h>
#include <ATen/ops/binary_cross_entropy_backward_ops.h>
#include <ATen/ops/binary_cross_entropy_ops.h>
#include <ATen/ops/binary_cross_entropy_with_logits.h>
#include <ATen/ops/binary_cross_entropy_with_logits_ops.h>
#include <ATen/ops/dist_ops.h>
#include <ATen/ops/huber_loss_backward_ops.h>
#include <ATen/ops/huber_loss_ops.h>
#include <ATen/ops/mean.h>
#include <ATen/ops/mse_loss_backward_ops.h>
#include <ATen/ops/mse_loss_ops.h>
#include <ATen/ops/norm.h>
#include <ATen/ops/smooth_l1_loss_backward_ops.h>
#include <ATen/ops/smooth_l1_loss_ops.h>
#include <ATen/ops/soft_margin_loss.h>
#include <ATen/ops/soft_margin_loss_backward.h>
#include <ATen/ops/soft_margin_loss_backward_ops.h>
#include <ATen/ops/soft_margin_loss_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/sum.h>

#include "batching/rules/pointwise.h"
#include "batching/rules/reduction.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

// NOTE [losses by example]
// The operator runs with reduction none over the whole batch; then each example is reduced alone.
// Backward, the cotangent of an example is spread over its elements first (divided by their number
// for a mean), and libtorch's backward runs with reduction none.

Batched reduce_examples(const Batched& losses, int64_t reduction) {
  if (reduction == at::Reduction::None || losses.value.dim() == 1) return losses;
  const Dimmed in = dimmed(as_arg(losses));
  const DimList dims = in.all_dims();
  if (reduction == at::Reduction::Mean) return {losses.value.mean(dims), 0};
  return {losses.value.sum(dims), 0};
}

// What a mean divides by, backward. (Of self alone, as in libtorch: a target that broadcasts must
// be expanded by the caller, which the Python functions do.)
int64_t example_numel(const BatchedArg& self) {
  int64_t count = 1;
  for (const int64_t s : logical_sizes(self)) count *= s;
  return count;
}

// The cotangent of an element's loss, as the examples' [] or as grad is.
at::Tensor element_cotangent(const BatchedArg& grad, int64_t reduction, int64_t numel) {
  if (reduction != at::Reduction::Mean || numel == 1) return grad.value;
  return grad.value / static_cast<double>(numel);
}

// Operators (self, target, reduction, ...).
template <class Op, class... Extra>
Batched loss(BatchedArg self, BatchedArg target, int64_t reduction, Extra... extra) {
  const Batched losses = pointwise<Op>(self, target, int64_t{at::Reduction::None}, extra...);
  return reduce_examples(losses, reduction);
}

// Operators (grad, self, target, reduction, ...).
template <class Op, class... Extra>
Batched loss_backward(BatchedArg grad, BatchedArg self, BatchedArg target, int64_t reduction,
                      Extra... extra) {
  const at::Tensor g = element_cotangent(grad, reduction, example_numel(self));
  return pointwise<Op>(BatchedArg{g, grad.bdim}, self, target, int64_t{at::Reduction::None},
                       extra...);
}

// --- binary cross entropy: input, target and weights of one shape --------------------------------

// The kernels squeeze their operands and work in place, so they get them all in the full shape.
struct FullShape {
  int64_t batch;
  int64_t rank;
  std::vector<int64_t> sizes;

  FullShape(const BatchedArg& self, const BatchedArg& target, int64_t batch_size)
      : batch(batch_size), rank(std::max(self.logical_dim(), target.logical_dim())) {
    sizes = at::infer_size(logical_sizes(self), logical_sizes(target));
    sizes.insert(sizes.begin(), batch);
  }
  at::Tensor operator()(const BatchedArg& arg) const { return aligned(arg, rank).expand(sizes); }
  std::optional<at::Tensor> operator()(const std::optional<BatchedArg>& arg) const {
    if (!arg || !arg->value.defined()) return std::nullopt;
    return (*this)(*arg);
  }
};

// An argument that is not there has no batch dim.
const BatchedArg& or_none(const std::optional<BatchedArg>& arg) {
  static const at::Tensor undefined;
  static const BatchedArg none{undefined, std::nullopt};
  return arg.has_value() ? *arg : none;
}

void check_same_size(const char* name, const BatchedArg& self, const BatchedArg& target) {
  const auto own = logical_sizes(self);
  const auto other = logical_sizes(target);
  TORCH_CHECK(own == other, "[vmap] ", name, ": target size (", at::IntArrayRef(other),
              ") must be the same as input size (", at::IntArrayRef(own), ")");
}

Batched bce(BatchedArg self, BatchedArg target, std::optional<BatchedArg> weight,
            int64_t reduction) {
  check_same_size("binary_cross_entropy", self, target);
  const FullShape full(self, target, batch_size_of({&self, &target, &or_none(weight)}));
  const at::Tensor losses =
      at::binary_cross_entropy(full(self), full(target), full(weight), at::Reduction::None);
  return reduce_examples({losses, 0}, reduction);
}

Batched bce_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                     std::optional<BatchedArg> weight, int64_t reduction) {
  const FullShape full(self, target, batch_size_of({&grad, &self, &target, &or_none(weight)}));
  const at::Tensor g = element_cotangent(grad, reduction, example_numel(self));
  return {at::binary_cross_entropy_backward(full(BatchedArg{g, grad.bdim}), full(self),
                                            full(target), full(weight), at::Reduction::None),
          0};
}

Batched bce_with_logits(BatchedArg self, BatchedArg target, std::optional<BatchedArg> weight,
                        std::optional<BatchedArg> pos_weight, int64_t reduction) {
  check_same_size("binary_cross_entropy_with_logits", self, target);
  const int64_t size = batch_size_of({&self, &target, &or_none(weight), &or_none(pos_weight)});
  const FullShape full(self, target, size);
  const at::Tensor losses = at::binary_cross_entropy_with_logits(
      full(self), full(target), full(weight), full(pos_weight), at::Reduction::None);
  return reduce_examples({losses, 0}, reduction);
}

// --- soft margin: the kernels write results of self's shape --------------------------------------

Batched soft_margin(BatchedArg self, BatchedArg target, int64_t reduction) {
  const FullShape full(self, target, batch_size_of({&self, &target}));
  return reduce_examples({at::soft_margin_loss(full(self), full(target), at::Reduction::None), 0},
                         reduction);
}

Batched soft_margin_backward(BatchedArg grad, BatchedArg self, BatchedArg target,
                             int64_t reduction) {
  const FullShape full(self, target, batch_size_of({&grad, &self, &target}));
  const at::Tensor g = element_cotangent(grad, reduction, example_numel(self));
  return {at::soft_margin_loss_backward(full(BatchedArg{g, grad.bdim}), full(self), full(target),
                                        at::Reduction::None),
          0};
}

// --- the norm of a difference --------------------------------------------------------------------

Batched dist_rule(BatchedArg self, BatchedArg other, const at::Scalar& p) {
  const Batched difference = pointwise<ops::sub_Tensor>(self, other, at::Scalar(1));
  const Dimmed in = dimmed(as_arg(difference));
  return {at::norm(in.value, p, in.all_dims(), /*keepdim=*/false), 0};
}

[[maybe_unused]] const RuleSet kRules{
    rule<ops::mse_loss, &loss<ops::mse_loss>>(),
    rule<ops::mse_loss_backward, &loss_backward<ops::mse_loss_backward>>(),
    rule<ops::smooth_l1_loss, &loss<ops::smooth_l1_loss, double>>(),
    rule<ops::smooth_l1_loss_backward, &loss_backward<ops::smooth_l1_loss_backward, double>>(),
    rule<ops::huber_loss, &loss<ops::huber_loss, double>>(),
    rule<ops::huber_loss_backward, &loss_backward<ops::huber_loss_backward, double>>(),
    rule<ops::soft_margin_loss, &soft_margin>(),
    rule<ops::soft_margin_loss_backward, &soft_margin_backward>(),
    rule<ops::binary_cross_entropy, &bce>(),
    rule<ops::binary_cross_entropy_backward, &bce_backward>(),
    rule<ops::binary_cross_entropy_with_logits, &bce_with_logits>(),
    rule<ops::dist, &dist_rule>(),
};

}  // namespace
}  // namespace torchlift
