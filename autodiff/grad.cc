#include "autodiff/grad.h"

#include <ATen/ops/ones.h>
#include <ATen/ops/real.h>

#include "core/error.h"

namespace torchlift::autodiff_internal {

void check_loss(const char* transform, const at::Tensor& loss) {
  if (!loss.defined()) {
    transform_error(transform,
                    "the function returned an undefined tensor; it must return its loss, a tensor "
                    "of shape [].");
  }
  if (loss.dim() != 0) {
    transform_error(transform,
                    "the function must return a scalar, a tensor of shape [], but it returned "
                    "shape ",
                    loss.sizes(), ". Reduce it, as in loss.sum() or loss.mean()",
                    loss.numel() == 1 ? " or loss.squeeze()" : "",
                    "; for the derivatives of a function with many outputs use vjp or jacrev.");
  }
  if (!loss.is_floating_point()) {
    transform_error(
        transform, "the function must return a real floating-point scalar, but it returned dtype ",
        loss.scalar_type(),
        loss.is_complex() ? ". Return a real number of it, as in at::real(loss), or use vjp."
                          : ", which has no derivative. Keep the loss in floating point.");
  }
}

std::vector<at::Tensor> pull_back_loss(const Pullback& pullback, const at::Tensor& loss) {
  std::vector<at::Tensor> cotangents(pullback.outputs().size());
  cotangents[0] = at::ones({}, loss.options());
  return pullback(std::move(cotangents), /*free_graph=*/true);
}

}  // namespace torchlift::autodiff_internal
