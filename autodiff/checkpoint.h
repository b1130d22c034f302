#ifndef TORCHLIFT_AUTODIFF_CHECKPOINT_H_
#define TORCHLIFT_AUTODIFF_CHECKPOINT_H_

// File: autodiff/checkpoint.h
//
// checkpoint: runs a function and keeps, for the backward pass, its arguments and not what it
// computed on the way. That is computed again when the gradient comes. Memory for time.
//
//   at::Tensor deep(const std::vector<Layer>& layers, at::Tensor x) {
//     for (const Layer& layer : layers) {
//       x = tl::checkpoint([&layer](const at::Tensor& h) { return layer(h); }, x);
//     }
//     return x;
//   }
//
// The value is the function's, and so are all of its derivatives: under grad, vjp, jvp, Jacobians,
// Hessians, vmap, in any nesting, and with libtorch's own backward(). What the function closes over
// gets its gradient too. When it runs again, random numbers, autocast and grad modes are as they
// were, and so are the levels around.
//
// The results of matrix products and convolutions, which cost the most, can be kept:
//
//   tl::checkpoint(f, tl::CheckpointPolicy::products(), x);       // all of them
//   tl::checkpoint(f, tl::CheckpointPolicy::named({"q"}), x);     // those that f marks by
//                                                                 // checkpoint_name(x.mm(w), "q")
//
// f runs later, and must then still be able to: it is copied, and what a lambda holds by reference
// has to live as long as the result can be differentiated. It must do the same again: pure but for
// random numbers. What is asked of it further, and what becomes of memory, is in
// docs/checkpoint.md.
//
// The arguments are trees (core/tree.h) of tensors; so is the result.
//
// Throws UnsupportedError if f writes into an argument in place; from the backward pass, if an
// argument was written into since, if f did something else when it ran again, or if it closes over
// a tensor of a vmap, or has run in a jvp, that has ended by then. After Chen et al., "Training
// deep nets with sublinear memory cost" (2016).

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/tree.h"

namespace torchlift {

// What a checkpoint keeps besides the arguments.
struct CheckpointPolicy {
  enum class Keep : uint8_t { kNothing, kProducts, kNamed };

  Keep keep = Keep::kNothing;
  std::set<std::string> names = {};

  static CheckpointPolicy nothing() { return {}; }
  // The results of mm, bmm, addmm, baddbmm, mv, addmv and convolution, and so of linear, matmul,
  // conv2d... that are made of them.
  static CheckpointPolicy products() { return {.keep = Keep::kProducts}; }
  // Those of them that the function gives one of these names.
  static CheckpointPolicy named(std::set<std::string> names) {
    return {.keep = Keep::kNamed, .names = std::move(names)};
  }
};

// x. In a checkpoint that keeps this name, the product that x is the result of is kept. A name on
// another value has no effect.
const at::Tensor& checkpoint_name(const at::Tensor& x, const std::string& name);

namespace checkpoint_internal {

using Leaves = std::vector<at::Tensor>;
using Function = std::function<Leaves(const Leaves&)>;

// f(arguments). f is kept, and called again in backward passes.
Leaves run(Function f, Leaves arguments, const CheckpointPolicy& policy);

}  // namespace checkpoint_internal

template <class F, class... Arguments>
auto checkpoint(const F& f, const CheckpointPolicy& policy, const Arguments&... arguments) {
  static_assert(
      std::is_invocable_v<const F&, const Arguments&...>,
      "torchlift::checkpoint: the function cannot be called with these arguments. They are handed "
      "to it by const reference, and a lambda must not be mutable.");
  using Result = std::decay_t<std::invoke_result_t<const F&, const Arguments&...>>;
  std::tuple<Arguments...> tree(arguments...);
  checkpoint_internal::Leaves leaves = tree_flatten(tree);
  // The structure and the constants: its tensors would keep their graph alive.
  tree = tree_map(std::move(tree), [](const at::Tensor&) { return at::Tensor(); });
  const auto result = std::make_shared<std::optional<Result>>();
  auto call = [f, tree = std::move(tree),
               first = std::weak_ptr(result)](const checkpoint_internal::Leaves& tensors) {
    const Result value = std::apply(f, tree_unflatten(tree, tensors));
    checkpoint_internal::Leaves flat = tree_flatten(value);
    if (const auto target = first.lock(); target != nullptr && !target->has_value()) {
      *target = value;
    }
    return flat;
  };
  const checkpoint_internal::Leaves outputs =
      checkpoint_internal::run(std::move(call), std::move(leaves), policy);
  return tree_unflatten(*std::move(*result), outputs);
}

template <class F, class... Arguments>
requires std::is_invocable_v<const F&, const Arguments&...>
auto checkpoint(const F& f, const Arguments&... arguments) {
  return checkpoint(f, CheckpointPolicy::nothing(), arguments...);
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CHECKPOINT_H_
