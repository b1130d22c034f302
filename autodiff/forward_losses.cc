// Forward mode of losses and activations whose formula libtorch lacks, or has for one order only.

#include <ATen/core/Reduction.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_ctc_loss_backward_ops.h>
#include <ATen/ops/_ctc_loss_ops.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/glu_ops.h>
#include <ATen/ops/multi_margin_loss_backward_ops.h>
#include <ATen/ops/multi_margin_loss_ops.h>
#include <ATen/ops/multilabel_margin_loss_backward_ops.h>
#include <ATen/ops/multilabel_margin_loss_forward_ops.h>
#include <ATen/ops/native_dropout_backward_ops.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/soft_margin_loss_backward_ops.h>

#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "batching/rules/linear_cross_entropy.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

Tensor reduced(const Tensor& loss, int64_t reduction) {
  if (reduction == at::Reduction::Mean) return loss.mean();
  return reduction == at::Reduction::Sum ? loss.sum() : loss;
}

// log(1 + exp(-y x)), differentiated by x.
Tensor soft_margin_loss_backward(const Tensor& grad, const Tensor& self, const Tensor& target,
                                 int64_t reduction) {
  const Tensor result = (target * at::sigmoid((target * self).neg()) * grad).neg();
  return reduction == at::Reduction::Mean ? result / static_cast<double>(self.numel()) : result;
}

// NC, N: the sum over c other than y of max(0, margin - x[y] + x[c])^p w[y] / C; C alone is one
// row.
Tensor multi_margin_loss(const Tensor& self, const Tensor& target, const at::Scalar& p,
                         const at::Scalar& margin, const OptionalTensor& weight,
                         int64_t reduction) {
  const Tensor x = self.dim() < 2 ? self.reshape({1, self.numel()}) : self;
  const Tensor y = target.reshape({-1, 1});
  const Tensor others = at::arange(x.size(1), y.options()).ne(y);
  Tensor loss = (x - x.gather(1, y) + margin).relu().pow(p) * others.to(x.scalar_type());
  if (weight.has_value() && weight->defined()) {
    loss = loss * weight->index_select(0, y.squeeze(1)).unsqueeze(1);
  }
  loss = loss.mean(1);
  const Tensor result = reduced(loss, reduction);
  return target.dim() == 0 ? result.reshape({}) : result;
}

// NC, NC: the sum over targets y and other classes c of max(0, 1 - x[y] + x[c]) / C. The targets of
// a row end at the first negative number.
std::tuple<Tensor, Tensor> multilabel_margin_loss(const Tensor& self, const Tensor& target,
                                                  int64_t reduction) {
  const Tensor is_target =
      std::get<1>(ops::multilabel_margin_loss_forward::call(self.detach(), target, reduction));
  const int64_t classes = self.dim() == 0 ? 1 : self.size(-1);
  const Tensor x = self.reshape({-1, classes}), y = target.reshape({-1, classes});
  // NT: which of the entries are targets.
  const Tensor counts = y.ge(0).to(at::kLong).cumprod(1).to(x.scalar_type());
  const Tensor chosen = x.gather(1, y.clamp_min(0));
  // NTC
  const Tensor others = (1 - is_target.reshape({-1, 1, classes})) * counts.unsqueeze(2);
  const Tensor margins = (1 - chosen.unsqueeze(2) + x.unsqueeze(1)).relu();
  const Tensor loss = (margins * others).sum(std::vector<int64_t>{1, 2}) / classes;
  const Tensor result = reduced(loss, reduction);
  return {self.dim() < 2 ? result.reshape({}) : result, is_target};
}

// The loss of a row depends on that row alone, so that its tangent is its gradient (TNC) times the
// tangent. The gradient is that of libtorch, which holds for normalised log_probs and has no
// derivative itself.
template <class Op, class Backward, class Lengths>
std::tuple<Tensor, Tensor> ctc_loss(const Tensor& log_probs, const Tensor& targets,
                                    Lengths input_lengths, Lengths target_lengths, int64_t blank,
                                    bool zero_infinity) {
  const Tensor tangent = log_probs._fw_grad(/*level=*/0);
  const Tensor primal = log_probs._fw_primal(/*level=*/0);
  auto [loss, log_alpha] =
      Op::call(primal, targets, input_lengths, target_lengths, blank, zero_infinity);
  const Tensor ones = at::ones_like(loss);
  const Tensor slope = Backward::call(ones, primal, targets, input_lengths, target_lengths, loss,
                                      log_alpha, blank, zero_infinity);
  const bool one_row = log_probs.dim() == 2;
  const std::vector<int64_t> dims =
      one_row ? std::vector<int64_t>{0, 1} : std::vector<int64_t>{0, 2};
  loss._set_fw_grad((slope * tangent).sum(dims), /*level=*/0, /*is_inplace_op=*/false);
  return {loss, log_alpha};
}

Tensor glu(const Tensor& self, int64_t dim) {
  const int64_t half = self.size(dim) / 2;
  TORCH_CHECK(self.size(dim) % 2 == 0, "Halving dimension must be even, but dimension ", dim,
              " is size ", self.size(dim));
  return self.narrow(dim, 0, half) * at::sigmoid(self.narrow(dim, half, half));
}

Tensor native_dropout_backward(const Tensor& grad, const Tensor& mask, double scale) {
  return grad * mask * scale;
}

}  // namespace

std::vector<ForwardKernel> loss_formulas() {
  using Ctc = ops::_ctc_loss;
  using CtcTensor = ops::_ctc_loss_Tensor;
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<LinearCrossEntropy, &LinearCrossEntropy::decomposed>());
  kernels.push_back(made<LinearCrossEntropyRows, &LinearCrossEntropyRows::decomposed>());
  kernels.push_back(made<ops::soft_margin_loss_backward, &soft_margin_loss_backward>());
  kernels.push_back(made<ops::multi_margin_loss, &multi_margin_loss>());
  kernels.push_back(made<ops::multilabel_margin_loss_forward, &multilabel_margin_loss>());
  kernels.push_back(linear_in_first<ops::multi_margin_loss_backward>());
  kernels.push_back(linear_in_first<ops::multilabel_margin_loss_backward>());
  kernels.push_back(made<Ctc, &ctc_loss<Ctc, ops::_ctc_loss_backward, at::IntArrayRef>>());
  kernels.push_back(
      made<CtcTensor, &ctc_loss<CtcTensor, ops::_ctc_loss_backward_Tensor, const Tensor&>>());
  kernels.push_back(linear_in_first<ops::_ctc_loss_backward>());
  kernels.push_back(linear_in_first<ops::_ctc_loss_backward_Tensor>());
  kernels.push_back(made<ops::glu, &glu>());
  kernels.push_back(made<ops::native_dropout_backward, &native_dropout_backward>());
  return kernels;
}

}  // namespace torchlift::forward_internal
