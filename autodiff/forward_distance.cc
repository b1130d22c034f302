// Forward mode of distances between points: libtorch has no formula.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_cdist_backward_ops.h>
#include <ATen/ops/_cdist_forward_ops.h>
#include <ATen/ops/_pdist_backward_ops.h>
#include <ATen/ops/_pdist_forward_ops.h>
#include <ATen/ops/triu_indices.h>
#include <ATen/ops/where.h>

#include <limits>
#include <optional>
#include <vector>

#include "autodiff/forward_kernels.h"
#include "autodiff/forward_pass.h"
#include "core/tensor_operators.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;

// x^p where x > 0, and a constant 0 where x == 0: as in libtorch's backward, a distance of zero has
// the gradient zero.
Tensor power(const Tensor& x, double p) {
  if (p == 1) return x;
  const Tensor zero = x == 0;
  return x.masked_fill(zero, 1).pow(p).masked_fill(zero, 0);
}

// The p-norm over the last dim.
Tensor norm(const Tensor& difference, double p) {
  if (p == 2) return power((difference * difference).sum(-1), 0.5);
  const Tensor size = difference.abs();
  if (p == 0) return (size != 0).to(size.scalar_type()).sum(-1);
  if (p == 1) return size.sum(-1);
  if (p == std::numeric_limits<double>::infinity()) return size.amax(-1);
  return power(power(size, p).sum(-1), 1 / p);
}

// ...PM, ...RM -> ...PR
Tensor cdist(const Tensor& x1, const Tensor& x2, double p, std::optional<int64_t> /*mode*/) {
  return norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p);
}

// NM -> N(N-1)/2
Tensor pdist(const Tensor& self, double p) {
  const Tensor pairs =
      at::triu_indices(self.size(0), self.size(0), /*offset=*/1, self.options().dtype(at::kLong));
  return norm(self.index_select(0, pairs.select(0, 0)) - self.index_select(0, pairs.select(0, 1)),
              p);
}

}  // namespace

std::vector<ForwardKernel> distance_formulas() {
  std::vector<ForwardKernel> kernels;
  kernels.push_back(made<ops::_cdist_forward, &cdist>());
  kernels.push_back(made<ops::_pdist_forward, &pdist>());
  kernels.push_back(linear_in_first<ops::_cdist_backward>());
  kernels.push_back(linear_in_first<ops::_pdist_backward>());
  return kernels;
}

}  // namespace torchlift::forward_internal
