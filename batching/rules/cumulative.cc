// Running sums, products and extrema.

#include <ATen/WrapDimUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_logcumsumexp_ops.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cummax_ops.h>
#include <ATen/ops/cummin_ops.h>
#include <ATen/ops/cumprod_backward_ops.h>
#include <ATen/ops/cumprod_ops.h>
#include <ATen/ops/cumsum_ops.h>
#include <ATen/ops/logcumsumexp_ops.h>
#include <ATen/ops/slice_ops.h>
#include <ATen/ops/stack.h>

#include "batching/rules/reduction.h"

#include "core/tensor_operators.h"

namespace torchlift {
namespace {
namespace ops = at::_ops;

// NOTE [gradients of running products]
// y_i = x_0 ... x_i, with cotangents g: the gradient of x_k is
//   x_0 ... x_(k-1) * s_k,   s_k = sum over i >= k of g_i x_(k+1) ... x_i = g_k + x_(k+1) s_(k+1).
// libtorch divides by x_k, unless there is a 0, or the gradient is to be differentiated, or it may
// not look at the numbers, as here: then it takes the sums one by one, in O(n^2). The recurrence
// needs no division, so that it is right, and differentiable, at 0 too; of each two steps it makes
// one, and so is done in O(n), with O(log n) operators.

// s_k = b_k + a_k s_(k+1), and the last s is the last b: along `dim`, where a has one element less.
at::Tensor reverse_recurrence(const at::Tensor& a, const at::Tensor& b, int64_t dim) {
  const int64_t n = b.size(dim), odds = n / 2, evens = n - odds;
  if (n == 1) return b;
  const auto part = [dim](const at::Tensor& t, int64_t begin, int64_t end, int64_t step = 1) {
    return ops::slice_Tensor::call(t, dim, begin, end, step);
  };
  const auto joined = [dim](const at::Tensor& first, const at::Tensor& last) {
    return last.size(dim) == 0 ? first : at::cat({first, last}, dim);
  };
  const at::Tensor b_even = part(b, 0, n, 2), b_odd = part(b, 1, n, 2);
  const at::Tensor a_even = part(a, 0, n - 1, 2), a_odd = part(a, 1, n - 1, 2);
  const at::Tensor merged =
      joined(at::addcmul(part(b_even, 0, odds), a_even, b_odd), part(b_even, odds, evens));
  const at::Tensor s_even = reverse_recurrence(part(a_even, 0, evens - 1) * a_odd, merged, dim);
  const at::Tensor s_odd =
      joined(at::addcmul(part(b_odd, 0, evens - 1), a_odd, part(s_even, 1, evens)),
             part(b_odd, evens - 1, odds));
  const at::Tensor pairs = at::stack({part(s_even, 0, odds), s_odd}, dim + 1);
  return joined(pairs.flatten(dim, dim + 1), part(s_even, odds, evens));
}

at::Tensor cumprod_backward(const at::Tensor& grad, const at::Tensor& input, int64_t dim,
                            const at::Tensor& output) {
  if (input.dim() == 0 || input.numel() == 0) return grad;
  dim = c10::maybe_wrap_dim(dim, input.dim());
  const int64_t n = input.size(dim);
  if (n == 1) return grad;
  const at::Tensor s = reverse_recurrence(input.conj().narrow(dim, 1, n - 1), grad, dim);
  const at::Tensor before = output.conj().narrow(dim, 0, n - 1).to(input.scalar_type());
  const at::Tensor rest = s.narrow(dim, 1, n - 1) * before;
  return at::cat({s.narrow(dim, 0, 1), rest}, dim);
}

[[maybe_unused]] const RuleSet kRules{
    along_dim_rows<ops::cumsum, ops::cumprod, ops::logcumsumexp, ops::_logcumsumexp, ops::cummax,
                   ops::cummin>()};

[[maybe_unused]] const RuleSet kInPlace{
    rule<ops::cumsum_, along_dim_in_place<ops::cumsum_>>(),
    rule<ops::cumprod_, along_dim_in_place<ops::cumprod_>>(),
};

[[maybe_unused]] const RuleSet kGradients{composite<ops::cumprod_backward, &cumprod_backward>()};

}  // namespace
}  // namespace torchlift
