// Functions of one number that satisfy a differential equation, element by element: the equation
// gives a recurrence for the coefficients.

#include <ATen/core/Tensor.h>
#include <ATen/ops/abs_ops.h>
#include <ATen/ops/acos_ops.h>
#include <ATen/ops/acosh_ops.h>
#include <ATen/ops/add.h>
#include <ATen/ops/add_ops.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/asin_ops.h>
#include <ATen/ops/asinh_ops.h>
#include <ATen/ops/atan_ops.h>
#include <ATen/ops/atanh_ops.h>
#include <ATen/ops/cos.h>
#include <ATen/ops/cos_ops.h>
#include <ATen/ops/cosh.h>
#include <ATen/ops/cosh_ops.h>
#include <ATen/ops/digamma.h>
#include <ATen/ops/div.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/erf_ops.h>
#include <ATen/ops/erfc_ops.h>
#include <ATen/ops/exp.h>
#include <ATen/ops/exp2_ops.h>
#include <ATen/ops/exp_ops.h>
#include <ATen/ops/expm1_ops.h>
#include <ATen/ops/gt.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/leaky_relu_ops.h>
#include <ATen/ops/lgamma_ops.h>
#include <ATen/ops/log10_ops.h>
#include <ATen/ops/log1p_ops.h>
#include <ATen/ops/log2_ops.h>
#include <ATen/ops/log_ops.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/neg.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/pow.h>
#include <ATen/ops/pow_ops.h>
#include <ATen/ops/reciprocal.h>
#include <ATen/ops/reciprocal_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/result_type.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/rsqrt_ops.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/rsub_ops.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/sgn.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/sigmoid_ops.h>
#include <ATen/ops/sin.h>
#include <ATen/ops/sin_ops.h>
#include <ATen/ops/sinh.h>
#include <ATen/ops/sinh_ops.h>
#include <ATen/ops/softplus_ops.h>
#include <ATen/ops/sqrt_ops.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/sub_ops.h>
#include <ATen/ops/tan_ops.h>
#include <ATen/ops/tanh_ops.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numbers>
#include <optional>
#include <string_view>
#include <utility>

#include "autodiff/jet_rules.h"
#include "autodiff/jet_series.h"
#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift::jet_internal {
namespace {

namespace ops = at::_ops;
using at::Tensor;

// --- y' = (a + b y + c y^2) x' -------------------------------------------------------------------

struct Riccati {
  double a, b, c;
};

Coefficients solve(const Riccati& equation, const Tensor& y_0, const Coefficients& x,
                   const Terms& terms) {
  Coefficients y{y_0};
  Coefficients g;  // a + b y + c y^2
  for (int64_t k = 1; k < terms.size(); ++k) {
    Tensor next;
    if (equation.b != 0) next = at::mul(y[k - 1], equation.b);
    if (equation.c != 0) {
      const Tensor square = at::mul(terms.convolve(y, y, k - 1, 0, k - 1), equation.c);
      next = next.defined() ? at::add(next, square) : square;
    }
    if (equation.a != 0 && k == 1) next = at::add(next, equation.a);
    g.push_back(std::move(next));
    y.push_back(terms.integrated_term(g, x, k));
  }
  return y;
}

// at + factor t, without what is zero.
Tensor plus_multiple(double at, const Tensor& t, double factor) {
  const Tensor multiple = factor == 1 ? t : at::mul(t, factor);
  return at == 0 ? multiple : at::add(multiple, at);
}

// y'' = (b + 2 c y) y'.
Tensor pointwise_solution(const Riccati& equation, const Tensor& y, const Tensor& x,
                          const Terms& terms) {
  const auto [a, b, c] = equation;
  const Tensor slope = c == 0   ? plus_multiple(a, y, b)
                       : b == 0 ? plus_multiple(a, at::mul(y, y), c)
                                : plus_multiple(a, at::mul(y, plus_multiple(b, y, c)), 1);
  const Tensor curvature =
      c == 0 ? plus_multiple(0, slope, b) : at::mul(plus_multiple(b, y, 2 * c), slope);
  return terms.pointwise(x, y, slope, curvature);
}

// Op is the solution of the equation.
template <class Op, Riccati kEquation>
Tensor solution(const Tensor& self) {
  const Terms terms = terms_of({self});
  if (terms.many_directions()) {
    return pointwise_solution(kEquation, Op::call(terms.value(self)), self, terms);
  }
  const Coefficients x = terms.of(self);
  return terms.series(solve(kEquation, Op::call(x[0]), x, terms));
}

template <class Op, Riccati kEquation>
JetRule solution_rule() {
  return function_rule<Op, &solution<Op, kEquation>>();
}

// --- y' = g(x) x' --------------------------------------------------------------------------------

// Op is the antiderivative of Slope, which is made of operators on tensors of the level.
template <class Op, auto Slope>
Tensor antiderivative(const Tensor& self) {
  const Terms terms = terms_of({self});
  const Coefficients x = terms.of(self);
  return terms.series(terms.integrate(Op::call(x[0]), terms.of(Slope(self)), x, terms.size()));
}

template <class Op, auto Slope>
JetRule antiderivative_rule() {
  return function_rule<Op, &antiderivative<Op, Slope>>();
}

Tensor reciprocal_of(const Tensor& x) { return at::reciprocal(x); }
Tensor log2_slope(const Tensor& x) { return at::reciprocal(at::mul(x, std::numbers::ln2)); }
Tensor log10_slope(const Tensor& x) { return at::reciprocal(at::mul(x, std::numbers::ln10)); }
Tensor log1p_slope(const Tensor& x) { return at::reciprocal(at::add(x, 1)); }
Tensor asin_slope(const Tensor& x) { return at::rsqrt(at::rsub(at::mul(x, x), 1)); }
Tensor acos_slope(const Tensor& x) { return at::neg(asin_slope(x)); }
Tensor atan_slope(const Tensor& x) { return at::reciprocal(at::add(at::mul(x, x), 1)); }
Tensor asinh_slope(const Tensor& x) { return at::rsqrt(at::add(at::mul(x, x), 1)); }
// Not of x^2 - 1, whose root is another one left of zero (complex numbers).
Tensor acosh_slope(const Tensor& x) {
  return at::mul(at::rsqrt(at::sub(x, 1)), at::rsqrt(at::add(x, 1)));
}
Tensor atanh_slope(const Tensor& x) { return at::reciprocal(at::rsub(at::mul(x, x), 1)); }
Tensor erf_slope(const Tensor& x) {
  return at::mul(at::exp(at::neg(at::mul(x, x))), 2 * std::numbers::inv_sqrtpi);
}
Tensor erfc_slope(const Tensor& x) { return at::neg(erf_slope(x)); }

Tensor softplus(const Tensor& self, const at::Scalar& beta, const at::Scalar& threshold) {
  const Terms terms = terms_of({self});
  const Coefficients x = terms.of(self);
  const Tensor z = at::mul(self, beta);
  const Tensor linear = at::gt(z, threshold);
  const Tensor slope = at::where(linear, at::ones_like(x[0]), at::sigmoid(z));
  return terms.series(terms.integrate(ops::softplus::call(x[0], beta, threshold), terms.of(slope),
                                      x, terms.size()));
}

// --- sines and cosines ---------------------------------------------------------------------------

// s' = c x' and c' = sign s x', both at once. Which of them is wanted?
Tensor rotation(const Tensor& self, const Tensor& s_0, const Tensor& c_0, double sign,
                bool wants_cosine) {
  const Terms terms = terms_of({self});
  if (terms.many_directions()) {
    const Tensor &value = wants_cosine ? c_0 : s_0, &other = wants_cosine ? s_0 : c_0;
    return terms.pointwise(self, value, wants_cosine && sign < 0 ? at::neg(other) : other,
                           sign < 0 ? at::neg(value) : value);
  }
  const Coefficients x = terms.of(self);
  Coefficients s{s_0}, c{c_0};
  for (int64_t k = 1; k < terms.size(); ++k) {
    Tensor next = terms.integrated_term(c, x, k);
    const Tensor slope = terms.integrated_term(s, x, k);
    c.push_back(sign < 0 ? at::neg(slope) : slope);
    s.push_back(std::move(next));
  }
  return terms.series(wants_cosine ? c : s);
}

Tensor value_of(const Tensor& self) { return terms_of({self}).value(self); }

Tensor sin(const Tensor& self) {
  const Tensor x = value_of(self);
  return rotation(self, at::sin(x), at::cos(x), -1, false);
}
Tensor cos(const Tensor& self) {
  const Tensor x = value_of(self);
  return rotation(self, at::sin(x), at::cos(x), -1, true);
}
Tensor sinh(const Tensor& self) {
  const Tensor x = value_of(self);
  return rotation(self, at::sinh(x), at::cosh(x), 1, false);
}
Tensor cosh(const Tensor& self) {
  const Tensor x = value_of(self);
  return rotation(self, at::sinh(x), at::cosh(x), 1, true);
}

// --- quotients and powers ------------------------------------------------------------------------

Tensor div(const Tensor& self, const Tensor& other) {
  const Terms terms = terms_of({self, other});
  const at::ScalarType type = at::result_type(self, other);
  const int64_t rank = std::max(self.dim(), other.dim());
  return terms.series(terms.divide(terms.of(self.to(type), rank), terms.of(other.to(type), rank)));
}

Tensor div_mode(const Tensor& self, const Tensor& other,
                std::optional<std::string_view> rounding_mode) {
  if (!rounding_mode.has_value()) return at::div(self, other);
  const Terms terms = terms_of({self, other});
  return at::div(primal(self, terms.level), primal(other, terms.level), rounding_mode);
}

Tensor div_scalar_mode(const Tensor& self, const at::Scalar& other,
                       std::optional<std::string_view> rounding_mode) {
  if (!rounding_mode.has_value()) return at::div(self, other);
  return at::div(primal(self, terms_of({self}).level), other, rounding_mode);
}

// y = x^r satisfies x y' = r y x'. Of the powers that have no derivative at zero anyway.
Coefficients singular_power(const Tensor& y_0, const Coefficients& x, double r,
                            const Terms& terms) {
  Coefficients y{y_0};
  for (int64_t k = 1; k < terms.size(); ++k) {
    Tensor sum;
    for (int64_t j = 1; j <= k; ++j) {
      const double factor =
          (r * static_cast<double>(j) - static_cast<double>(k - j)) / static_cast<double>(k);
      sum = terms.plus_product(sum, x, j, y, k - j, factor);
    }
    y.push_back(at::div(sum, x[0]));
  }
  return y;
}

Tensor sqrt(const Tensor& self) {
  const Terms terms = terms_of({self});
  const Coefficients x = terms.of(self);
  Coefficients y{ops::sqrt::call(x[0])};
  for (int64_t k = 1; k < terms.size(); ++k) {
    const Tensor known = terms.convolve(y, y, k, 1, k - 1);
    const Tensor rest = known.defined() ? at::sub(x[k], known) : x[k];
    y.push_back(at::div(rest, at::mul(y[0], 2)));
  }
  return terms.series(y);
}

Tensor rsqrt(const Tensor& self) {
  const Terms terms = terms_of({self});
  const Coefficients x = terms.of(self);
  return terms.series(singular_power(ops::rsqrt::call(x[0]), x, -0.5, terms));
}

at::Scalar minus_one(const at::Scalar& number) {
  if (number.isComplex()) return number.toComplexDouble() - 1.0;
  if (number.isIntegral(/*includeBool=*/true)) return number.toLong() - 1;
  return number.toDouble() - 1;
}

// y' = r x^(r - 1) x', and so on down: no division by x, which may be zero. (The recurrence of
// singular_power would give NaN for x^2 there.)
Coefficients power(const Coefficients& x, const at::Scalar& exponent, int64_t count,
                   const Terms& terms) {
  if (exponent.equal(0)) return {at::ones_like(at::pow(x[0], exponent))};
  const Tensor y_0 = at::pow(x[0], exponent);
  if (count == 1) return {y_0};
  Coefficients slope = power(x, minus_one(exponent), count - 1, terms);
  for (Tensor& each : slope) {
    if (each.defined()) each = at::mul(each, exponent);
  }
  return terms.integrate(y_0, slope, x, count);
}

// r x^(r - 1) and r (r - 1) x^(r - 2), which are zero rather than NaN where the factor is.
Tensor pointwise_power(const Tensor& self, const at::Scalar& exponent, const Terms& terms) {
  const Tensor x = terms.value(self), y = at::pow(x, exponent);
  if (exponent.equal(2)) return terms.pointwise(self, y, at::add(x, x), 2);
  if (exponent.equal(1)) return terms.pointwise(self, y, at::ones_like(x), 0);
  const at::Scalar once = minus_one(exponent), twice = minus_one(once);
  const Tensor slope = at::mul(at::pow(x, once), exponent);
  return terms.pointwise(self, y, slope, at::mul(at::mul(at::pow(x, twice), once), exponent));
}

Tensor pow_number(const Tensor& self, const at::Scalar& exponent) {
  const Terms terms = terms_of({self});
  if (terms.many_directions() && !exponent.isComplex() && !exponent.equal(0)) {
    return pointwise_power(self, exponent, terms);
  }
  return terms.series(power(terms.of(self), exponent, terms.size(), terms));
}

// c^x: y' = log(c) y x'.
Tensor number_pow(const at::Scalar& self, const Tensor& exponent) {
  const Terms terms = terms_of({exponent});
  if (self.isComplex() || self.toDouble() <= 0) {
    const auto type = at::result_type(exponent, self);
    return at::pow(at::scalar_tensor(self, exponent.options().dtype(type)), exponent);
  }
  const Coefficients x = terms.of(exponent);
  const Riccati equation{0, std::log(self.toDouble()), 0};
  return terms.series(solve(equation, at::pow(self, x[0]), x, terms));
}

// --- sums with numbers ---------------------------------------------------------------------------

Tensor as_tensor(const at::Scalar& number, const Tensor& partner) {
  return at::scalar_tensor(number, partner.options().dtype(at::result_type(partner, number)));
}

Tensor add_number(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha) {
  return at::add(self, as_tensor(other, self), alpha);
}
Tensor sub_number(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha) {
  return at::sub(self, as_tensor(other, self), alpha);
}
Tensor rsub_number(const Tensor& self, const at::Scalar& other, const at::Scalar& alpha) {
  return at::sub(as_tensor(other, self), self, alpha);
}

// --- by the sign of coefficient 0 ----------------------------------------------------------------

Tensor relu(const Tensor& self) {
  return at::threshold_backward(self, primal(self, terms_of({self}).level), 0);
}

Tensor leaky_relu(const Tensor& self, const at::Scalar& slope) {
  return at::leaky_relu_backward(self, primal(self, terms_of({self}).level), slope,
                                 /*self_is_result=*/false);
}

[[maybe_unused]] const JetRules kRules{
    {
        solution_rule<ops::exp, Riccati{0, 1, 0}>(),
        solution_rule<ops::exp2, Riccati{0, std::numbers::ln2, 0}>(),
        solution_rule<ops::expm1, Riccati{1, 1, 0}>(),
        solution_rule<ops::tanh, Riccati{1, 0, -1}>(),
        solution_rule<ops::sigmoid, Riccati{0, 1, -1}>(),
        solution_rule<ops::tan, Riccati{1, 0, 1}>(),
        solution_rule<ops::reciprocal, Riccati{0, 0, -1}>(),
    },
    {
        antiderivative_rule<ops::log, &reciprocal_of>(),
        antiderivative_rule<ops::log2, &log2_slope>(),
        antiderivative_rule<ops::log10, &log10_slope>(),
        antiderivative_rule<ops::log1p, &log1p_slope>(),
        antiderivative_rule<ops::asin, &asin_slope>(),
        antiderivative_rule<ops::acos, &acos_slope>(),
        antiderivative_rule<ops::atan, &atan_slope>(),
        antiderivative_rule<ops::asinh, &asinh_slope>(),
        antiderivative_rule<ops::acosh, &acosh_slope>(),
        antiderivative_rule<ops::atanh, &atanh_slope>(),
        antiderivative_rule<ops::erf, &erf_slope>(),
        antiderivative_rule<ops::erfc, &erfc_slope>(),
        function_rule<ops::softplus, &softplus>(),
    },
    {
        function_rule<ops::sin, &sin>(),
        function_rule<ops::cos, &cos>(),
        function_rule<ops::sinh, &sinh>(),
        function_rule<ops::cosh, &cosh>(),
    },
    {
        function_rule<ops::div_Tensor, &div>({{0}}),
        function_rule<ops::div_Tensor_mode, &div_mode>(),
        function_rule<ops::div_Scalar_mode, &div_scalar_mode>(),
        function_rule<ops::sqrt, &sqrt>(),
        function_rule<ops::rsqrt, &rsqrt>(),
        function_rule<ops::pow_Tensor_Scalar, &pow_number>(),
        function_rule<ops::pow_Scalar, &number_pow>(),
    },
    {
        function_rule<ops::add_Scalar, &add_number>(),
        function_rule<ops::sub_Scalar, &sub_number>(),
        function_rule<ops::rsub_Scalar, &rsub_number>(),
        function_rule<ops::relu, &relu>(),
        function_rule<ops::leaky_relu, &leaky_relu>(),
    },
};

}  // namespace
}  // namespace torchlift::jet_internal
