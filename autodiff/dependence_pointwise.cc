// Operators that work on each element alone; their arguments broadcast.

#include <ATen/ops/logical_and.h>
#include <ATen/ops/where.h>

#include "autodiff/dependence_rules.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using at::Tensor;

// Where a factor of a product is not zero: everywhere if its value is unknown, given as an
// undefined tensor. [1 or levels' dims..., ...]: broadcasts to masks of `rank`.
Tensor factor(const DependenceCall& call, const Tensor& t) {
  if (!t.defined() || call.unknown(t)) return {};
  return nonzeros(lower(t, *call.level()).value);
}

Tensor both(const Tensor& mask, const Tensor& where) {
  return mask.defined() && where.defined() ? at::logical_and(mask, where) : mask;
}

// The mask of a product: each factor, where the others are not zero.
Tensor product_of(const DependenceCall& call, const std::vector<Tensor>& factors, int64_t rank) {
  Tensor all;
  for (size_t i = 0; i < factors.size(); ++i) {
    Tensor mask = align(call.mask(factors[i]), rank);
    for (size_t j = 0; j < factors.size(); ++j) {
      if (i != j) mask = both(mask, factor(call, factors[j]));
    }
    all = either(all, mask);
  }
  return all;
}

// self * other, or self / other: a number in place of a tensor was made one before.
Tensor product(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const c10::IValue* scalar = call.find("other");
  if (scalar != nullptr && scalar->isScalar()) {
    return scalar->toScalar().equal(0) ? Tensor() : align(call.mask("self"), like.dim());
  }
  return product_of(call, {call.tensor("self"), call.tensor("other")}, like.dim());
}

Tensor quotient(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const c10::IValue* rounding = call.find("rounding_mode");
  if (rounding != nullptr && rounding->isString()) return {};
  const Tensor other = call.tensor("other");
  const Tensor below = both(align(call.mask(other), like.dim()), factor(call, call.tensor("self")));
  return either(align(call.mask("self"), like.dim()), below);
}

// self + value * tensor1 * tensor2, or / tensor2.
Tensor add_product(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor self = align(call.mask("self"), like.dim());
  const c10::IValue* value = call.find("value");
  if (value != nullptr && value->isScalar() && value->toScalar().equal(0)) return self;
  return either(self,
                product_of(call, {call.tensor("tensor1"), call.tensor("tensor2")}, like.dim()));
}

Tensor power(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const c10::IValue* exponent = call.find("exponent");
  const Tensor self = align(call.mask("self"), like.dim());
  if (exponent->isScalar()) return exponent->toScalar().equal(0) ? Tensor() : self;
  const Tensor raised = both(self, factor(call, exponent->toTensor()));
  return either(raised, align(call.mask(exponent->toTensor()), like.dim()));
}

// self + alpha * other.
Tensor sum_of_two(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor self = align(call.mask("self"), like.dim());
  const Tensor other = align(call.mask("other"), like.dim());
  const c10::IValue* alpha = call.find("alpha");
  if (alpha != nullptr && alpha->isScalar() && alpha->toScalar().equal(0)) return self;
  return either(self, other);
}

// A condition that is a constant chooses, an unknown one may choose either.
Tensor choice(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor condition = call.tensor("condition");
  const Tensor yes = align(call.mask("self"), like.dim());
  const Tensor no = align(call.mask("other"), like.dim());
  if (call.unknown(condition)) return either(yes, no);
  const Tensor chosen = lower(condition, *call.level()).value.ne(0);
  return either(both(yes, chosen), both(no, chosen.logical_not()));
}

Tensor only_self(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  return align(call.mask("self"), like.dim());
}

Tensor only_source(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  return align(call.mask("src"), like.dim());
}

// The derivative by `self` of a formula that is linear piece by piece is 0, like that by a mask.
Tensor only_gradient(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  return either(align(call.mask("grad_output"), like.dim()), align(call.mask("grad"), like.dim()));
}

// Halves of self along dim.
Tensor gated(const DependenceCall& call, const Tensor& like, size_t /*result*/) {
  const Tensor mask = call.mask("self");
  int64_t dim = call.integer("dim", -1);
  if (dim < 0) dim += like.dim();
  const int64_t half = like.size(dim);
  return either(mask.narrow(dim + 1, 0, half), mask.narrow(dim + 1, half, half));
}

}  // namespace

const DependenceRows& pointwise_dependence() {
  using Kind = DependenceKind;
  static const auto* rows = [] {
    auto* all = new DependenceRows{
        {"mul", Kind::kRule, &product},
        {"div", Kind::kRule, &quotient},
        {"addcmul", Kind::kRule, &add_product},
        {"addcdiv", Kind::kRule, &add_product},
        {"pow", Kind::kRule, &power},
        {"add", Kind::kRule, &sum_of_two},
        {"sub", Kind::kRule, &sum_of_two},
        {"where", Kind::kRule, &choice},
        {"copy", Kind::kRule, &only_source},
        {"glu", Kind::kRule, &gated},
        {"threshold_backward", Kind::kRule, &only_gradient},
        {"hardtanh_backward", Kind::kRule, &only_gradient},
        {"hardsigmoid_backward", Kind::kRule, &only_gradient},
        {"hardshrink_backward", Kind::kRule, &only_gradient},
        {"softshrink_backward", Kind::kRule, &only_gradient},
        {"leaky_relu_backward", Kind::kRule, &only_gradient},
        {"native_dropout_backward", Kind::kRule, &only_gradient},
        {"native_dropout", Kind::kRule, &any_of_all},
        {"fmod", Kind::kRule, &any_of_all},
        {"bernoulli", Kind::kNothing},
    };
    // Of the elements of one tensor, or of several that broadcast.
    for (const char* name : {"_conj_physical",
                             "abs",
                             "acos",
                             "acosh",
                             "angle",
                             "asin",
                             "asinh",
                             "atan",
                             "atan2",
                             "atanh",
                             "celu",
                             "clamp",
                             "clamp_max",
                             "clamp_min",
                             "clone",
                             "conj_physical",
                             "copysign",
                             "cos",
                             "cosh",
                             "deg2rad",
                             "digamma",
                             "elu",
                             "erf",
                             "erfc",
                             "erfinv",
                             "exp",
                             "exp2",
                             "expm1",
                             "float_power",
                             "fmax",
                             "fmin",
                             "frac",
                             "gelu",
                             "gelu_backward",
                             "hardshrink",
                             "hardsigmoid",
                             "hardswish",
                             "hardswish_backward",
                             "hardtanh",
                             "hypot",
                             "i0",
                             "igamma",
                             "igammac",
                             "ldexp",
                             "leaky_relu",
                             "lerp",
                             "lgamma",
                             "log",
                             "log10",
                             "log1p",
                             "log2",
                             "logaddexp",
                             "logaddexp2",
                             "logit",
                             "logit_backward",
                             "maximum",
                             "minimum",
                             "mish",
                             "mish_backward",
                             "mvlgamma",
                             "nan_to_num",
                             "neg",
                             "polygamma",
                             "positive",
                             "rad2deg",
                             "reciprocal",
                             "relu",
                             "relu6",
                             "remainder",
                             "rsqrt",
                             "rsub",
                             "selu",
                             "sgn",
                             "sigmoid",
                             "sigmoid_backward",
                             "silu",
                             "silu_backward",
                             "sin",
                             "sinc",
                             "sinh",
                             "softplus",
                             "softplus_backward",
                             "softshrink",
                             "special_airy_ai",
                             "special_bessel_j0",
                             "special_bessel_j1",
                             "special_bessel_y0",
                             "special_bessel_y1",
                             "special_entr",
                             "special_erfcx",
                             "special_i0e",
                             "special_i1",
                             "special_i1e",
                             "special_log_ndtr",
                             "special_modified_bessel_i0",
                             "special_modified_bessel_i1",
                             "special_modified_bessel_k0",
                             "special_modified_bessel_k1",
                             "special_ndtri",
                             "special_scaled_modified_bessel_k0",
                             "special_scaled_modified_bessel_k1",
                             "special_spherical_bessel_j0",
                             "special_xlog1py",
                             "special_zeta",
                             "sqrt",
                             "square",
                             "tan",
                             "tanh",
                             "tanh_backward",
                             "threshold",
                             "xlogy",
                             "elu_backward",
                             "log_sigmoid_forward",
                             "log_sigmoid_backward",
                             "_prelu_kernel",
                             "_prelu_kernel_backward",
                             "complex",
                             "polar",
                             "mse_loss_backward",
                             "smooth_l1_loss_backward",
                             "huber_loss_backward",
                             "binary_cross_entropy_backward",
                             "soft_margin_loss_backward"}) {
      all->push_back({name, Kind::kRule, &any_of_all});
    }
    for (const char* name : {"_to_copy", "lift_fresh_copy", "lift"}) {
      all->push_back({name, Kind::kRule, &only_self});
    }
    // No derivative, or none but zero.
    for (const char* name : {"detach",     "ceil",         "floor",         "round",
                             "trunc",      "sign",         "heaviside",     "nextafter",
                             "zero",       "fill",         "floor_divide",  "zeros_like",
                             "empty_like", "new_zeros",    "new_empty",     "new_empty_strided",
                             "rand_like",  "randn_like",   "randint_like",  "normal",
                             "uniform",    "exponential",  "random",        "cauchy",
                             "geometric",  "log_normal",   "poisson",       "multinomial",
                             "bucketize",  "searchsorted", "argmax",        "argmin",
                             "isin",       "histc",        "count_nonzero", "frexp"}) {
      all->push_back({name, Kind::kNothing});
    }
    for (const char* name : {"ones_like", "full_like", "new_ones", "new_full"}) {
      all->push_back({name, Kind::kMade});
    }
    for (const char* name :
         {"_local_scalar_dense", "equal", "allclose", "nonzero", "_unique", "_unique2",
          "unique_dim", "unique_consecutive", "unique_dim_consecutive", "repeat_interleave",
          "bincount", "is_nonzero", "histogram", "_histogramdd_from_bin_cts"}) {
      all->push_back({name, Kind::kReadsValues});
    }
    return all;
  }();
  return *rows;
}

}  // namespace torchlift
