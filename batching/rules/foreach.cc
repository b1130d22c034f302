// The foreach operators: an operator on every tensor of a list, or on several lists element by
// element. torch._foreach_add, torch._foreach_norm...; optimizers and gradient clipping use them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/_foreach_abs_ops.h>
#include <ATen/ops/_foreach_acos_ops.h>
#include <ATen/ops/_foreach_add_ops.h>
#include <ATen/ops/_foreach_addcdiv_ops.h>
#include <ATen/ops/_foreach_addcmul_ops.h>
#include <ATen/ops/_foreach_asin_ops.h>
#include <ATen/ops/_foreach_atan_ops.h>
#include <ATen/ops/_foreach_ceil_ops.h>
#include <ATen/ops/_foreach_clamp_max_ops.h>
#include <ATen/ops/_foreach_clamp_min_ops.h>
#include <ATen/ops/_foreach_copy_ops.h>
#include <ATen/ops/_foreach_cos_ops.h>
#include <ATen/ops/_foreach_cosh_ops.h>
#include <ATen/ops/_foreach_div_ops.h>
#include <ATen/ops/_foreach_erf_ops.h>
#include <ATen/ops/_foreach_erfc_ops.h>
#include <ATen/ops/_foreach_exp_ops.h>
#include <ATen/ops/_foreach_expm1_ops.h>
#include <ATen/ops/_foreach_floor_ops.h>
#include <ATen/ops/_foreach_frac_ops.h>
#include <ATen/ops/_foreach_lerp_ops.h>
#include <ATen/ops/_foreach_lgamma_ops.h>
#include <ATen/ops/_foreach_log10_ops.h>
#include <ATen/ops/_foreach_log1p_ops.h>
#include <ATen/ops/_foreach_log2_ops.h>
#include <ATen/ops/_foreach_log_ops.h>
#include <ATen/ops/_foreach_max_ops.h>
#include <ATen/ops/_foreach_maximum_ops.h>
#include <ATen/ops/_foreach_minimum_ops.h>
#include <ATen/ops/_foreach_mul_ops.h>
#include <ATen/ops/_foreach_neg_ops.h>
#include <ATen/ops/_foreach_norm_ops.h>
#include <ATen/ops/_foreach_pow_ops.h>
#include <ATen/ops/_foreach_reciprocal_ops.h>
#include <ATen/ops/_foreach_round_ops.h>
#include <ATen/ops/_foreach_rsqrt_ops.h>
#include <ATen/ops/_foreach_sigmoid_ops.h>
#include <ATen/ops/_foreach_sign_ops.h>
#include <ATen/ops/_foreach_sin_ops.h>
#include <ATen/ops/_foreach_sinh_ops.h>
#include <ATen/ops/_foreach_sqrt_ops.h>
#include <ATen/ops/_foreach_sub_ops.h>
#include <ATen/ops/_foreach_tan_ops.h>
#include <ATen/ops/_foreach_tanh_ops.h>
#include <ATen/ops/_foreach_trunc_ops.h>
#include <ATen/ops/_foreach_zero_ops.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/acos_ops.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addcdiv_ops.h>
#include <ATen/ops/addcmul_ops.h>
#include <ATen/ops/asin_ops.h>
#include <ATen/ops/atan_ops.h>
#include <ATen/ops/ceil_ops.h>
#include <ATen/ops/clamp_max_ops.h>
#include <ATen/ops/clamp_min_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/cosh_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/erf_ops.h>
#include <ATen/ops/erfc_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/expm1_ops.h>
#include <ATen/ops/floor_ops.h>
#include <ATen/ops/frac_ops.h>
#include <ATen/ops/lerp_ops.h>
#include <ATen/ops/lgamma_ops.h>
#include <ATen/ops/linalg_vector_norm_ops.h>
#include <ATen/ops/log10_ops.h>
#include <ATen/ops/log1p_ops.h>
#include <ATen/ops/log2_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/max_ops.h>
#include <ATen/ops/maximum_ops.h>
#include <ATen/ops/minimum_ops.h>
#include <ATen/ops/mm_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/neg_ops.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/reciprocal_ops.h>
#include <ATen/ops/round_ops.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/sign_ops.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sinh_ops.h>
#include <ATen/ops/sqrt_ops.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/tan_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <ATen/ops/trunc_ops.h>
#include <ATen/ops/zero_ops.h>
#include <c10/core/ScalarType.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstdint>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/registry.h"

// Younger than torch 2.11.
#if __has_include(<ATen/ops/_foreach_clone_ops.h>)
#define TORCHLIFT_HAS_FOREACH_CLONE 1
#include <ATen/ops/_foreach_clone_ops.h>
#else
#define TORCHLIFT_HAS_FOREACH_CLONE 0
#endif
#if __has_include(<ATen/ops/_foreach_mm_ops.h>)
#define TORCHLIFT_HAS_FOREACH_MM 1
#include <ATen/ops/_foreach_mm_ops.h>
#else
#define TORCHLIFT_HAS_FOREACH_MM 0
#endif
#if __has_include(<ATen/ops/_foreach_powsum_ops.h>)
#define TORCHLIFT_HAS_FOREACH_POWSUM 1
#include <ATen/ops/_foreach_powsum_ops.h>
#else
#define TORCHLIFT_HAS_FOREACH_POWSUM 0
#endif

namespace torchlift {
namespace {

namespace ops = at::_ops;

// NOTE [foreach operators]
// A foreach operator is taken apart at its front kernel, before autograd or a rule sees it: each
// element of the lists goes its own way as the operator that it stands for. So lists may hold
// tensors of any levels, batched or not, and what all examples share stays shared; in place,
// promotion, versions and derivatives are those of the single operator. There is no kernel for a
// whole list to lose: libtorch has such kernels on GPUs only, for plain tensors, and the values of
// batched ones would need them in the same layout.

// --- the elements of arguments -------------------------------------------------------------------

template <class T>
inline constexpr bool kIsList =
    std::is_same_v<T, at::TensorList> || std::is_same_v<T, at::ArrayRef<at::Scalar>>;

template <class T>
decltype(auto) element(const T& arg, size_t i) {
  if constexpr (kIsList<T>) {
    return (arg[i]);
  } else {
    return (arg);
  }
}

// The number of elements. The lists have to agree, and one tensor for all elements is a number; the
// messages are libtorch's.
class Length {
 public:
  template <class T>
  void operator()(const T& arg) {
    if constexpr (std::is_same_v<T, at::TensorList>) {
      TORCH_CHECK(!arg.empty(), "Tensor list must have at least one tensor.");
      if (length_ == 0) length_ = arg.size();
      TORCH_CHECK(arg.size() == length_, "Tensor lists must have the same number of tensors, got ",
                  length_, " and ", arg.size());
    } else if constexpr (kIsList<T>) {
      TORCH_CHECK(arg.size() == length_,
                  "Tensor list must have same number of elements as scalar list.");
    } else if constexpr (std::is_same_v<T, at::Tensor>) {
      TORCH_CHECK(arg.dim() == 0, "scalar tensor expected to be 0 dim but it has ", arg.dim(),
                  " dimensions and ", arg.numel(), " elements.");
    }
  }
  size_t get() const { return length_; }

 private:
  size_t length_ = 0;
};

template <class... A>
size_t length_of(const A&... args) {
  Length length;
  (length(args), ...);
  return length.get();
}

// --- the kernel ----------------------------------------------------------------------------------

// Where libtorch works a list tensor by tensor (CPU), autocast sees the single operators; where it
// has a kernel for the list, it sees none.
constexpr c10::DispatchKeySet kBlindAutocast =
    c10::autocast_dispatch_keyset - c10::DispatchKeySet(c10::DispatchKey::AutocastCPU);

// What a foreach operator does, `Each` being the function of single elements.
template <auto Each, class Schema>
struct Foreach;

template <auto Each, class... A>
struct Foreach<Each, std::vector<at::Tensor>(A...)> {
  static std::vector<at::Tensor> run(A... args) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kBlindAutocast);
    const size_t length = length_of(args...);
    std::vector<at::Tensor> results;
    results.reserve(length);
    for (size_t i = 0; i < length; ++i) results.push_back(Each(element(args, i)...));
    return results;
  }
};

// In place: the first list is written.
template <auto Each, class... A>
struct Foreach<Each, void(at::TensorList, A...)> {
  static void run(at::TensorList targets, A... args) {
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(kBlindAutocast);
    const size_t length = length_of(targets, args...);
    for (size_t i = 0; i < length; ++i) {
      at::Tensor target = targets[i];
      Each(target, element(args, i)...);
    }
  }
};

// The row of an operator for which `Kernel::run` works, in front of autograd and behind it.
template <class Op, class Kernel>
RuleEntry decomposed() {
  const auto kernel = [] {
    return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(Kernel::run));
  };
  return {.name = Op::name,
          .overload = Op::overload_name,
          .source = RuleEntry::Source::kRule,
          .make_front = kernel,
          .make_back = kernel,
          .signature = c10::impl::CppSignature::make<typename Op::schema>()};
}

// The row of a foreach operator, by a function of single elements...
template <class Op, auto Each>
RuleEntry each_by() {
  return decomposed<Op, Foreach<Each, typename Op::schema>>();
}

// ... or by an operator that takes the same arguments.
template <class Op, class Single>
RuleEntry each() {
  return each_by<Op, &Single::call>();
}

// --- elements for which libtorch has no single operator of the same arguments --------------------

template <class Single>
at::Tensor unscaled(const at::Tensor& self, const at::Scalar& number) {
  return Single::call(self, number, /*alpha=*/1);
}

template <class Single>
void unscaled_(at::Tensor& self, const at::Scalar& number) {
  Single::call(self, number, /*alpha=*/1);
}

// maximum and minimum with a number; their derivatives share out ties as those of two tensors do.
template <class Single>
at::Tensor with_number(const at::Tensor& self, const at::Scalar& number) {
  at::Tensor other = at::scalar_tensor(number, self.options().dtype(number.type()));
  other.unsafeGetTensorImpl()->set_wrapped_number(true);
  return Single::call(self, other);
}

// Writes a result that was computed out of place.
void assign(at::Tensor& target, const at::Tensor& result) {
  TORCH_CHECK(at::canCast(result.scalar_type(), target.scalar_type()), "result type ",
              result.scalar_type(), " can't be cast to the desired output type ",
              target.scalar_type());
  target.copy_(result);
}

// In place; autograd keeps what self was before.
template <class Single>
void with_number_(at::Tensor& self, const at::Scalar& number) {
  assign(self, with_number<Single>(self.clone(), number));
}

template <class Single>
void with_tensor_(at::Tensor& self, const at::Tensor& other) {
  assign(self, Single::call(self.clone(), other));
}

at::Tensor norm(const at::Tensor& self, const at::Scalar& order,
                std::optional<at::ScalarType> dtype) {
  return ops::linalg_vector_norm::call(self, order, /*dim=*/{}, /*keepdim=*/false, dtype);
}

// sum |x|^order
[[maybe_unused]] at::Tensor powsum(const at::Tensor& self, const at::Scalar& order,
                                   std::optional<at::ScalarType> dtype) {
  return self.abs().pow(order).sum(dtype);
}

// --- addcmul and addcdiv with a tensor of factors, one for each element --------------------------

template <auto Each, class Schema>
struct ForeachScaled;

template <auto Each, class R>
struct ForeachScaled<Each, R(at::TensorList, at::TensorList, at::TensorList, const at::Tensor&)> {
  static R run(at::TensorList self, at::TensorList tensor1, at::TensorList tensor2,
               const at::Tensor& factors) {
    TORCH_CHECK(factors.dim() == 1, "Expected packed scalar Tensor to be of dimension 1. Got ",
                factors.dim(), " instead.");
    TORCH_CHECK(factors.size(0) == static_cast<int64_t>(self.size()),
                "Expected length of scalars to match input of length ", self.size(), " but got ",
                factors.size(0), " instead.");
    using Lists = R(at::TensorList, at::TensorList, at::TensorList, at::TensorList);
    return Foreach<Each, Lists>::run(self, tensor1, tensor2, factors.unbind());
  }
};

// The factor weighs as a number does: it promotes nothing.
template <class Single>
at::Tensor scaled(const at::Tensor& self, const at::Tensor& tensor1, const at::Tensor& tensor2,
                  const at::Tensor& factor) {
  return Single::call(self, tensor1.mul(factor.to(tensor1.scalar_type())), tensor2, /*value=*/1);
}

template <class Single>
void scaled_(at::Tensor& self, const at::Tensor& tensor1, const at::Tensor& tensor2,
             const at::Tensor& factor) {
  Single::call(self, tensor1.mul(factor.to(tensor1.scalar_type())), tensor2, /*value=*/1);
}

template <class Op, auto Each>
RuleEntry scaled_by() {
  return decomposed<Op, ForeachScaled<Each, typename Op::schema>>();
}

// --- the tables ----------------------------------------------------------------------------------

[[maybe_unused]] const RuleSet kUnary{
    each<ops::_foreach_abs, ops::abs>(),
    each<ops::_foreach_abs_, ops::abs_>(),
    each<ops::_foreach_acos, ops::acos>(),
    each<ops::_foreach_acos_, ops::acos_>(),
    each<ops::_foreach_asin, ops::asin>(),
    each<ops::_foreach_asin_, ops::asin_>(),
    each<ops::_foreach_atan, ops::atan>(),
    each<ops::_foreach_atan_, ops::atan_>(),
    each<ops::_foreach_ceil, ops::ceil>(),
    each<ops::_foreach_ceil_, ops::ceil_>(),
    each<ops::_foreach_cos, ops::cos>(),
    each<ops::_foreach_cos_, ops::cos_>(),
    each<ops::_foreach_cosh, ops::cosh>(),
    each<ops::_foreach_cosh_, ops::cosh_>(),
    each<ops::_foreach_erf, ops::erf>(),
    each<ops::_foreach_erf_, ops::erf_>(),
    each<ops::_foreach_erfc, ops::erfc>(),
    each<ops::_foreach_erfc_, ops::erfc_>(),
    each<ops::_foreach_exp, ops::exp>(),
    each<ops::_foreach_exp_, ops::exp_>(),
    each<ops::_foreach_expm1, ops::expm1>(),
    each<ops::_foreach_expm1_, ops::expm1_>(),
    each<ops::_foreach_floor, ops::floor>(),
    each<ops::_foreach_floor_, ops::floor_>(),
    each<ops::_foreach_frac, ops::frac>(),
    each<ops::_foreach_frac_, ops::frac_>(),
    each<ops::_foreach_lgamma, ops::lgamma>(),
    each<ops::_foreach_lgamma_, ops::lgamma_>(),
    each<ops::_foreach_log, ops::log>(),
    each<ops::_foreach_log_, ops::log_>(),
    each<ops::_foreach_log10, ops::log10>(),
    each<ops::_foreach_log10_, ops::log10_>(),
    each<ops::_foreach_log1p, ops::log1p>(),
    each<ops::_foreach_log1p_, ops::log1p_>(),
    each<ops::_foreach_log2, ops::log2>(),
    each<ops::_foreach_log2_, ops::log2_>(),
    each<ops::_foreach_neg, ops::neg>(),
    each<ops::_foreach_neg_, ops::neg_>(),
    each<ops::_foreach_reciprocal, ops::reciprocal>(),
    each<ops::_foreach_reciprocal_, ops::reciprocal_>(),
    each<ops::_foreach_round, ops::round>(),
    each<ops::_foreach_round_, ops::round_>(),
    each<ops::_foreach_rsqrt, ops::rsqrt>(),
    each<ops::_foreach_rsqrt_, ops::rsqrt_>(),
    each<ops::_foreach_sigmoid, ops::sigmoid>(),
    each<ops::_foreach_sigmoid_, ops::sigmoid_>(),
    each<ops::_foreach_sign, ops::sign>(),
    each<ops::_foreach_sign_, ops::sign_>(),
    each<ops::_foreach_sin, ops::sin>(),
    each<ops::_foreach_sin_, ops::sin_>(),
    each<ops::_foreach_sinh, ops::sinh>(),
    each<ops::_foreach_sinh_, ops::sinh_>(),
    each<ops::_foreach_sqrt, ops::sqrt>(),
    each<ops::_foreach_sqrt_, ops::sqrt_>(),
    each<ops::_foreach_tan, ops::tan>(),
    each<ops::_foreach_tan_, ops::tan_>(),
    each<ops::_foreach_tanh, ops::tanh>(),
    each<ops::_foreach_tanh_, ops::tanh_>(),
    each<ops::_foreach_trunc, ops::trunc>(),
    each<ops::_foreach_trunc_, ops::trunc_>(),
};

[[maybe_unused]] const RuleSet kArithmetic{
    each_by<ops::_foreach_add_Scalar, &unscaled<ops::add_Scalar>>(),
    each_by<ops::_foreach_add_ScalarList, &unscaled<ops::add_Scalar>>(),
    each<ops::_foreach_add_List, ops::add_Tensor>(),
    each<ops::_foreach_add_Tensor, ops::add_Tensor>(),
    each_by<ops::_foreach_add__Scalar, &unscaled_<ops::add__Scalar>>(),
    each_by<ops::_foreach_add__ScalarList, &unscaled_<ops::add__Scalar>>(),
    each<ops::_foreach_add__List, ops::add__Tensor>(),
    each<ops::_foreach_add__Tensor, ops::add__Tensor>(),

    each_by<ops::_foreach_sub_Scalar, &unscaled<ops::sub_Scalar>>(),
    each_by<ops::_foreach_sub_ScalarList, &unscaled<ops::sub_Scalar>>(),
    each<ops::_foreach_sub_List, ops::sub_Tensor>(),
    each_by<ops::_foreach_sub__Scalar, &unscaled_<ops::sub__Scalar>>(),
    each_by<ops::_foreach_sub__ScalarList, &unscaled_<ops::sub__Scalar>>(),
    each<ops::_foreach_sub__List, ops::sub__Tensor>(),

    each<ops::_foreach_mul_Scalar, ops::mul_Scalar>(),
    each<ops::_foreach_mul_ScalarList, ops::mul_Scalar>(),
    each<ops::_foreach_mul_List, ops::mul_Tensor>(),
    each<ops::_foreach_mul_Tensor, ops::mul_Tensor>(),
    each<ops::_foreach_mul__Scalar, ops::mul__Scalar>(),
    each<ops::_foreach_mul__ScalarList, ops::mul__Scalar>(),
    each<ops::_foreach_mul__List, ops::mul__Tensor>(),
    each<ops::_foreach_mul__Tensor, ops::mul__Tensor>(),

    each<ops::_foreach_div_Scalar, ops::div_Scalar>(),
    each<ops::_foreach_div_ScalarList, ops::div_Scalar>(),
    each<ops::_foreach_div_List, ops::div_Tensor>(),
    each<ops::_foreach_div_Tensor, ops::div_Tensor>(),
    each<ops::_foreach_div__Scalar, ops::div__Scalar>(),
    each<ops::_foreach_div__ScalarList, ops::div__Scalar>(),
    each<ops::_foreach_div__List, ops::div__Tensor>(),
    each<ops::_foreach_div__Tensor, ops::div__Tensor>(),

    each<ops::_foreach_pow_Scalar, ops::pow_Tensor_Scalar>(),
    each<ops::_foreach_pow_ScalarList, ops::pow_Tensor_Scalar>(),
    each<ops::_foreach_pow_List, ops::pow_Tensor_Tensor>(),
    each<ops::_foreach_pow_ScalarAndTensor, ops::pow_Scalar>(),
    each<ops::_foreach_pow__Scalar, ops::pow__Scalar>(),
    each<ops::_foreach_pow__ScalarList, ops::pow__Scalar>(),
    each<ops::_foreach_pow__List, ops::pow__Tensor>(),
};

[[maybe_unused]] const RuleSet kBounds{
    each<ops::_foreach_clamp_max_Scalar, ops::clamp_max>(),
    each<ops::_foreach_clamp_max_ScalarList, ops::clamp_max>(),
    each<ops::_foreach_clamp_max_List, ops::clamp_max_Tensor>(),
    each<ops::_foreach_clamp_max__Scalar, ops::clamp_max_>(),
    each<ops::_foreach_clamp_max__ScalarList, ops::clamp_max_>(),
    each<ops::_foreach_clamp_max__List, ops::clamp_max__Tensor>(),

    each<ops::_foreach_clamp_min_Scalar, ops::clamp_min>(),
    each<ops::_foreach_clamp_min_ScalarList, ops::clamp_min>(),
    each<ops::_foreach_clamp_min_List, ops::clamp_min_Tensor>(),
    each<ops::_foreach_clamp_min__Scalar, ops::clamp_min_>(),
    each<ops::_foreach_clamp_min__ScalarList, ops::clamp_min_>(),
    each<ops::_foreach_clamp_min__List, ops::clamp_min__Tensor>(),

    each_by<ops::_foreach_maximum_Scalar, &with_number<ops::maximum>>(),
    each_by<ops::_foreach_maximum_ScalarList, &with_number<ops::maximum>>(),
    each<ops::_foreach_maximum_List, ops::maximum>(),
    each_by<ops::_foreach_maximum__Scalar, &with_number_<ops::maximum>>(),
    each_by<ops::_foreach_maximum__ScalarList, &with_number_<ops::maximum>>(),
    each_by<ops::_foreach_maximum__List, &with_tensor_<ops::maximum>>(),

    each_by<ops::_foreach_minimum_Scalar, &with_number<ops::minimum>>(),
    each_by<ops::_foreach_minimum_ScalarList, &with_number<ops::minimum>>(),
    each<ops::_foreach_minimum_List, ops::minimum>(),
    each_by<ops::_foreach_minimum__Scalar, &with_number_<ops::minimum>>(),
    each_by<ops::_foreach_minimum__ScalarList, &with_number_<ops::minimum>>(),
    each_by<ops::_foreach_minimum__List, &with_tensor_<ops::minimum>>(),
};

[[maybe_unused]] const RuleSet kOfThree{
    each<ops::_foreach_addcdiv_Scalar, ops::addcdiv>(),
    each<ops::_foreach_addcdiv_ScalarList, ops::addcdiv>(),
    scaled_by<ops::_foreach_addcdiv_Tensor, &scaled<ops::addcdiv>>(),
    each<ops::_foreach_addcdiv__Scalar, ops::addcdiv_>(),
    each<ops::_foreach_addcdiv__ScalarList, ops::addcdiv_>(),
    scaled_by<ops::_foreach_addcdiv__Tensor, &scaled_<ops::addcdiv_>>(),

    each<ops::_foreach_addcmul_Scalar, ops::addcmul>(),
    each<ops::_foreach_addcmul_ScalarList, ops::addcmul>(),
    scaled_by<ops::_foreach_addcmul_Tensor, &scaled<ops::addcmul>>(),
    each<ops::_foreach_addcmul__Scalar, ops::addcmul_>(),
    each<ops::_foreach_addcmul__ScalarList, ops::addcmul_>(),
    scaled_by<ops::_foreach_addcmul__Tensor, &scaled_<ops::addcmul_>>(),

    each<ops::_foreach_lerp_Scalar, ops::lerp_Scalar>(),
    each<ops::_foreach_lerp_ScalarList, ops::lerp_Scalar>(),
    each<ops::_foreach_lerp_List, ops::lerp_Tensor>(),
    each<ops::_foreach_lerp__Scalar, ops::lerp__Scalar>(),
    each<ops::_foreach_lerp__ScalarList, ops::lerp__Scalar>(),
    each<ops::_foreach_lerp__List, ops::lerp__Tensor>(),
};

[[maybe_unused]] const RuleSet kOthers {
  each_by<ops::_foreach_norm_Scalar, &norm>(), each<ops::_foreach_max, ops::max>(),
      each<ops::_foreach_copy, ops::copy>(), each<ops::_foreach_copy_, ops::copy_>(),
      each<ops::_foreach_zero, ops::zero>(), each<ops::_foreach_zero_, ops::zero_>(),
#if TORCHLIFT_HAS_FOREACH_CLONE
      each<ops::_foreach_clone, ops::clone>(),
#endif
#if TORCHLIFT_HAS_FOREACH_MM
      each<ops::_foreach_mm, ops::mm>(),
#endif
#if TORCHLIFT_HAS_FOREACH_POWSUM
      each_by<ops::_foreach_powsum_Scalar, &powsum>(),
#endif
};

}  // namespace
}  // namespace torchlift
