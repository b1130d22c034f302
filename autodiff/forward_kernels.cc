#include "autodiff/forward_kernels.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/native/TypeProperties.h>
#include <ATen/ops/_efficientzerotensor.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/dot_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/expand_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/mv_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/permute_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/select_ops.h>
#include <ATen/ops/sigmoid_backward_ops.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/slice_ops.h>
#include <ATen/ops/squeeze_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/sum_ops.h>
#include <ATen/ops/t_ops.h>
#include <ATen/ops/tanh_backward_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <ATen/ops/threshold_backward_ops.h>
#include <ATen/ops/transpose_ops.h>
#include <ATen/ops/unsqueeze_ops.h>
#include <ATen/ops/view_ops.h>

#include <utility>

#include "autodiff/forward_pass.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"

namespace torchlift::forward_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;
using c10::DispatchKeySet;

// --- ZeroTensors ---------------------------------------------------------------------------------

bool is_zero(const Tensor& t) { return t._is_zerotensor(); }

// Zeros with the dtype and device of an operator on a and b.
Tensor zeros(at::IntArrayRef sizes, const Tensor& a, const Tensor& b) {
  namespace native = at::native;
  const at::ScalarType dtype = native::result_type(
      native::update_result_type_state(b, native::update_result_type_state(a, {})));
  const Tensor& where = a.dim() == 0 && b.dim() > 0 ? b : a;
  return at::_efficientzerotensor(sizes, where.options().dtype(dtype));
}

// Zeros of the shape that a and b broadcast to.
Tensor broadcast_zeros(const Tensor& a, const Tensor& b) {
  return zeros(at::infer_size(a.sizes(), b.sizes()), a, b);
}

// t + 0, a tensor of its own.
Tensor plus_zero(const Tensor& t, const Tensor& zero) {
  const Tensor like = broadcast_zeros(t, zero);
  const Tensor cast = t.scalar_type() == like.scalar_type() ? t : t.to(like.scalar_type());
  if (cast.sizes() == like.sizes()) return cast.is_same(t) ? t.clone() : cast;
  return cast.expand(like.sizes()).clone();
}

// --- constants -----------------------------------------------------------------------------------

// The tangent of t in its own domain, undefined if it has none.
Tensor tangent_of(const Tensor& t) {
  if (t.unsafeGetTensorImpl()->autograd_meta() == nullptr) return {};
  return t._fw_grad(/*level=*/0);
}

// Whether the arguments may be looked at for plain tensors with a tangent.
template <class... T>
bool all_plain(const T&... tensors) {
  return (!tensors.key_set().has(kFrontKey) && ...) && above_autograd();
}

// Whether t is a sparse tensor in a level: one from outside of it, and so a constant. libtorch
// would make an alias of it, and a sparse tensor has none.
bool holds_sparse(const Tensor& t) {
  if (C10_LIKELY(!t.key_set().has(kFrontKey))) return false;
  Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = Tensor(impl->value());
  return value.layout() != at::kStrided;
}

// Whether the constant among two factors may be left out of the tangent's formula.
bool may_leave_out(const Tensor& a, const Tensor& b) {
  return all_plain(a, b) || ((holds_sparse(a) || holds_sparse(b)) && above_autograd());
}

// What f() returns, computed as if no argument had a tangent in this domain.
template <class F>
Tensor without_forward(F f) {
  const at::AutoFwGradMode off(false);
  return f();
}

Tensor with_tangent(Tensor result, const Tensor& tangent) {
  result._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
  return result;
}

// How a binary operator that is linear in each argument treats zeros and constants.
template <class Op, auto ZerosOf>
Tensor bilinear(DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  if (C10_UNLIKELY(is_zero(a) || is_zero(b))) return ZerosOf(a, b);
  if (C10_UNLIKELY(!c10::GradMode::is_enabled() && forward_mode_cut())) {
    return Pass<Op>::call(keys, a, b);
  }
  const DispatchKeySet below = keys & kBelowForward;
  if (!may_leave_out(a, b)) return Op::redispatch(below, a, b);
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (ta.defined() == tb.defined()) return Op::redispatch(below, a, b);
  Tensor result = without_forward([&] { return Op::redispatch(below, a, b); });
  return with_tangent(std::move(result), ta.defined() ? Op::call(ta, b) : Op::call(a, tb));
}

Tensor mm_zeros(const Tensor& a, const Tensor& b) { return zeros({a.size(0), b.size(1)}, a, b); }
Tensor bmm_zeros(const Tensor& a, const Tensor& b) {
  return zeros({a.size(0), a.size(1), b.size(2)}, a, b);
}
Tensor mv_zeros(const Tensor& a, const Tensor& b) { return zeros({a.size(0)}, a, b); }
Tensor dot_zeros(const Tensor& a, const Tensor& b) { return zeros({}, a, b); }

// Whether b is a number that was passed as a tensor, and a has a tangent: the operator with a
// number has no zeros to make. (libtorch's own kernels of those end in the operator with a tensor
// again.)
bool is_number(const Tensor& a, const Tensor& b) {
  return C10_UNLIKELY(b.unsafeGetTensorImpl()->is_wrapped_number()) && tangent_of(a).defined() &&
         above_autograd();
}

Tensor mul(DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  if (is_number(a, b)) return ops::mul_Scalar::call(a, b.item());
  return bilinear<ops::mul_Tensor, &broadcast_zeros>(keys, a, b);
}

Tensor div(DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  using Op = ops::div_Tensor;
  if (C10_UNLIKELY(is_zero(a))) return ops::mul_Tensor::call(a, b);
  if (is_number(a, b)) return ops::div_Scalar::call(a, b.item());
  const DispatchKeySet below = keys & kBelowForward;
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, a, b);
  if (!all_plain(a, b)) return Op::redispatch(below, a, b);
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (ta.defined() == tb.defined()) return Op::redispatch(below, a, b);
  Tensor result = without_forward([&] { return Op::redispatch(below, a, b); });
  if (ta.defined()) return with_tangent(std::move(result), Op::call(ta, b));
  // d(a / b) = -(a / b) db / b, of b without its tangent.
  const Tensor primal = b._fw_primal(/*level=*/0);
  return with_tangent(result, Op::call(ops::mul_Tensor::call(result, tb), primal).neg());
}

// a + alpha b, or a - alpha b.
template <class Op, class ScalarOp, int kSign>
Tensor sum_of(DispatchKeySet keys, const Tensor& a, const Tensor& b, const at::Scalar& alpha) {
  const auto scaled = [&](const Tensor& t) {
    if (kSign == 1 && alpha.equal(1)) return t;
    return kSign == 1 ? t.mul(alpha) : t.mul(alpha).neg();
  };
  if (C10_UNLIKELY(is_zero(b))) return is_zero(a) ? broadcast_zeros(a, b) : plus_zero(a, b);
  if (C10_UNLIKELY(is_zero(a))) return plus_zero(scaled(b), a);
  if (is_number(a, b)) return ScalarOp::call(a, b.item(), alpha);
  const DispatchKeySet below = keys & kBelowForward;
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, a, b, alpha);
  if (!all_plain(a, b)) return Op::redispatch(below, a, b, alpha);
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (ta.defined() == tb.defined()) return Op::redispatch(below, a, b, alpha);
  Tensor result = without_forward([&] { return Op::redispatch(below, a, b, alpha); });
  Tensor tangent = ta.defined() ? ta : scaled(tb);
  if (tangent.scalar_type() != result.scalar_type()) tangent = tangent.to(result.scalar_type());
  if (tangent.sizes() != result.sizes()) tangent = tangent.expand(result.sizes());
  // A tangent of its own: the argument's may be written in place.
  if (tangent.is_same(ta.defined() ? ta : tb) || tangent.is_view()) tangent = tangent.clone();
  return with_tangent(std::move(result), tangent);
}

Tensor addmm(DispatchKeySet keys, const Tensor& self, const Tensor& a, const Tensor& b,
             const at::Scalar& beta, const at::Scalar& alpha) {
  using Op = ops::addmm;
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, self, a, b, beta, alpha);
  const DispatchKeySet below = keys & kBelowForward;
  const auto plain = [&] { return Op::redispatch(below, self, a, b, beta, alpha); };
  if (!all_plain(self, a, b) && !(holds_sparse(a) && above_autograd())) return plain();
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (tangent_of(self).defined() || ta.defined() == tb.defined()) return plain();
  Tensor result = without_forward(plain);
  Tensor tangent = ta.defined() ? ops::mm::call(ta, b) : ops::mm::call(a, tb);
  if (!alpha.equal(1)) tangent = tangent.mul(alpha);
  return with_tangent(std::move(result), tangent);
}

// --- the table -----------------------------------------------------------------------------------

template <class... Op>
void pass(std::vector<ForwardKernel>& kernels) {
  (kernels.push_back(row<Op, &Pass<Op>::call>()), ...);
}

}  // namespace

std::vector<ForwardKernel> forward_kernels() {
  std::vector<ForwardKernel> kernels = forward_formulas();
  for (auto* family : {&attention_formulas, &distance_formulas, &embedding_formulas,
                       &linalg_formulas, &loss_formulas, &sampling_formulas, &scatter_formulas}) {
    for (ForwardKernel& kernel : family()) kernels.push_back(std::move(kernel));
  }
  kernels.push_back(row<ops::mul_Tensor, &mul>());
  kernels.push_back(row<ops::div_Tensor, &div>());
  kernels.push_back(row<ops::add_Tensor, &sum_of<ops::add_Tensor, ops::add_Scalar, 1>>());
  kernels.push_back(row<ops::sub_Tensor, &sum_of<ops::sub_Tensor, ops::sub_Scalar, -1>>());
  kernels.push_back(row<ops::mm, &bilinear<ops::mm, &mm_zeros>>());
  kernels.push_back(row<ops::bmm, &bilinear<ops::bmm, &bmm_zeros>>());
  kernels.push_back(row<ops::mv, &bilinear<ops::mv, &mv_zeros>>());
  kernels.push_back(row<ops::dot, &bilinear<ops::dot, &dot_zeros>>());
  kernels.push_back(row<ops::addmm, &addmm>());
  pass<ops::mul_Scalar, ops::add_Scalar, ops::sub_Scalar, ops::div_Scalar, ops::pow_Tensor_Scalar,
       ops::neg, ops::sin, ops::cos, ops::exp, ops::tanh, ops::sigmoid, ops::relu, ops::clone>(
      kernels);
  pass<ops::tanh_backward, ops::sigmoid_backward, ops::threshold_backward, ops::sum,
       ops::sum_dim_IntList, ops::t, ops::transpose_int, ops::permute, ops::view, ops::expand,
       ops::select_int, ops::slice_Tensor, ops::unsqueeze, ops::squeeze_dim>(kernels);
  return kernels;
}

}  // namespace torchlift::forward_internal
