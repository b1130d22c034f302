#ifndef TORCHLIFT_AUTODIFF_JET_H_
#define TORCHLIFT_AUTODIFF_JET_H_

// File: autodiff/jet.h
//
// jet: Taylor mode. Runs a function once and pushes the derivatives of its arguments along a curve,
// up to any order, forward to those of its value.
//
//   at::Tensor f(const at::Tensor& x);
//
//   // x(t) with x(0) = x, x'(0) = v, x''(0) = a: derivatives stacked in a new first dim.
//   auto [y, series] = tl::jet(f, x, at::stack({v, a}));   // series[0] = (f o x)'(0), [1] = ''(0)
//   auto [y, series] = tl::jet(f, std::tuple(x, p), std::tuple(xs, at::Tensor()));  // p is
//   constant
//
// They are derivatives, not coefficients: nothing is divided by j!. series has the structure of the
// primals, with one tensor of shape [K, ...] for each tensor of shape [...]; K, the order, is the
// same for all of them, and may be 0. An undefined tensor stands for a primal that does not depend
// on t. What comes out has the type of f's result, twice: values, and series of shape [K, ...].
//
// K nested jvps compute the same, but take 2^K times the work of f; jet takes about K (linear
// operators) to K^2 / 2 (products) times. See J. Bettencourt et al., "Taylor-Mode Automatic
// Differentiation for Higher-Order Derivatives in JAX", 2019.
//
// A function with a second result, which is not expanded, returns std::pair{value, aux}:
//
//   auto [y, series, aux] = tl::jet(f, tl::kHasAux, x, xs);
//
// What f computes under no_grad, or detaches, is a constant, as it is to jvp; so is what it draws,
// and every integer. Comparisons and bool() look at values, the terms of order 0. f gets copies of
// the primals: what it writes into them in place, the caller does not see.
//
// jet nests with every other transform and with itself.
//
// Throws TransformError, before the function runs, if there is no tensor among the primals or an
// integer one, or if a series does not fit its primal; UnsupportedError for an operator that has no
// derivative formula.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/jet_scope.h"
#include "autodiff/jvp.h"
#include "autodiff/primals.h"
#include "core/tree.h"

namespace torchlift {
namespace autodiff_internal {

[[noreturn]] void throw_series_structure(const std::string& mismatch);
[[noreturn]] void throw_no_series();

// Checks one series, and that all have the same order.
struct SeriesChecker {
  std::optional<int64_t> order;
  std::string where;  // that order was found

  void operator()(const Path& path, const at::Tensor& primal, const at::Tensor& series) {
    if (series.defined()) check(path, primal, series);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&, const Constant&) const {}

 private:
  void check(const Path& path, const at::Tensor& primal, const at::Tensor& series);
};

// Replaces each primal by its series.
struct SeriesBinder {
  const JetScope& scope;

  void operator()(const Path&, at::Tensor& primal, const at::Tensor& series) const {
    if (!primal.defined()) return;
    primal = series.defined() ? scope.series(primal, series) : scope.constant(primal);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&, const Constant&) const {}
};

// Returns the order.
template <class Arguments, size_t... I>
int64_t check_series(const Arguments& primals, const Arguments& series, std::index_sequence<I...>) {
  PrimalChecker check{"jet"};
  walk_at<I...>(check, primals);
  if (check.count == 0) throw_nothing_to_differentiate("jet", argument_names<I...>());
  const std::string mismatch = structure_mismatch(primals, series);
  if (!mismatch.empty()) throw_series_structure(mismatch);
  SeriesChecker check_series{};
  (walk_trees(check_series, Path{nullptr, PathStep::argument(I, sizeof...(I))},
              std::get<I>(primals), std::get<I>(series)),
   ...);
  if (!check_series.order.has_value()) throw_no_series();
  return *check_series.order;
}

// The values of all outputs, and the series of the first `count`: zeros where there are none.
struct JetResult {
  std::vector<at::Tensor> primals;
  std::vector<at::Tensor> series;
};
JetResult finish_jet(JetScope& scope, int64_t order, const std::vector<at::Tensor>& outputs,
                     size_t count);

template <bool kAux, class F, class Arguments>
auto run_jet(const F& f, Arguments primals, const Arguments& series) {
  const int64_t order =
      check_series(primals, series, std::make_index_sequence<std::tuple_size_v<Arguments>>());
  JetScope scope(order);
  SeriesBinder bind{scope};
  walk_trees(bind, Path{}, primals, series);
  auto output = std::apply(f, std::as_const(primals));
  const std::vector<at::Tensor> outputs = tree_flatten(output);
  if constexpr (kAux) {
    static_assert(IsPair<decltype(output)>::value,
                  "torchlift::jet: with kHasAux the function must return std::pair{value, aux}.");
    JetResult result = finish_jet(scope, order, outputs, tree_flatten(output.first).size());
    auto expanded = tree_unflatten(output.first, result.series);
    auto seen = tree_unflatten(std::move(output), result.primals);
    return std::tuple(std::move(seen.first), std::move(expanded), std::move(seen.second));
  } else {
    JetResult result = finish_jet(scope, order, outputs, outputs.size());
    auto expanded = tree_unflatten(output, result.series);
    return std::pair(tree_unflatten(std::move(output), result.primals), std::move(expanded));
  }
}

}  // namespace autodiff_internal

// {value, series}. See the top of this file.
template <class F, class Primals>
auto jet(const F& f, const Primals& primals, const Primals& series) {
  return autodiff_internal::run_jet<false>(f, autodiff_internal::as_arguments(primals),
                                           autodiff_internal::as_arguments(series));
}

// {value, series, aux}, of an f that returns std::pair{value, aux}.
template <class F, class Primals>
auto jet(const F& f, HasAux, const Primals& primals, const Primals& series) {
  return autodiff_internal::run_jet<true>(f, autodiff_internal::as_arguments(primals),
                                          autodiff_internal::as_arguments(series));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_JET_H_
