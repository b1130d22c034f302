#ifndef TORCHLIFT_AUTODIFF_JET_SERIES_H_
#define TORCHLIFT_AUTODIFF_JET_SERIES_H_

// File: autodiff/jet_series.h
//
// Truncated power series whose coefficients are tensors, x(t) = x_0 + x_1 t + ... + x_K t^K, and
// their arithmetic (Griewank and Walther, "Evaluating Derivatives", 2nd edition, 2008, chapter 13).
// This is what the rules of jet are made of (autodiff/jet_rules.h). Not for users.
//
//   at::Tensor x;                        // of a jet's level: a series or a constant
//   Coefficients c = coefficients(x);    // {x_0, ..., x_K}, or {x} of a constant
//   at::Tensor y = series_like(x, exp_coefficients)
//
// The coefficients are those of the powers, x^(j) / j!, so that a product is a convolution.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "core/level.h"

namespace torchlift::jet_internal {

// The first ones; those that are missing are zero.
using Coefficients = std::vector<at::Tensor>;

// Whether t is a series of `level`: a tensor of it with a batch dim.
bool is_series(const at::Tensor& t, const Level& level);

// The coefficients of a tensor of `level`, stacked in dim 0. t must be a series.
at::Tensor stacked(const at::Tensor& t, const Level& level);

// A series of `level`, from its coefficients.
at::Tensor to_series(at::Tensor coefficients, const LevelPtr& level);

// Coefficient 0, a constant of `level`; t itself if it is none of its series.
at::Tensor primal(const at::Tensor& t, const LevelPtr& level);

// The same tensor, tracked by nobody in the level's domain.
at::Tensor untracked(const at::Tensor& t, const LevelPtr& level);

// [value, 0, 0, ...], `size` of them, in memory of their own.
at::Tensor spread_value(const at::Tensor& value, int64_t size);

// The terms of a level whose rule is at work: NOTE [rules of series] in autodiff/jet_rules.h.
struct Terms {
  LevelPtr level;

  int64_t size() const { return level->size(); }
  Coefficients of(const at::Tensor& t) const;
  at::Tensor series(const Coefficients& coefficients) const;
};

// The level of the first series among the tensors; one of them must be one.
Terms terms_of(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors);

// sum over j of a_j b_{k-j}, for first <= j <= last; undefined where all the products are zero.
at::Tensor convolve(const Coefficients& a, const Coefficients& b, int64_t k, int64_t first,
                    int64_t last);

// The first `size` coefficients of the quotient. b[0] is what to divide by.
Coefficients divide(const Coefficients& a, const Coefficients& b, int64_t size);

// The series y with y(0) = y_0 and y'(t) = g(x(t)) x'(t), given g's coefficients: the chain rule,
// integrated term by term.
Coefficients integrate(const at::Tensor& y_0, const Coefficients& g, const Coefficients& x,
                       int64_t size);

// One term of it, of t^k, from g's first k coefficients.
at::Tensor integrated_term(const Coefficients& g, const Coefficients& x, int64_t k);

}  // namespace torchlift::jet_internal

#endif  // TORCHLIFT_AUTODIFF_JET_SERIES_H_
