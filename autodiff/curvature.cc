#include "autodiff/curvature.h"

#include <ATen/ops/div.h>
#include <ATen/ops/rand.h>

#include "autodiff/jacobian_rows.h"
#include "core/error.h"

namespace torchlift::autodiff_internal {

std::vector<at::Tensor> random_signs(const std::vector<at::Tensor>& inputs, int64_t samples) {
  if (samples <= 0) {
    transform_error("laplacian", "samples is ", samples,
                    ", but it is the number of random directions. Give 1 or more, or leave it out "
                    "for the exact value.");
  }
  std::vector<at::Tensor> signs;
  for (const at::Tensor& input : inputs) {
    const at::Tensor heads = at::rand(joined({samples}, input.sizes()), input.options()).lt(0.5);
    signs.push_back(heads.to(input.scalar_type()).mul(2).sub(1));
  }
  return signs;
}

std::vector<at::Tensor> means(const std::vector<at::Tensor>& sums, int64_t samples) {
  std::vector<at::Tensor> means;
  for (const at::Tensor& sum : sums) means.push_back(at::div(sum, samples));
  return means;
}

std::vector<at::Tensor> split_diagonal(const at::Tensor& rows,
                                       const std::vector<at::Tensor>& inputs) {
  std::vector<at::Tensor> parts;
  int64_t offset = 0;
  for (const at::Tensor& input : inputs) {
    parts.push_back(rows.narrow(0, offset, input.numel())
                        .movedim(0, -1)
                        .reshape(joined(rows.sizes().slice(1), input.sizes())));
    offset += input.numel();
  }
  return parts;
}

}  // namespace torchlift::autodiff_internal
