#ifndef TORCHLIFT_AUTODIFF_VJP_H_
#define TORCHLIFT_AUTODIFF_VJP_H_

// File: autodiff/vjp.h
//
// vjp: runs a function and returns, beside its value, the function that pulls cotangents of the
// value back to cotangents of the arguments.
//
//   at::Tensor predict(const Params& p, const at::Tensor& x);           // -> [n]
//
//   auto [y, pullback] = tl::vjp(predict, params, x);
//   auto [gp, gx] = pullback(at::ones_like(y));                         // as often as you like, at
//   any time
//
// All primals are differentiated; capture in a lambda what is not. The pullback takes one tree of
// the value's type (an undefined tensor in it stands for zero), and returns a std::tuple with a
// tree for each primal, or the tree itself if there is only one primal. It can be given to another
// transform: vmap(pullback).
//
// A function with a second result, which is not pulled back, returns std::pair{value, aux}:
//
//   auto [y, pullback, aux] = tl::vjp(f, tl::kHasAux, params, x);
//
// value, aux and the cotangents are connected to what is differentiated around vjp, and to nothing
// else. The pullback holds the memory that the backward pass needs, until its last copy is gone.
//
// Throws TransformError, before the function runs, if there is no tensor among the primals or an
// integer one. The pullback throws it if the cotangents are of another structure, shape or dtype
// than the value.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/primals.h"
#include "autodiff/reverse.h"
#include "core/tree.h"

namespace torchlift {
namespace autodiff_internal {

[[noreturn]] void throw_cotangent_structure(const std::string& mismatch);
void check_cotangent(const Path& path, const at::Tensor& value, const at::Tensor& cotangent);
void check_value(const std::vector<at::Tensor>& outputs);

// Visitor of walk_trees over a value and its cotangents: checks, and collects the cotangents.
struct CotangentCollector {
  std::vector<at::Tensor>& cotangents;

  void operator()(const Path& path, const at::Tensor& value, const at::Tensor& cotangent) const {
    check_cotangent(path, value, cotangent);
    cotangents.push_back(cotangent);
  }
  template <class Constant>
  void operator()(const Path&, const Constant&, const Constant&) const {}
};

}  // namespace autodiff_internal

// The function that vjp returns.
template <class Value, class... Primals>
class VjpFunction {
 public:
  VjpFunction(Pullback pullback, Value value, std::tuple<Primals...> primals)
      : pullback_(std::move(pullback)), value_(std::move(value)), primals_(std::move(primals)) {}

  auto operator()(const Value& cotangents) const {
    const std::string mismatch = structure_mismatch(value_, cotangents);
    if (!mismatch.empty()) autodiff_internal::throw_cotangent_structure(mismatch);
    std::vector<at::Tensor> flat;
    autodiff_internal::CotangentCollector collect{flat};
    walk_trees(collect, Path{}, value_, cotangents);
    flat.resize(pullback_.outputs().size());  // none for aux
    return place(pullback_(std::move(flat)), std::index_sequence_for<Primals...>());
  }

 private:
  template <size_t... I>
  auto place(std::vector<at::Tensor> gradients, std::index_sequence<I...>) const {
    return autodiff_internal::place_gradients<I...>(primals_, std::move(gradients));
  }

  Pullback pullback_;
  Value value_;                     // structure and shapes
  std::tuple<Primals...> primals_;  // structure
};

namespace autodiff_internal {

template <class F, class... Primals, size_t... I>
auto run_vjp(const F& f, ReverseScope& scope, std::tuple<Primals...>& primals,
             std::index_sequence<I...>) {
  static_assert(
      std::is_invocable_v<const F&, const Primals&...>,
      "torchlift::vjp: the function cannot be called with these primals. They are handed to it "
      "by const reference (take them by value or by const reference), and a lambda must not be "
      "mutable.");
  bind_primals<I...>("vjp", scope, primals);
  return std::apply(f, std::as_const(primals));
}

template <class Value, class... Primals>
auto make_vjp(Pullback pullback, const Value& value, std::tuple<Primals...> primals) {
  return VjpFunction<Value, Primals...>(std::move(pullback), value, std::move(primals));
}

}  // namespace autodiff_internal

// {value, pullback}. See the top of this file.
template <class F, class... Primals>
auto vjp(const F& f, const Primals&... primals) {
  static_assert(sizeof...(Primals) > 0,
                "torchlift::vjp: vjp(f, primals...) needs at least one primal.");
  std::tuple<std::decay_t<const Primals&>...> arguments(primals...);
  ReverseScope scope;
  auto output =
      autodiff_internal::run_vjp(f, scope, arguments, std::index_sequence_for<Primals...>());
  std::vector<at::Tensor> outputs = tree_flatten(output);
  autodiff_internal::check_value(outputs);
  Pullback pullback = scope.finish(outputs);
  auto value = tree_unflatten(std::move(output), pullback.outputs());
  auto function = autodiff_internal::make_vjp(std::move(pullback), value, std::move(arguments));
  return std::pair(std::move(value), std::move(function));
}

// {value, pullback, aux}, of an f that returns std::pair{value, aux}.
template <class F, class... Primals>
auto vjp(const F& f, HasAux, const Primals&... primals) {
  static_assert(sizeof...(Primals) > 0,
                "torchlift::vjp: vjp(f, kHasAux, primals...) needs at least one primal.");
  std::tuple<std::decay_t<const Primals&>...> arguments(primals...);
  ReverseScope scope;
  auto output =
      autodiff_internal::run_vjp(f, scope, arguments, std::index_sequence_for<Primals...>());
  static_assert(autodiff_internal::IsPair<decltype(output)>::value,
                "torchlift::vjp: with kHasAux the function must return std::pair{value, aux}.");
  autodiff_internal::check_value(tree_flatten(output.first));
  Pullback pullback = scope.finish(tree_flatten(output));
  auto seen = tree_unflatten(std::move(output), pullback.outputs());
  auto function =
      autodiff_internal::make_vjp(std::move(pullback), seen.first, std::move(arguments));
  return std::tuple(std::move(seen.first), std::move(function), std::move(seen.second));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_VJP_H_
