#include "autodiff/forward_kernels.h"

#include <ATen/ExpandUtils.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <ATen/native/TypeProperties.h>
#include <ATen/ops/_efficientzerotensor.h>
#include <ATen/ops/_fw_primal_ops.h>
#include <ATen/ops/_has_same_storage_numel_ops.h>
#include <ATen/ops/_reshape_alias_ops.h>
#include <ATen/ops/_unsafe_view_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addmm_ops.h>
#include <ATen/ops/addmv_ops.h>
#include <ATen/ops/alias_ops.h>
#include <ATen/ops/as_strided_ops.h>
#include <ATen/ops/baddbmm_ops.h>
#include <ATen/ops/bmm_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/detach_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/dot_ops.h>
#include <ATen/ops/empty_ops.h>
#include <ATen/ops/empty_strided_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/expand_ops.h>
#include <ATen/ops/fill_ops.h>
#include <ATen/ops/is_same_size_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/mean_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/mv_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/permute_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/rsub_ops.h>
#include <ATen/ops/select_backward_ops.h>
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
#include <ATen/ops/zero_ops.h>

#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <utility>

#include "autodiff/forward_pass.h"
#include "core/level.h"
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

// A copy that is of the level of t. What a user's function clones while a level is open is of that
// (NOTE [factories] in core/factory.cc), and a tangent would outlive it.
Tensor copy_of(const Tensor& t) {
  const RuleDepthScope within(1);
  return t.clone();
}

// t + 0, a tensor of its own.
Tensor plus_zero(const Tensor& t, const Tensor& zero) {
  const Tensor like = broadcast_zeros(t, zero);
  const Tensor cast = t.scalar_type() == like.scalar_type() ? t : t.to(like.scalar_type());
  if (cast.sizes() == like.sizes()) return cast.is_same(t) ? copy_of(t) : cast;
  return copy_of(cast.expand(like.sizes()));
}

// --- tangents ------------------------------------------------------------------------------------
//
// What libtorch's formulas compute, with fewer operators. Those take an alias of each argument
// (_fw_primal) and zeros for each tangent that is missing; here the arguments are used as they are,
// with forward mode off, and a missing tangent is left out. The arguments are of one domain: plain,
// or of a level (NOTE [hidden arguments] in core/dispatch.h).
//
// Not for operators that save their result for reverse mode (exp, tanh, sigmoid...): autograd keeps
// of a result the tangent that it has then, so libtorch must give it one.

// The tangent of t in its own domain, undefined if it has none.
Tensor tangent_of(const Tensor& t) {
  if (t.unsafeGetTensorImpl()->autograd_meta() == nullptr) return {};
  return t._fw_grad(/*level=*/0);
}

// What f() returns, computed as if no tensor of the domain had a tangent.
template <class F>
Tensor without_forward(F f) {
  const at::AutoFwGradMode off(false);
  return f();
}

// Whether libtorch would take `tangent` for the tangent of `result` without a copy.
bool same_layout(const Tensor& result, const Tensor& tangent) {
  if (result.sizes() != tangent.sizes() || result.strides() != tangent.strides() ||
      result.storage_offset() != tangent.storage_offset() ||
      result.is_conj() != tangent.is_conj() || result.is_neg() != tangent.is_neg() ||
      result.scalar_type() != tangent.scalar_type()) {
    return false;
  }
  // Nobody sees the storage of a lifted tensor.
  if (is_lifted(result) || is_lifted(tangent)) return true;
  if (!result.has_storage() || !tangent.has_storage()) return false;
  return result.storage().nbytes() == tangent.storage().nbytes();
}

// Whether t, or a value in it, is a ZeroTensor.
bool holds_zero(const Tensor& t) {
  if (is_zero(t)) return true;
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr && holds_zero(impl->value());
}

// Gives a new tensor its tangent: _set_fw_grad, whose checks cost two operators. Neither is left a
// ZeroTensor, which comes of a tangent that libtorch made in another domain: what has a tangent may
// be written in place, and libtorch lays tangents out like their primals, of which that has no
// memory.
Tensor with_tangent(Tensor result, const Tensor& computed) {
  if (C10_UNLIKELY(holds_zero(result))) result = copy_of(result);
  const Tensor tangent = C10_UNLIKELY(holds_zero(computed)) ? copy_of(computed) : computed;
  torch::autograd::AutogradMeta* meta = torch::autograd::impl::materialize_autograd_meta(result);
  if (meta->is_view_ || meta->fw_grad_ != nullptr || !same_layout(result, tangent)) {
    result._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
    return result;
  }
  meta->fw_grad_ = std::make_shared<torch::autograd::ForwardGrad>();
  meta->fw_grad_->set_value(tangent, kDual);
  return result;
}

// The sum of two terms, either of which may be missing.
Tensor sum_of_terms(const Tensor& a, const Tensor& b) {
  if (!a.defined()) return b;
  return b.defined() ? ops::add_Tensor::call(a, b, 1) : a;
}

// How a binary operator that is linear in each argument treats zeros and tangents.
template <class Op, auto ZerosOf>
Tensor bilinear(DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  if (C10_UNLIKELY(is_zero(a) || is_zero(b))) return ZerosOf(a, b);
  if (C10_UNLIKELY(!c10::GradMode::is_enabled() && forward_mode_cut())) {
    return Pass<Op>::call(keys, a, b);
  }
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, a, b); };
  if (!above_autograd()) return plain();
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (!ta.defined() && !tb.defined()) return plain();
  Tensor result = without_forward(plain);
  const Tensor tangent = without_forward([&] {
    return sum_of_terms(ta.defined() ? Op::call(ta, b) : Tensor(),
                        tb.defined() ? Op::call(a, tb) : Tensor());
  });
  return with_tangent(std::move(result), tangent);
}

Tensor mm_zeros(const Tensor& a, const Tensor& b) { return zeros({a.size(0), b.size(1)}, a, b); }
Tensor bmm_zeros(const Tensor& a, const Tensor& b) {
  return zeros({a.size(0), a.size(1), b.size(2)}, a, b);
}
Tensor mv_zeros(const Tensor& a, const Tensor& b) { return zeros({a.size(0)}, a, b); }
Tensor dot_zeros(const Tensor& a, const Tensor& b) { return zeros({}, a, b); }

Tensor div(DispatchKeySet keys, const Tensor& a, const Tensor& b) {
  using Op = ops::div_Tensor;
  if (C10_UNLIKELY(is_zero(a))) return ops::mul_Tensor::call(a, b);
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, a, b);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, a, b); };
  if (!above_autograd()) return plain();
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (!ta.defined() && !tb.defined()) return plain();
  Tensor result = without_forward(plain);
  // d(a / b) = (da - (a / b) db) / b
  const Tensor tangent = without_forward([&] {
    if (!tb.defined()) return Op::call(ta, b);
    const Tensor lost = ops::mul_Tensor::call(result, tb);
    return ta.defined() ? Op::call(ops::sub_Tensor::call(ta, lost, 1), b) : Op::call(lost, b).neg();
  });
  return with_tangent(std::move(result), tangent);
}

// a + alpha b, or a - alpha b.
template <class Op, int kSign>
Tensor sum_of(DispatchKeySet keys, const Tensor& a, const Tensor& b, const at::Scalar& alpha) {
  const auto scaled = [&](const Tensor& t) {
    if (kSign == 1 && alpha.equal(1)) return t;
    return kSign == 1 ? t.mul(alpha) : t.mul(alpha).neg();
  };
  if (C10_UNLIKELY(is_zero(b))) return is_zero(a) ? broadcast_zeros(a, b) : plus_zero(a, b);
  if (C10_UNLIKELY(is_zero(a))) return plus_zero(scaled(b), a);
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, a, b, alpha);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, a, b, alpha); };
  if (!above_autograd()) return plain();
  const Tensor ta = tangent_of(a), tb = tangent_of(b);
  if (!ta.defined() && !tb.defined()) return plain();
  Tensor result = without_forward(plain);
  if (ta.defined() && tb.defined()) {
    return with_tangent(std::move(result), Op::call(ta, tb, alpha));
  }
  Tensor tangent = ta.defined() ? ta : scaled(tb);
  if (tangent.scalar_type() != result.scalar_type()) tangent = tangent.to(result.scalar_type());
  const bool wider = tangent.sizes() != result.sizes();
  if (wider) tangent = tangent.expand(result.sizes());
  // A tangent of its own: the argument's may be written in place. (A view of a tensor of a level
  // may not know that it is one.)
  if (wider || tangent.is_same(ta.defined() ? ta : tb) || tangent.is_view()) {
    tangent = copy_of(tangent);
  }
  return with_tangent(std::move(result), tangent);
}

// beta * self + alpha * (a product): addmm and the like.
template <class Op, class Product>
Tensor product_added(DispatchKeySet keys, const Tensor& self, const Tensor& a, const Tensor& b,
                     const at::Scalar& beta, const at::Scalar& alpha) {
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, self, a, b, beta, alpha);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, self, a, b, beta, alpha); };
  if (!above_autograd()) return plain();
  const Tensor ta = tangent_of(a), tb = tangent_of(b), ts = tangent_of(self);
  if (!ta.defined() && !tb.defined()) return plain();
  Tensor result = without_forward(plain);
  const Tensor tangent = without_forward([&] {
    Tensor sum = ts;
    at::Scalar scale = beta;
    const auto add = [&](const Tensor& x, const Tensor& y) {
      if (sum.defined()) {
        sum = Op::call(sum, x, y, scale, alpha);
      } else {
        sum = Product::call(x, y);
        if (!alpha.equal(1)) sum = sum.mul(alpha);
      }
      scale = 1;
    };
    if (ta.defined()) add(ta, b);
    if (tb.defined()) add(a, tb);
    return sum;
  });
  return with_tangent(std::move(result), tangent);
}

// --- pointwise -----------------------------------------------------------------------------------

// An operator with a tangent that is a function of the argument and its tangent.
template <class Op, auto Tangent>
Tensor unary(DispatchKeySet keys, const Tensor& a) {
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, a);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, a); };
  if (!above_autograd()) return plain();
  const Tensor ta = tangent_of(a);
  if (!ta.defined()) return plain();
  Tensor result = without_forward(plain);
  return with_tangent(std::move(result), without_forward([&] { return Tangent(ta, a); }));
}

Tensor sin_tangent(const Tensor& ta, const Tensor& a) {
  return ops::mul_Tensor::call(ta, ops::cos::call(a));
}
Tensor cos_tangent(const Tensor& ta, const Tensor& a) {
  return ops::mul_Tensor::call(ta, ops::neg::call(ops::sin::call(a)));
}
Tensor log_tangent(const Tensor& ta, const Tensor& a) { return ops::div_Tensor::call(ta, a); }
// d(a^n) = n a^(n-1) da
Tensor pow(DispatchKeySet keys, const Tensor& a, const at::Scalar& exponent) {
  using Op = ops::pow_Tensor_Scalar;
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, a, exponent);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, a, exponent); };
  if (!above_autograd()) return plain();
  const Tensor ta = tangent_of(a);
  // A power of 0 is constant even where a^(-1) is infinite: libtorch's formula knows.
  if (!ta.defined() || exponent.isComplex() || exponent.toDouble() == 0) return plain();
  Tensor result = without_forward(plain);
  const Tensor tangent = without_forward([&] {
    const double n = exponent.toDouble();
    if (n == 1) return ops::clone::call(ta, std::nullopt);
    const Tensor slope = n == 2 ? ops::add_Tensor::call(a, a, 1)
                                : ops::mul_Scalar::call(Op::call(a, n - 1), exponent);
    return ops::mul_Tensor::call(ta, slope);
  });
  return with_tangent(std::move(result), tangent);
}

// Op(grad, output), the backward of an activation: linear in grad; Slope is its derivative by
// output. The formulas are those of real numbers.
template <class Op, auto Slope>
Tensor activation_backward(DispatchKeySet keys, const Tensor& grad, const Tensor& output) {
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, grad, output);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, grad, output); };
  if (!above_autograd() || grad.is_complex() || output.is_complex()) return plain();
  const Tensor tg = tangent_of(grad), to = tangent_of(output);
  if (!tg.defined() && !to.defined()) return plain();
  Tensor result = without_forward(plain);
  const Tensor tangent = without_forward([&] {
    return sum_of_terms(tg.defined() ? Op::call(tg, output) : Tensor(),
                        to.defined() ? ops::mul_Tensor::call(Slope(grad, output), to) : Tensor());
  });
  return with_tangent(std::move(result), tangent);
}

// grad (1 - y^2) by y
Tensor tanh_slope(const Tensor& grad, const Tensor& output) {
  return ops::mul_Scalar::call(ops::mul_Tensor::call(grad, output), -2);
}

// grad (y - y^2) by y
Tensor sigmoid_slope(const Tensor& grad, const Tensor& output) {
  return ops::mul_Tensor::call(grad, ops::rsub_Scalar::call(output, 1, 2));
}

Tensor threshold_backward(DispatchKeySet keys, const Tensor& grad, const Tensor& self,
                          const at::Scalar& threshold) {
  using Op = ops::threshold_backward;
  if (C10_UNLIKELY(forward_mode_cut())) return Pass<Op>::call(keys, grad, self, threshold);
  const auto plain = [&] { return Op::redispatch(keys & kBelowForward, grad, self, threshold); };
  if (!above_autograd()) return plain();
  const Tensor tg = tangent_of(grad);
  if (!tg.defined()) return without_forward(plain);  // constant in self, but for jumps
  Tensor result = without_forward(plain);
  return with_tangent(std::move(result),
                      without_forward([&] { return Op::call(tg, self, threshold); }));
}

// --- operators that have nothing to do with tangents ---------------------------------------------

// Of one that writes: only above autograd may there be something to do, which is rare.
template <class Op, class Schema = typename Op::schema>
struct PassWrite;

template <class Op, class R, class... A>
struct PassWrite<Op, R(A...)> {
  static R call(DispatchKeySet keys, A... args) {
    if (C10_LIKELY(!above_autograd())) return Op::redispatch(keys & kBelowForward, args...);
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow(Op::name, Op::overload_name);
    static const c10::KernelFunction boxed = boxed_kernel();
    return boxed.template call<R, A...>(op, keys, args...);
  }
};

// No result of it has a tangent in any case.
template <class Op>
ForwardKernel skipped() {
  return {Op::name, Op::overload_name, c10::KernelFunction::makeFallthrough(), std::nullopt};
}

// --- the table -----------------------------------------------------------------------------------

template <class... Op>
void skip(std::vector<ForwardKernel>& kernels) {
  (kernels.push_back(skipped<Op>()), ...);
}

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
  kernels.push_back(row<ops::mul_Tensor, &bilinear<ops::mul_Tensor, &broadcast_zeros>>());
  kernels.push_back(row<ops::div_Tensor, &div>());
  kernels.push_back(row<ops::add_Tensor, &sum_of<ops::add_Tensor, 1>>());
  kernels.push_back(row<ops::sub_Tensor, &sum_of<ops::sub_Tensor, -1>>());
  kernels.push_back(row<ops::mm, &bilinear<ops::mm, &mm_zeros>>());
  kernels.push_back(row<ops::bmm, &bilinear<ops::bmm, &bmm_zeros>>());
  kernels.push_back(row<ops::mv, &bilinear<ops::mv, &mv_zeros>>());
  kernels.push_back(row<ops::dot, &bilinear<ops::dot, &dot_zeros>>());
  kernels.push_back(row<ops::addmm, &product_added<ops::addmm, ops::mm>>());
  kernels.push_back(row<ops::addmv, &product_added<ops::addmv, ops::mv>>());
  kernels.push_back(row<ops::baddbmm, &product_added<ops::baddbmm, ops::bmm>>());
  kernels.push_back(row<ops::sin, &unary<ops::sin, &sin_tangent>>());
  kernels.push_back(row<ops::cos, &unary<ops::cos, &cos_tangent>>());
  kernels.push_back(row<ops::log, &unary<ops::log, &log_tangent>>());
  kernels.push_back(row<ops::pow_Tensor_Scalar, &pow>());
  kernels.push_back(
      row<ops::tanh_backward, &activation_backward<ops::tanh_backward, &tanh_slope>>());
  kernels.push_back(
      row<ops::sigmoid_backward, &activation_backward<ops::sigmoid_backward, &sigmoid_slope>>());
  kernels.push_back(row<ops::threshold_backward, &threshold_backward>());
  kernels.push_back(row<ops::copy_, &PassWrite<ops::copy_>::call>());
  kernels.push_back(row<ops::zero_, &PassWrite<ops::zero_>::call>());
  kernels.push_back(row<ops::fill__Scalar, &PassWrite<ops::fill__Scalar>::call>());
  skip<ops::_fw_primal, ops::detach, ops::empty_memory_format, ops::empty_strided,
       ops::is_same_size, ops::_has_same_storage_numel>(kernels);
  pass<ops::mul_Scalar, ops::add_Scalar, ops::sub_Scalar, ops::div_Scalar, ops::rsub_Scalar,
       ops::neg, ops::exp, ops::tanh, ops::sigmoid, ops::relu, ops::clone, ops::sum,
       ops::sum_dim_IntList, ops::mean, ops::mean_dim>(kernels);
  pass<ops::alias, ops::as_strided, ops::_unsafe_view, ops::_reshape_alias, ops::t,
       ops::transpose_int, ops::permute, ops::view, ops::expand, ops::select_int,
       ops::select_backward, ops::slice_Tensor, ops::unsqueeze, ops::squeeze_dim>(kernels);
  return kernels;
}

}  // namespace torchlift::forward_internal
