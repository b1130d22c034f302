#ifndef TORCHLIFT_AUTODIFF_JVP_H_
#define TORCHLIFT_AUTODIFF_JVP_H_

// File: autodiff/jvp.h
//
// jvp: runs a function and pushes one tangent of its arguments forward to a tangent of its value.
//
//   at::Tensor predict(const Params& p, const at::Tensor& x);           // -> [n]
//
//   auto [y, dy] = tl::jvp(predict, std::tuple(params, x), std::tuple(dparams, dx));
//   auto [s, ds] = tl::jvp(energy, x, dx);                              // one argument
//
// dy = (d predict / d params) dparams + (d predict / dx) dx, without a Jacobian (forward-mode
// differentiation: J. Revels et al., "Forward-Mode Automatic Differentiation in Julia", 2016). A
// tangent has the structure of its primal, and the shape, dtype and device of each of its tensors;
// an undefined tensor in it stands for zero. y and dy have the type of f's result.
//
// A function with a second result, which is not differentiated, returns std::pair{value, aux}:
//
//   auto [y, dy, aux] = tl::jvp(f, tl::kHasAux, x, dx);
//
// Where the value does not depend on an argument, its tangent is zero; with {.strict = true} that
// is an error. What f computes under no_grad, or detaches, is a constant, as it is to grad and vjp;
// around jvp, no_grad only disconnects the results from the outside.
//
// jvp nests with every other transform and with itself: jvp(vjp), vjp(jvp), vmap(jvp), jvp(jvp).
//
// Throws TransformError, before the function runs, if there is no tensor among the primals or an
// integer one, or if a tangent does not fit its primal.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/forward.h"
#include "autodiff/primals.h"
#include "core/tree.h"

namespace torchlift {

struct JvpOptions {
  // Throw if a tensor of the value does not depend on any primal.
  bool strict = false;
};

namespace autodiff_internal {

template <class T>
struct IsTuple : std::false_type {};
template <class... T>
struct IsTuple<std::tuple<T...>> : std::true_type {};

// The arguments of a function: a tuple of them, or a tree that is the only one.
template <class T>
auto as_arguments(const T& arguments) {
  if constexpr (IsTuple<T>::value) {
    return arguments;
  } else {
    return std::tuple<T>(arguments);
  }
}

[[noreturn]] void throw_tangent_structure(const char* transform, const std::string& mismatch);
void check_tangent(const char* transform, const Path& path, const at::Tensor& primal,
                   const at::Tensor& tangent);

// Visitors of walk_trees over primals and tangents.
struct TangentChecker {
  const char* transform;

  void operator()(const Path& path, const at::Tensor& primal, const at::Tensor& tangent) const {
    check_tangent(transform, path, primal, tangent);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&, const Constant&) const {}
};

// Replaces each primal by its dual.
struct DualBinder {
  ForwardScope& scope;

  void operator()(const Path&, at::Tensor& primal, const at::Tensor& tangent) const {
    if (!primal.defined()) return;
    primal = tangent.defined() ? scope.dual(primal, tangent.clone()) : scope.constant(primal);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&, const Constant&) const {}
};

// Checks everything before anything is changed.
template <class Arguments, size_t... I>
void check_tangents(const char* transform, const Arguments& primals, const Arguments& tangents,
                    std::index_sequence<I...>) {
  PrimalChecker check{transform};
  walk_at<I...>(check, primals);
  if (check.count == 0) throw_nothing_to_differentiate(transform, argument_names<I...>());
  const std::string mismatch = structure_mismatch(primals, tangents);
  if (!mismatch.empty()) throw_tangent_structure(transform, mismatch);
  TangentChecker check_tangents{transform};
  (walk_trees(check_tangents, Path{nullptr, PathStep::argument(I, sizeof...(I))},
              std::get<I>(primals), std::get<I>(tangents)),
   ...);
}

// The values and tangents of the first `count` outputs; tangents are zeros where there are none.
struct JvpResult {
  std::vector<at::Tensor> primals;  // of all outputs
  std::vector<at::Tensor> tangents;
};
JvpResult finish_jvp(ForwardScope& scope, const std::vector<at::Tensor>& outputs, size_t count,
                     JvpOptions options);

template <bool kAux, class F, class Arguments>
auto run_jvp(const F& f, Arguments primals, const Arguments& tangents, JvpOptions options) {
  check_tangents("jvp", primals, tangents,
                 std::make_index_sequence<std::tuple_size_v<Arguments>>());
  ForwardScope scope;
  DualBinder bind{scope};
  walk_trees(bind, Path{}, primals, tangents);
  auto output = std::apply(f, std::as_const(primals));
  const std::vector<at::Tensor> outputs = tree_flatten(output);
  if constexpr (kAux) {
    static_assert(IsPair<decltype(output)>::value,
                  "torchlift::jvp: with kHasAux the function must return std::pair{value, aux}.");
    JvpResult result = finish_jvp(scope, outputs, tree_flatten(output.first).size(), options);
    auto tangent = tree_unflatten(output.first, result.tangents);
    auto seen = tree_unflatten(std::move(output), result.primals);
    return std::tuple(std::move(seen.first), std::move(tangent), std::move(seen.second));
  } else {
    JvpResult result = finish_jvp(scope, outputs, outputs.size(), options);
    auto tangent = tree_unflatten(output, result.tangents);
    return std::pair(tree_unflatten(std::move(output), result.primals), std::move(tangent));
  }
}

}  // namespace autodiff_internal

// {value, tangent}. See the top of this file.
template <class F, class Primals>
auto jvp(const F& f, const Primals& primals, const Primals& tangents, JvpOptions options = {}) {
  return autodiff_internal::run_jvp<false>(f, autodiff_internal::as_arguments(primals),
                                           autodiff_internal::as_arguments(tangents), options);
}

// {value, tangent, aux}, of an f that returns std::pair{value, aux}.
template <class F, class Primals>
auto jvp(const F& f, HasAux, const Primals& primals, const Primals& tangents,
         JvpOptions options = {}) {
  return autodiff_internal::run_jvp<true>(f, autodiff_internal::as_arguments(primals),
                                          autodiff_internal::as_arguments(tangents), options);
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_JVP_H_
