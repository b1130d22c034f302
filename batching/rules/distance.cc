// Distances between rows.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_cdist_backward.h>
#include <ATen/ops/_cdist_backward_ops.h>
#include <ATen/ops/_cdist_forward.h>
#include <ATen/ops/_cdist_forward_ops.h>
#include <ATen/ops/_euclidean_dist_ops.h>
#include <ATen/ops/_pdist_backward_ops.h>
#include <ATen/ops/_pdist_forward_ops.h>
#include <ATen/ops/triu_indices.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "batching/rules/fold.h"
#include "core/registry.h"

namespace torchlift {
namespace {

namespace ops = at::_ops;

// --- cdist: ...PM, ...RM -> ...PR ----------------------------------------------------------------

// The gradient for x1. The kernel goes through its arguments as they lie.
Batched cdist_backward_rule(const Level& level, BatchedArg grad, BatchedArg x1, BatchedArg x2,
                            double p, BatchedArg distances) {
  const int64_t rank = grad.logical_dim();
  const auto in_front = [&](const BatchedArg& arg) {
    const at::Tensor all = expanded(arg, level.size());
    return aligned(BatchedArg{all, 0}, rank).contiguous();
  };
  return {at::_cdist_backward(in_front(grad), in_front(x1), in_front(x2), p, in_front(distances)),
          0};
}

// --- pdist: NM -> the N(N-1)/2 distances above the diagonal of cdist(x, x) -----------------------

constexpr int64_t kNoMatrixProduct = 2;  // which is not as exact where rows are close

// Where the pairs lie in a flat matrix of N*N.
at::Tensor pairs(const at::Tensor& x) {
  const int64_t n = x.size(-2);
  const auto options = at::TensorOptions().dtype(at::kLong).device(x.device());
  const at::Tensor indices = at::triu_indices(n, n, 1, options);
  return indices[0].mul(n).add(indices[1]);
}

Batched pdist_forward_rule(BatchedArg self, double p) {
  const at::Tensor x = batch_first(self);
  const at::Tensor all = at::_cdist_forward(x, x, p, kNoMatrixProduct);
  return {all.flatten(1).index_select(1, pairs(x)), 0};
}

// BK -> BNN, symmetric, 0 on the diagonal.
at::Tensor as_matrix(const at::Tensor& of_pairs, const at::Tensor& x) {
  const int64_t size = x.size(0);
  const int64_t n = x.size(1);
  const at::Tensor upper = at::zeros({size, n * n}, x.options())
                               .index_copy(1, pairs(x), of_pairs.to(x.scalar_type()))
                               .view({size, n, n});
  return upper.add(upper.mT()).contiguous();
}

Batched pdist_backward_rule(const Level& level, BatchedArg grad, BatchedArg self, double p,
                            BatchedArg distances) {
  const at::Tensor x = expanded(self, level.size()).contiguous();
  const at::Tensor g = as_matrix(expanded(grad, level.size()), x);
  const at::Tensor d = as_matrix(expanded(distances, level.size()), x);
  return {at::_cdist_backward(g, x, x, p, d), 0};
}

[[maybe_unused]] const RuleSet kRules{
    leading_row<ops::_cdist_forward>(),
    leading_row<ops::_euclidean_dist>(),
    rule<ops::_cdist_backward, &cdist_backward_rule>(),
    rule<ops::_pdist_forward, &pdist_forward_rule>(),
    rule<ops::_pdist_backward, &pdist_backward_rule>(),
};

}  // namespace
}  // namespace torchlift
