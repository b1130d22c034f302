#ifndef TORCHLIFT_AUTODIFF_PRIMALS_H_
#define TORCHLIFT_AUTODIFF_PRIMALS_H_

// File: autodiff/primals.h
//
// What grad and vjp share: trees of arguments on the way into a differentiation, trees of gradients
// on the way out. Not for users.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/reverse.h"
#include "core/tree.h"

namespace torchlift {

// Says that a function returns a pair, of what is differentiated and of anything else worth having:
// grad(f, kHasAux), vjp(f, kHasAux, primals...).
struct HasAux {
  explicit HasAux() = default;
};
inline constexpr HasAux kHasAux{};

namespace autodiff_internal {

// Throws unless the tensor is of a floating-point or complex dtype.
void check_differentiable(const char* transform, const Path& path, const at::Tensor& leaf);

// Throws: no tensor among the arguments that are differentiated.
[[noreturn]] void throw_nothing_to_differentiate(const char* transform,
                                                 const std::string& arguments);

// The visitor of walk_trees that checks tensors. Separate from PrimalBinder so that all errors come
// before anything is changed.
struct PrimalChecker {
  const char* transform;
  size_t count = 0;

  void operator()(const Path& path, const at::Tensor& leaf) {
    if (!leaf.defined()) return;
    check_differentiable(transform, path, leaf);
    ++count;
  }
  template <class Constant>
  void operator()(const Path&, const Constant&) {}
};

// Replaces each tensor by its primal.
struct PrimalBinder {
  ReverseScope& scope;

  void operator()(const Path&, at::Tensor& leaf) const {
    if (leaf.defined()) leaf = scope.primal(leaf);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&) const {}
};

// Replaces each primal by the next gradient.
struct GradientPlacer {
  std::vector<at::Tensor>& gradients;
  size_t next = 0;

  void operator()(const Path&, at::Tensor& leaf) {
    if (leaf.defined()) leaf = std::move(gradients[next++]);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&) {}
};

// Calls visit on the leaves of the arguments at these positions.
template <size_t... Argnums, class Visitor, class Tuple>
void walk_at(Visitor& visit, Tuple& arguments) {
  (walk_trees(
       visit,
       Path{nullptr, PathStep::argument(Argnums, std::tuple_size_v<std::remove_const_t<Tuple>>)},
       std::get<Argnums>(arguments)),
   ...);
}

// "argument 0", "arguments 0, 2".
template <size_t... Argnums>
std::string argument_names() {
  std::string text = sizeof...(Argnums) == 1 ? "argument " : "arguments ";
  size_t count = 0;
  ((text += (count++ == 0 ? "" : ", ") + std::to_string(Argnums)), ...);
  return text;
}

// Makes primals of the arguments at these positions.
template <size_t... Argnums, class Tuple>
void bind_primals(const char* transform, ReverseScope& scope, Tuple& arguments) {
  PrimalChecker check{transform};
  walk_at<Argnums...>(check, arguments);
  if (check.count == 0) throw_nothing_to_differentiate(transform, argument_names<Argnums...>());
  PrimalBinder bind{scope};
  walk_at<Argnums...>(bind, arguments);
}

// The trees at these positions, with gradients for tensors: one tree, or a tuple of several.
template <size_t... Argnums, class Tuple>
auto place_gradients(Tuple arguments, std::vector<at::Tensor> gradients) {
  GradientPlacer place{gradients};
  walk_at<Argnums...>(place, arguments);
  if constexpr (sizeof...(Argnums) == 1) {
    return (std::get<Argnums>(std::move(arguments)), ...);
  } else {
    return std::make_tuple(std::get<Argnums>(std::move(arguments))...);
  }
}

template <class T>
struct IsPair : std::false_type {};
template <class A, class B>
struct IsPair<std::pair<A, B>> : std::true_type {};

// Whether each of the positions occurs once.
template <size_t... Argnums>
constexpr bool all_different() {
  const size_t argnums[] = {Argnums...};
  for (size_t i = 0; i < sizeof...(Argnums); ++i) {
    for (size_t j = 0; j < i; ++j) {
      if (argnums[i] == argnums[j]) return false;
    }
  }
  return true;
}

}  // namespace autodiff_internal
}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_PRIMALS_H_
