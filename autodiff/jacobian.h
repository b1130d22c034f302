#ifndef TORCHLIFT_AUTODIFF_JACOBIAN_H_
#define TORCHLIFT_AUTODIFF_JACOBIAN_H_

// File: autodiff/jacobian.h
//
// Jacobians and Hessians: jacrev, jacfwd, jacobian, hessian.
//
//   at::Tensor predict(const Params& p, const at::Tensor& x);        // -> [n]
//
//   at::Tensor j = tl::jacrev(square)(x);                   // [n, ...x's shape]
//   Params jp = tl::jacfwd(predict)(params, x);             // jp.w: [n, ...w's shape]
//   auto [jp, jx] = tl::jacobian<0, 1>(predict)(params, x);
//   at::Tensor h = tl::hessian(energy)(x);                  // [...x's shape, ...x's shape]
//   auto [j, aux] = tl::jacrev(f, tl::kHasAux)(x);          // f returns std::pair{value, aux}
//
// jacrev pulls all rows back at once after one run of f, jacfwd runs f once with all columns as
// tangents; jacobian takes the one with fewer of them (and runs f once more to count), hessian is
// jacfwd(jacrev(f)), forward over reverse, or for one or two input numbers Taylor mode
// (autodiff/hessian_blocks.h). Options: {.chunk_size = n} computes n rows or columns at
// a time, to bound memory, {.memory_budget = bytes} as many as fit; the result is allocated once.
// jacfwd then runs f once a chunk.
//
// A result has the type of the function's value with the type of the argument (a std::tuple of
// several) in place of each tensor: a std::pair<at::Tensor, at::Tensor> differentiated by Params is
// a std::pair<Params, Params>. Values may be std::tuple, pair, array, vector, optional and map; a
// struct of yours cannot hold Jacobians in place of its tensors, so return its fields as a tuple.
//
// Random operators in f run once, for all rows and columns.
//
// Complex tensors have more than one kind of derivative, so the options say which: one complex
// number of a function that is holomorphic, or those of real and imaginary parts, in a last dim of
// size 2 (at::view_as_real):
//
//   tl::jacrev(f, {.holomorphic = true})(z);   // [...out, ...z's shape], complex
//   tl::jacrev(f, {.real_view = true})(z);     // [...out, 2, ...z's shape, 2], real
//
// Throws TransformError if an argument that is differentiated has no tensor or an integer one, or
// if the value has one, or no tensor; with holomorphic, if any is not complex. UnsupportedError if
// any is complex and the options do not say what that means.

#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "autodiff/hessian_blocks.h"
#include "autodiff/jacobian_blocks.h"
#include "autodiff/primals.h"
#include "core/tree.h"

namespace torchlift {

struct JacobianOptions {
  // Rows or columns at a time. All of them by default.
  std::optional<int64_t> chunk_size = std::nullopt;
  // Instead: how many bytes a chunk of them may take beside the result (batching/chunk_plan.h).
  std::optional<int64_t> memory_budget = std::nullopt;
  // The function is holomorphic, and all arguments named and all values are complex.
  bool holomorphic = false;
  // Complex tensors are differentiated, and differentiate, as their real views.
  bool real_view = false;
};

namespace autodiff_internal {

enum class JacobianMode { kReverse, kForward, kAny, kHessian };

constexpr const char* jacobian_name(JacobianMode mode) {
  switch (mode) {
    case JacobianMode::kForward:
      return "jacfwd";
    case JacobianMode::kAny:
      return "jacobian";
    case JacobianMode::kHessian:
      return "hessian";
    case JacobianMode::kReverse:
      break;
  }
  return "jacrev";
}

// Makes the tree of a result: an Input in place of each tensor of an Output. `next(input)` returns
// the next one.
template <class Output>
struct JacobianTree {
  static_assert(Tree<Output>::kKind == TreeKind::kConstant,
                "torchlift: a struct cannot hold Jacobians in place of its tensors. Let the "
                "function return a std::tuple of its fields.");
  template <class Next>
  static Output make(const Output& output, Next&) {
    return output;
  }
};

template <class Next, class Output>
auto make_jacobian(const Output& output, Next& next) {
  return JacobianTree<Output>::make(output, next);
}

template <>
struct JacobianTree<at::Tensor> {
  template <class Next>
  static auto make(const at::Tensor&, Next& next) {
    return next();
  }
};

template <class... T>
struct JacobianTree<std::tuple<T...>> {
  template <class Next>
  static auto make(const std::tuple<T...>& output, Next& next) {
    return std::apply(
        [&](const T&... each) {
          // Braces keep the order.
          return std::tuple<decltype(make_jacobian(each, next))...>{make_jacobian(each, next)...};
        },
        output);
  }
};

template <class A, class B>
struct JacobianTree<std::pair<A, B>> {
  template <class Next>
  static auto make(const std::pair<A, B>& output, Next& next) {
    auto first = make_jacobian(output.first, next);
    return std::pair(std::move(first), make_jacobian(output.second, next));
  }
};

template <class T, size_t N>
struct JacobianTree<std::array<T, N>> {
  template <class Next>
  static auto make(const std::array<T, N>& output, Next& next) {
    return make_each(output, next, std::make_index_sequence<N>());
  }

 private:
  template <class Next, size_t... I>
  static auto make_each(const std::array<T, N>& output, Next& next, std::index_sequence<I...>) {
    return std::array<decltype(make_jacobian(output[0], next)), N>{
        make_jacobian(output[I], next)...};
  }
};

template <class T, class A>
requires(Tree<std::vector<T, A>>::kKind == TreeKind::kNode) struct JacobianTree<std::vector<T, A>> {
  template <class Next>
  static auto make(const std::vector<T, A>& output, Next& next) {
    std::vector<decltype(make_jacobian(output[0], next))> result;
    for (const T& each : output) result.push_back(make_jacobian(each, next));
    return result;
  }
};

template <class T>
struct JacobianTree<std::optional<T>> {
  template <class Next>
  static auto make(const std::optional<T>& output, Next& next) {
    using Result = std::optional<decltype(make_jacobian(*output, next))>;
    return output.has_value() ? Result(make_jacobian(*output, next)) : Result();
  }
};

// In the order in which a map is walked.
template <template <class...> class Map, class K, class V, class... More>
struct MapJacobian {
  template <class Next>
  static auto make(const Map<K, V, More...>& output, Next& next) {
    Map<K, decltype(make_jacobian(output.begin()->second, next))> result;
    for (const K* key : tree_internal::sorted_keys(output)) {
      result.emplace(*key, make_jacobian(output.find(*key)->second, next));
    }
    return result;
  }
};

template <class K, class V, class C, class A>
struct JacobianTree<std::map<K, V, C, A>> : MapJacobian<std::map, K, V, C, A> {};
template <class K, class V, class H, class E, class A>
struct JacobianTree<std::unordered_map<K, V, H, E, A>>
    : MapJacobian<std::unordered_map, K, V, H, E, A> {};

}  // namespace autodiff_internal

// What jacrev, jacfwd, jacobian and hessian return.
template <class F, autodiff_internal::JacobianMode kMode, bool kAux, size_t... Argnums>
class JacobianFunction {
 public:
  JacobianFunction(F f, JacobianOptions options)
      : f_(std::move(f)),
        options_(options),
        numbers_(complex_numbers(autodiff_internal::jacobian_name(kMode), options.holomorphic,
                                 options.real_view)) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    static_assert(
        ((Argnums < sizeof...(Args)) && ...),
        "torchlift: a Jacobian function is called with fewer arguments than the number of "
        "the one to differentiate (they count from 0).");
    static_assert(
        std::is_invocable_v<const F&, const std::decay_t<const Args&>&...>,
        "torchlift: the function cannot be called with these arguments. They are handed to it by "
        "const reference (take them by value or by const reference), and a lambda must not be "
        "mutable.");
    return call(std::tuple<std::decay_t<const Args&>...>(args...));
  }

 private:
  template <class Tuple>
  auto call(const Tuple& arguments) const {
    namespace internal = autodiff_internal;
    constexpr const char* kName = internal::jacobian_name(kMode);
    internal::PrimalChecker check{kName};
    internal::walk_at<Argnums...>(check, arguments);
    if (check.count == 0) {
      internal::throw_nothing_to_differentiate(kName, internal::argument_names<Argnums...>());
    }
    std::vector<at::Tensor> inputs;
    const auto collect = [&inputs](const Path&, const auto& leaf) {
      if constexpr (std::is_same_v<std::decay_t<decltype(leaf)>, at::Tensor>) {
        if (leaf.defined()) inputs.push_back(leaf);
      }
    };
    internal::walk_at<Argnums...>(collect, arguments);
    using Output = decltype(std::apply(f_, arguments));
    std::optional<Output> output;
    const JacobianBlocks jacobian = run(
        [&](const std::vector<at::Tensor>& leaves) {
          Output result = std::apply(f_, with(arguments, leaves));
          LeafOutputs out{tree_flatten(result), tree_flatten(value_of(result)).size()};
          if (!output.has_value()) output = std::move(result);
          return out;
        },
        inputs);
    size_t row = 0;
    const auto next = [&] {
      return internal::place_gradients<Argnums...>(arguments, jacobian.blocks[row++]);
    };
    auto result = [&] {
      if constexpr (kMode == internal::JacobianMode::kHessian) {
        const auto gradient = [&] {
          return internal::place_gradients<Argnums...>(arguments, inputs);
        };
        return internal::make_jacobian(internal::make_jacobian(value_of(*output), gradient), next);
      } else {
        return internal::make_jacobian(value_of(*output), next);
      }
    }();
    if constexpr (kAux) {
      auto seen = tree_unflatten(*std::move(output), jacobian.outputs);
      return std::pair(std::move(result), std::move(seen.second));
    } else {
      return result;
    }
  }

  template <class Tuple>
  static Tuple with(Tuple arguments, std::vector<at::Tensor> leaves) {
    autodiff_internal::GradientPlacer place{leaves};
    autodiff_internal::walk_at<Argnums...>(place, arguments);
    return arguments;
  }

  template <class Output>
  static const auto& value_of(const Output& output) {
    if constexpr (kAux) {
      static_assert(autodiff_internal::IsPair<Output>::value,
                    "torchlift: with kHasAux the function must return std::pair{value, aux}.");
      return output.first;
    } else {
      return output;
    }
  }

  JacobianBlocks run(LeafFunction f, const std::vector<at::Tensor>& inputs) const {
    using autodiff_internal::JacobianMode;
    const ChunkOptions chunks{options_.chunk_size, options_.memory_budget};
    if constexpr (kMode == JacobianMode::kReverse) {
      return reverse_jacobian(f, inputs, chunks, numbers_);
    } else if constexpr (kMode == JacobianMode::kForward) {
      return forward_jacobian(f, inputs, chunks, numbers_);
    } else if constexpr (kMode == JacobianMode::kHessian) {
      return hessian_blocks(f, inputs, chunks, numbers_);
    } else {
      return any_jacobian(f, inputs, chunks, numbers_);
    }
  }

  F f_;
  JacobianOptions options_;
  ComplexNumbers numbers_;
};

namespace autodiff_internal {

template <JacobianMode kMode, bool kAux, size_t... Argnums, class F>
auto make_jacobian_function(F&& f, JacobianOptions options) {
  static_assert(all_different<Argnums...>(), "torchlift: an argument is named twice.");
  if constexpr (sizeof...(Argnums) == 0) {
    return JacobianFunction<std::decay_t<F>, kMode, kAux, 0>(std::forward<F>(f), options);
  } else {
    return JacobianFunction<std::decay_t<F>, kMode, kAux, Argnums...>(std::forward<F>(f), options);
  }
}

}  // namespace autodiff_internal

// The Jacobian of f by reverse mode, by its first argument or by those named: jacrev<0, 2>(f).
template <size_t... Argnums, class F>
auto jacrev(F&& f, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kReverse, false, Argnums...>(
      std::forward<F>(f), options);
}

// ... of an f that returns std::pair{value, aux}: {jacobian, aux}.
template <size_t... Argnums, class F>
auto jacrev(F&& f, HasAux, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kReverse, true, Argnums...>(
      std::forward<F>(f), options);
}

// The Jacobian of f by forward mode.
template <size_t... Argnums, class F>
auto jacfwd(F&& f, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kForward, false, Argnums...>(
      std::forward<F>(f), options);
}

template <size_t... Argnums, class F>
auto jacfwd(F&& f, HasAux, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kForward, true, Argnums...>(
      std::forward<F>(f), options);
}

// The Jacobian of f by the cheaper mode.
template <size_t... Argnums, class F>
auto jacobian(F&& f, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kAny, false, Argnums...>(
      std::forward<F>(f), options);
}

template <size_t... Argnums, class F>
auto jacobian(F&& f, HasAux, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kAny, true, Argnums...>(
      std::forward<F>(f), options);
}

// The Hessian of f: the chunk size is that of the columns.
template <size_t... Argnums, class F>
auto hessian(F&& f, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kHessian, false, Argnums...>(
      std::forward<F>(f), options);
}

template <size_t... Argnums, class F>
auto hessian(F&& f, HasAux, JacobianOptions options = {}) {
  using autodiff_internal::JacobianMode;
  return autodiff_internal::make_jacobian_function<JacobianMode::kHessian, true, Argnums...>(
      std::forward<F>(f), options);
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_JACOBIAN_H_
