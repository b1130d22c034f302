#ifndef TORCHLIFT_AUTODIFF_CUSTOM_RULES_H_
#define TORCHLIFT_AUTODIFF_CUSTOM_RULES_H_

// File: autodiff/custom_rules.h
//
// custom_jvp and custom_vjp: functions with a derivative of their own, given by a rule instead of
// by the operators they are made of. For what has no derivative by itself (a rounding), a better
// one than its operators have (a stable formula, an implicit function), or another on purpose (a
// gradient that is clipped).
//
//   // The tangent of the result, linear in the tangents of the arguments.
//   const auto square = tl::custom_jvp(
//       [](const at::Tensor& x) { return x * x; },
//       [](const std::tuple<at::Tensor>& primals, const std::tuple<at::Tensor>& tangents) {
//         const auto& [x] = primals;
//         const auto& [t] = tangents;
//         return std::pair(x * x, 2 * x * t);
//       });
//
//   // The gradients of the arguments, linear in the cotangent of the result.
//   const auto clipped = tl::custom_vjp(
//       [](const at::Tensor& x) { return x.sum(); },
//       [](const at::Tensor& x) { return std::pair(x.sum(), x); },          // {value, residuals}
//       [](const at::Tensor& x, const at::Tensor& cotangent) {              // residuals, cotangent
//         return std::tuple((cotangent * at::ones_like(x)).clamp(-0.5, 0.5));
//       });
//
//   at::Tensor g = tl::grad(square)(x);
//
// Arguments and results are trees (core/tree.h). Of the arguments, numbers and integer tensors are
// constants: an integer tensor's tangent is zeros, and its gradient an undefined tensor. Integer
// results are constants too: an undefined tangent, and a cotangent of zeros. bwd returns a
// std::tuple with one gradient for each argument, a tree like it (of one argument, the tree itself
// will do); an undefined tensor stands for zero. Residuals are any tree. Gradients and tangents
// have the shape of what they belong to; float16 for float32 and the like are converted.
//
// The mode that is not given is the transpose of the one that is: the vjp of the jvp rule in the
// tangents, the vjp of bwd in the cotangent. Rules are ordinary code to further derivatives, which
// differentiate the jvp rule, or fwd and bwd. In every domain that differentiates the result,
// inside and outside of any number of vmaps, the rule is what answers. (bwd's residuals are those
// of the first run where only the first derivative is asked for; else fwd runs again, with the same
// random numbers.) What is called under no_grad, or on arguments of stop_gradient, is a constant as
// always.
//
// The results are values: copy them, keep them, call them from several threads at once. The
// functions in them may run later and on other threads.
//
// A tensor that a function or a rule closes over is a constant to the rules, so one that is being
// differentiated is an error: pass it as an argument. One that belongs to a vmap may be used as
// long as nothing outside of that vmap differentiates the result.
//
// Throws TransformError where a rule's result does not fit; UnsupportedError if the function writes
// into an argument in place. After jax.custom_jvp and jax.custom_vjp (Bradbury et al., "JAX:
// composable transformations of Python+NumPy programs", 2018).

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/tree.h"

namespace torchlift {
namespace custom_internal {

using Leaves = std::vector<at::Tensor>;

// One call of a function with a derivative of its own, on the tensors of its trees. Either jvp, or
// fwd and bwd.
struct Rules {
  const char* transform = "";
  // f(arguments)
  std::function<Leaves(const Leaves&)> value = nullptr;
  // jvp(arguments, tangents) -> tangents of the results
  std::function<Leaves(const Leaves&, const Leaves&)> jvp = nullptr;
  // fwd(arguments) -> results, residuals
  std::function<std::pair<Leaves, Leaves>(const Leaves&)> fwd = nullptr;
  // bwd(arguments, residuals, cotangents) -> gradients. Of the arguments, only the shapes matter.
  std::function<Leaves(const Leaves&, const Leaves&, const Leaves&)> bwd = nullptr;
};

// The results, differentiable by the rules.
Leaves call(Rules rules, const Leaves& arguments);

// The gradient (or tangent), which has to fit the tensor it belongs to. what: "bwd's gradient of",
// "the tangent that the rule returned for".
at::Tensor checked(const char* transform, const char* what, const Path& path,
                   const at::Tensor& primal, const at::Tensor& derivative);
[[noreturn]] void throw_structure(const char* transform, const char* what, const char* like,
                                  const std::string& mismatch);

// Visitor of walk_trees over a tree and the derivatives that belong to it: collects those.
struct Collector {
  const char* transform;
  const char* what;
  Leaves& found;

  void operator()(const Path& path, const at::Tensor& primal, const at::Tensor& derivative) const {
    found.push_back(checked(transform, what, path, primal, derivative));
  }
  template <class Constant>
  void operator()(const Path&, const Constant&, const Constant&) const {}
};

// A tree without its tensors, which would keep memory and graphs alive.
template <class T>
T structure_of(T tree) {
  return tree_map(std::move(tree), [](const at::Tensor&) { return at::Tensor(); });
}

// The structure of a tree that all runs of a call return; that of the first is kept.
template <class T>
void agree(const char* transform, const char* what, std::optional<T>& kept, const T& tree) {
  if (!kept.has_value()) {
    kept = structure_of(tree);
    return;
  }
  const std::string mismatch = structure_mismatch(*kept, tree);
  if (!mismatch.empty()) throw_structure(transform, what, "that of an earlier run", mismatch);
}

template <class T>
struct IsPairOf : std::false_type {};
template <class A, class B>
struct IsPairOf<std::pair<A, B>> : std::true_type {};

template <class T>
using Bare = std::remove_cv_t<std::remove_reference_t<T>>;

// --- custom_jvp ----------------------------------------------------------------------------------

template <class F, class Rule, class Arguments>
class JvpCall {
 public:
  using Output =
      Bare<decltype(std::apply(std::declval<const F&>(), std::declval<const Arguments&>()))>;

  JvpCall(F f, Rule rule, const Arguments& arguments)
      : f_(std::move(f)), rule_(std::move(rule)), arguments_(structure_of(arguments)) {}

  Leaves value(const Leaves& arguments) {
    const Output output = std::apply(f_, tree_unflatten(arguments_, arguments));
    agree("custom_jvp", "the result", output_, output);
    return tree_flatten(output);
  }

  Leaves push(const Leaves& arguments, const Leaves& tangents) {
    static_assert(std::is_invocable_v<const Rule&, const Arguments&, const Arguments&>,
                  "torchlift::custom_jvp: the rule is called as rule(primals, tangents), with two "
                  "std::tuples "
                  "of the function's arguments.");
    const Arguments primals = tree_unflatten(arguments_, arguments);
    const auto pair = rule_(primals, tree_unflatten(arguments_, tangents));
    using Pair = Bare<decltype(pair)>;
    static_assert(IsPairOf<Pair>::value,
                  "torchlift::custom_jvp: the rule must return std::pair{output, tangent}.");
    static_assert(std::is_same_v<Bare<decltype(pair.first)>, Output> &&
                      std::is_same_v<Bare<decltype(pair.second)>, Output>,
                  "torchlift::custom_jvp: the output and the tangent that the rule returns must "
                  "have the type of the function's result.");
    agree("custom_jvp", "the output that the rule returned", output_, pair.first);
    const std::string mismatch = structure_mismatch(pair.first, pair.second);
    if (!mismatch.empty()) {
      throw_structure("custom_jvp", "the tangent that the rule returned", "the output", mismatch);
    }
    Leaves found;
    Collector collect{"custom_jvp", "the tangent that the rule returned for output", found};
    walk_trees(collect, Path{}, pair.first, pair.second);
    return found;
  }

  const Output& output() const { return *output_; }

 private:
  const F f_;
  const Rule rule_;
  const Arguments arguments_;
  std::optional<Output> output_;  // set by the first run
};

// --- custom_vjp ----------------------------------------------------------------------------------

template <class F, class Fwd, class Bwd, class Arguments>
class VjpCall {
 public:
  using Output =
      Bare<decltype(std::apply(std::declval<const F&>(), std::declval<const Arguments&>()))>;
  using Pair =
      Bare<decltype(std::apply(std::declval<const Fwd&>(), std::declval<const Arguments&>()))>;
  static_assert(IsPairOf<Pair>::value,
                "torchlift::custom_vjp: fwd must return std::pair{output, residuals}.");
  using Residuals = typename Pair::second_type;
  static_assert(std::is_same_v<typename Pair::first_type, Output>,
                "torchlift::custom_vjp: the output that fwd returns must have the type of the "
                "function's result.");
  static_assert(std::is_invocable_v<const Bwd&, const Residuals&, const Output&>,
                "torchlift::custom_vjp: bwd is called as bwd(residuals, cotangent), where the "
                "cotangent has the type of the function's result.");

  VjpCall(F f, Fwd fwd, Bwd bwd, const Arguments& arguments)
      : f_(std::move(f)),
        fwd_(std::move(fwd)),
        bwd_(std::move(bwd)),
        arguments_(structure_of(arguments)) {}

  Leaves value(const Leaves& arguments) {
    const Output output = std::apply(f_, tree_unflatten(arguments_, arguments));
    agree("custom_vjp", "the result", output_, output);
    return tree_flatten(output);
  }

  std::pair<Leaves, Leaves> forward(const Leaves& arguments) {
    const Pair pair = std::apply(fwd_, tree_unflatten(arguments_, arguments));
    agree("custom_vjp", "the output that fwd returned", output_, pair.first);
    agree("custom_vjp", "the residuals that fwd returned", residuals_, pair.second);
    return {tree_flatten(pair.first), tree_flatten(pair.second)};
  }

  Leaves pull(const Leaves& arguments, const Leaves& residuals, const Leaves& cotangents) {
    const Arguments primals = tree_unflatten(arguments_, arguments);
    return collect(primals, bwd_(tree_unflatten(*residuals_, residuals),
                                 tree_unflatten(*output_, cotangents)));
  }

  const Output& output() const { return *output_; }

 private:
  static constexpr size_t kCount = std::tuple_size_v<Arguments>;

  template <class Gradients>
  static Leaves collect(const Arguments& primals, const Gradients& gradients) {
    if constexpr (kCount == 1 && !std::is_same_v<Gradients, Arguments>) {
      static_assert(
          std::is_same_v<Gradients, std::tuple_element_t<0, Arguments>>,
          "torchlift::custom_vjp: bwd must return the gradient of the argument, a tree of "
          "its type, or a std::tuple of that.");
      return collect(primals, Arguments(gradients));
    } else {
      static_assert(
          std::is_same_v<Gradients, Arguments>,
          "torchlift::custom_vjp: bwd must return a std::tuple with one gradient for each "
          "argument, each of the argument's type. An undefined at::Tensor stands for "
          "zero.");
      const std::string mismatch = structure_mismatch(primals, gradients);
      if (!mismatch.empty()) {
        throw_structure("custom_vjp", "what bwd returned", "the arguments", mismatch);
      }
      Leaves found;
      each(primals, gradients, found, std::make_index_sequence<kCount>());
      return found;
    }
  }

  template <size_t... I>
  static void each(const Arguments& primals, const Arguments& gradients, Leaves& found,
                   std::index_sequence<I...>) {
    Collector collect{"custom_vjp", "bwd's gradient of", found};
    (walk_trees(collect, Path{nullptr, PathStep::argument(I, kCount)}, std::get<I>(primals),
                std::get<I>(gradients)),
     ...);
  }

  const F f_;
  const Fwd fwd_;
  const Bwd bwd_;
  const Arguments arguments_;
  std::optional<Output> output_;        // set by the first run
  std::optional<Residuals> residuals_;  // set by the first fwd
};

}  // namespace custom_internal

// What custom_jvp returns.
template <class F, class Rule>
class CustomJvp {
 public:
  CustomJvp(F f, Rule rule) : f_(std::move(f)), rule_(std::move(rule)) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    using Arguments = std::tuple<std::decay_t<const Args&>...>;
    using Call = custom_internal::JvpCall<F, Rule, Arguments>;
    using custom_internal::Leaves;
    const Arguments arguments(args...);
    const auto call = std::make_shared<Call>(f_, rule_, arguments);
    const Leaves outputs = custom_internal::call(
        {.transform = "custom_jvp",
         .value = [call](const Leaves& leaves) { return call->value(leaves); },
         .jvp = [call](const Leaves& leaves,
                       const Leaves& tangents) { return call->push(leaves, tangents); }},
        tree_flatten(arguments));
    return tree_unflatten(call->output(), outputs);
  }

 private:
  F f_;
  Rule rule_;
};

// f with the derivative of a rule for forward mode. See the top of this file.
template <class F, class Rule>
CustomJvp<std::decay_t<F>, std::decay_t<Rule>> custom_jvp(F&& f, Rule&& rule) {
  return {std::forward<F>(f), std::forward<Rule>(rule)};
}

// What custom_vjp returns.
template <class F, class Fwd, class Bwd>
class CustomVjp {
 public:
  CustomVjp(F f, Fwd fwd, Bwd bwd) : f_(std::move(f)), fwd_(std::move(fwd)), bwd_(std::move(bwd)) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    using Arguments = std::tuple<std::decay_t<const Args&>...>;
    using Call = custom_internal::VjpCall<F, Fwd, Bwd, Arguments>;
    using custom_internal::Leaves;
    const Arguments arguments(args...);
    const auto call = std::make_shared<Call>(f_, fwd_, bwd_, arguments);
    const Leaves outputs = custom_internal::call(
        {.transform = "custom_vjp",
         .value = [call](const Leaves& leaves) { return call->value(leaves); },
         .fwd = [call](const Leaves& leaves) { return call->forward(leaves); },
         .bwd =
             [call](const Leaves& leaves, const Leaves& residuals, const Leaves& cotangents) {
               return call->pull(leaves, residuals, cotangents);
             }},
        tree_flatten(arguments));
    return tree_unflatten(call->output(), outputs);
  }

 private:
  F f_;
  Fwd fwd_;
  Bwd bwd_;
};

// f with the derivative of rules for reverse mode. See the top of this file.
template <class F, class Fwd, class Bwd>
CustomVjp<std::decay_t<F>, std::decay_t<Fwd>, std::decay_t<Bwd>> custom_vjp(F&& f, Fwd&& fwd,
                                                                            Bwd&& bwd) {
  return {std::forward<F>(f), std::forward<Fwd>(fwd), std::forward<Bwd>(bwd)};
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CUSTOM_RULES_H_
