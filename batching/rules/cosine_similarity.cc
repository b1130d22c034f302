// cosine_similarity as libtorch makes it of other operators: the same, but for a note that its
// no_grad block needs under vmap.

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/cosine_similarity_ops.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/result_type.h>

#include "core/grad_mode.h"
#include "core/registry.h"

namespace torchlift {
namespace {

// max(|x|, eps) along dim, with the gradient of |x| everywhere.
at::Tensor clamped_norm(const at::Tensor& x, int64_t dim, double eps) {
  at::Tensor norm = at::linalg_vector_norm(x, 2, dim, /*keepdim=*/true).clone();
  // The block below is one of ours, not the forward of an autograd Function that hides a gradient:
  // see NOTE [autograd Functions and outer domains] in core/grad_mode.h.
  note_nodes();
  const at::NoGradGuard guard;
  norm.clamp_min_(eps);
  return norm;
}

// sum(x1 / max(|x1|, eps) * x2 / max(|x2|, eps)) along dim.
at::Tensor cosine_similarity(const at::Tensor& x1, const at::Tensor& x2, int64_t dim, double eps) {
  const at::ScalarType dtype = at::result_type(x1, x2);
  TORCH_CHECK(at::isFloatingType(dtype),
              "expected common dtype to be floating point, yet common dtype is ", dtype);
  const auto floating = [&](const at::Tensor& x) {
    return at::isIntegralType(x.scalar_type(), /*includeBool=*/true) ? x.to(dtype) : x;
  };
  const auto sizes = at::infer_size(x1.sizes(), x2.sizes());
  const at::Tensor a = floating(x1).expand(sizes);
  const at::Tensor b = floating(x2).expand(sizes);
  const at::Tensor norm_a = clamped_norm(a, dim, eps);
  const at::Tensor norm_b = clamped_norm(b, dim, eps);
  return a.div(norm_a).mul(b.div(norm_b)).sum(dim);
}

[[maybe_unused]] const RuleSet kRules{composite<at::_ops::cosine_similarity, &cosine_similarity>()};

}  // namespace
}  // namespace torchlift
