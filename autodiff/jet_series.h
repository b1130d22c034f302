#ifndef TORCHLIFT_AUTODIFF_JET_SERIES_H_
#define TORCHLIFT_AUTODIFF_JET_SERIES_H_

// File: autodiff/jet_series.h
//
// Truncated power series whose coefficients are tensors, x(t) = x_0 + x_1 t + ... + x_K t^K, and
// their arithmetic (Griewank and Walther, "Evaluating Derivatives", 2nd edition, 2008, chapter 13).
// This is what the rules of jet are made of (autodiff/jet_rules.h). Not for users.
//
//   at::Tensor x;                            // of a jet's level
//   const Terms terms = terms_of({x});
//   const Coefficients c = terms.of(x);      // {x_0, ..., x_K}, or {x} of a constant
//   at::Tensor y = terms.series({y_0, ...});
//
// The coefficients are those of the powers, x^(j) / j!, so that a product is a convolution.
//
// NOTE [series in many directions]
// Second derivatives of f in D directions e_d are coefficients of f(x + t e_d). As D series of
// order 2 that would be D copies of x_0. Now coefficient 2 of whatever is computed from series is
// linear in their coefficients 2, with a factor that depends on x_0 alone, plus products of their
// coefficients 1. So a level may hold x_0 once, x_1 of each direction, and of the coefficients 2
// what is wanted:
//
//   kSummed   their sum over the directions, for a Laplacian (R. Li et al., "A Computational
//             Framework for Neural Network-based Variational Monte Carlo with Forward Laplacian",
//             2023; F. Dangel et al., "Collapsing Taylor Mode Automatic Differentiation", 2025)
//   kPaired   one for each pair of directions, D^2 of them, for a Hessian: d^2 f / de_i de_j is the
//             coefficient of (i, j) plus that of (j, i). One pair may hold more than its half: only
//             the sum has a meaning, so products need not be symmetric.
//
// In the lists of coefficients here x_1 and x_2 have their directions, or pairs, in a new dim in
// front, so they broadcast against x_0.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <utility>
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

enum class SeriesKind : uint8_t { kTaylor, kSummed, kPaired };

// Of a jet's level.
SeriesKind series_kind(const Level& level);

// The terms of a level whose rule is at work: NOTE [rules of series] in autodiff/jet_rules.h.
class Terms {
 public:
  explicit Terms(LevelPtr at) : level(std::move(at)), kind(series_kind(*level)) {}

  const LevelPtr level;
  const SeriesKind kind;

  // How many orders there are, K + 1.
  int64_t size() const { return many_directions() ? 3 : level->size(); }

  // Of a level in many directions (see the note).
  bool many_directions() const { return kind != SeriesKind::kTaylor; }
  int64_t directions() const;
  int64_t seconds() const { return level->size() - directions() - 1; }  // parts of order 2
  // Of the parts [parts, ...] of a tensor: those of order 1, and of order 2.
  at::Tensor first_parts(const at::Tensor& parts) const;
  at::Tensor second_parts(const at::Tensor& parts) const;
  // What two tensors' parts of order 1 give to a product's parts of order 2.
  at::Tensor cross(const at::Tensor& a, const at::Tensor& b) const;
  // f(x), of each element, given f, f' and f'' there.
  at::Tensor pointwise(const at::Tensor& x, const at::Tensor& value, const at::Tensor& slope,
                       const at::Tensor& curvature) const;
  at::Tensor pointwise(const at::Tensor& x, const at::Tensor& value, const at::Tensor& slope,
                       double curvature) const;

  // The coefficients of t, which broadcast against those of tensors of up to `rank` dims (t's own,
  // if it is left out).
  Coefficients of(const at::Tensor& t, int64_t rank = 0) const;
  // Coefficient 0.
  at::Tensor value(const at::Tensor& t) const;
  at::Tensor series(const Coefficients& coefficients) const;

  // sum over j of a_j b_{k-j}, for first <= j <= last; undefined where all the products are zero.
  at::Tensor convolve(const Coefficients& a, const Coefficients& b, int64_t k, int64_t first,
                      int64_t last) const;

  // sum + factor a_i b_j. An undefined tensor is zero.
  at::Tensor plus_product(const at::Tensor& sum, const Coefficients& a, int64_t i,
                          const Coefficients& b, int64_t j, double factor) const;

  // The coefficients of the quotient. b[0] is what to divide by.
  Coefficients divide(const Coefficients& a, const Coefficients& b) const;

  // The series y with y(0) = y_0 and y'(t) = g(x(t)) x'(t), given g's coefficients: the chain rule,
  // integrated term by term. The first `count` coefficients.
  Coefficients integrate(const at::Tensor& y_0, const Coefficients& g, const Coefficients& x,
                         int64_t count) const;

  // One term of it, of t^k, from g's first k coefficients.
  at::Tensor integrated_term(const Coefficients& g, const Coefficients& x, int64_t k) const;

  // The sum of a series that was just made and a constant that broadcasts to its shape and has its
  // type. Writes into the series.
  at::Tensor plus_constant(const at::Tensor& series, const at::Tensor& constant) const;
};

// The level of the first series among the tensors; one of them must be one.
Terms terms_of(std::initializer_list<std::reference_wrapper<const at::Tensor>> tensors);

// t, of shape [N, ...], with as many dims of size 1 after the first as make it `rank` dims and one.
at::Tensor with_rank(const at::Tensor& t, int64_t rank);

}  // namespace torchlift::jet_internal

#endif  // TORCHLIFT_AUTODIFF_JET_SERIES_H_
