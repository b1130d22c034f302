#ifndef TORCHLIFT_AUTODIFF_CUSTOM_BATCHING_H_
#define TORCHLIFT_AUTODIFF_CUSTOM_BATCHING_H_

// File: autodiff/custom_batching.h
//
// custom_batching: a function with a rule of its own for what vmap makes of it. For what is faster
// on a whole batch than operator by operator (one factorization for all right-hand sides), or
// cannot be mapped at all (a kernel that reads memory).
//
//   // [n, n], [n] -> [n]; my_solve(a, rows) has one for each row: [n, n], [m, n] -> [m, n]
//   const auto solve = tl::custom_batching(
//       [](const at::Tensor& a, const at::Tensor& b) { return my_solve(a, b[None])[0]; },
//       [](const tl::BatchInfo& batch, const tl::BatchedTree<at::Tensor>& a,
//          const tl::BatchedTree<at::Tensor>& b) {
//         if (!a.any()) return my_solve(a.tree, b.tree);  // one factorization: [size, n]
//         ...
//       });
//
//   at::Tensor x = tl::vmap(solve, {.in_dims = tl::in(tl::kNone, 0)})(a, rows);
//
// Arguments and results are trees (core/tree.h). The rule gets, for each argument, a BatchedTree:
// the tree, and for each of its tensors whether it has the batch dim, which is then the first; what
// has none is the same for all examples. It returns the result, with the batch dim in front of
// every tensor; or a BatchedTree of it, which says of each tensor whether it has one.
//
// The rule is applied at the innermost vmap around that maps an argument. What it computes is
// differentiated, and mapped by vmaps further outside, as any code is. Gradients inside of that
// vmap, vmap(grad(f)), are those of the rule as well: it then runs on arguments that all have the
// batch dim where they are differentiated, for the gradients differ from example to example. With
// no argument mapped, the function itself runs.
//
// A rule must give each example what the function would have given it: what it mixes between
// examples is not seen. Random operators in a rule belong to the levels around the vmap.
//
// The result is a value: copy it, keep it, call it from several threads at once.
//
// Throws TransformError where what the rule returns does not fit. After
// jax.custom_batching.custom_vmap and torch.library.register_vmap.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
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

// The vmap that a rule works for.
struct BatchInfo {
  int64_t size = 0;  // number of examples
};

// A tree some of whose tensors have a batch dim, the first.
template <class T>
struct BatchedTree {
  T tree;
  std::vector<bool> batched;  // one for each tensor, in the order of tree_flatten

  bool any() const { return std::find(batched.begin(), batched.end(), true) != batched.end(); }
  bool all() const { return std::find(batched.begin(), batched.end(), false) == batched.end(); }
};

namespace custom_internal {

// The tensors of a tree, and whether they have a batch dim in front.
struct Batch {
  std::vector<at::Tensor> tensors;
  std::vector<bool> batched;
};

struct BatchRules {
  std::function<std::vector<at::Tensor>(const std::vector<at::Tensor>&)> value = nullptr;
  std::function<Batch(int64_t size, const Batch&)> rule = nullptr;
};

// The results, batched by the rule.
std::vector<at::Tensor> call_batched(const std::shared_ptr<const BatchRules>& rules,
                                     const std::vector<at::Tensor>& arguments);

[[noreturn]] void throw_batching_structure(const std::string& mismatch);

template <class T>
struct BatchedOutput {
  using Tree = T;
};
template <class T>
struct BatchedOutput<BatchedTree<T>> {
  using Tree = T;
};

template <class F, class Rule, class... Args>
class BatchingCall {
 public:
  using Arguments = std::tuple<Args...>;
  using Output = std::decay_t<std::invoke_result_t<const F&, const Args&...>>;
  static_assert(std::is_invocable_v<const Rule&, const BatchInfo&, const BatchedTree<Args>&...>,
                "torchlift::custom_batching: the rule is called as rule(BatchInfo, "
                "BatchedTree<Args>...), with "
                "one BatchedTree for each argument of the function.");
  using Result = std::decay_t<
      std::invoke_result_t<const Rule&, const BatchInfo&, const BatchedTree<Args>&...>>;
  static_assert(std::is_same_v<typename BatchedOutput<Result>::Tree, Output>,
                "torchlift::custom_batching: the rule must return a tree of the type of the "
                "function's result, or a BatchedTree of that.");

  BatchingCall(F f, Rule rule, const Arguments& arguments)
      : f_(std::move(f)),
        rule_(std::move(rule)),
        arguments_(tree_map(arguments, [](const at::Tensor&) { return at::Tensor(); })) {}

  std::vector<at::Tensor> value(const std::vector<at::Tensor>& arguments) {
    const Output output = std::apply(f_, tree_unflatten(arguments_, arguments));
    keep(output);
    return tree_flatten(output);
  }

  Batch run_rule(int64_t size, const Batch& arguments) {
    const Arguments trees = tree_unflatten(arguments_, arguments.tensors);
    const Result result = std::apply(rule_, batched_trees(BatchInfo{size}, trees, arguments.batched,
                                                          std::index_sequence_for<Args...>()));
    if constexpr (std::is_same_v<Result, BatchedTree<Output>>) {
      keep(result.tree);
      return {tree_flatten(result.tree), result.batched};
    } else {
      keep(result);
      Batch batch{tree_flatten(result), {}};
      for (const at::Tensor& t : batch.tensors) batch.batched.push_back(t.defined());
      return batch;
    }
  }

  const Output& output() const { return *output_; }

 private:
  // The structure that all runs must return.
  void keep(const Output& output) {
    if (!output_.has_value()) {
      output_ = tree_map(output, [](const at::Tensor&) { return at::Tensor(); });
      return;
    }
    const std::string mismatch = structure_mismatch(*output_, output);
    if (!mismatch.empty()) throw_batching_structure(mismatch);
  }

  template <size_t... I>
  static auto batched_trees(const BatchInfo& info, const Arguments& trees,
                            const std::vector<bool>& batched, std::index_sequence<I...>) {
    size_t next = 0;
    // In the order of the arguments, as braces are.
    return std::tuple<BatchInfo, BatchedTree<Args>...>{info,
                                                       take(std::get<I>(trees), batched, next)...};
  }

  template <class T>
  static BatchedTree<T> take(const T& tree, const std::vector<bool>& batched, size_t& next) {
    BatchedTree<T> result{tree, {}};
    for_each_leaf(tree, [&](const at::Tensor&) { result.batched.push_back(batched[next++]); });
    return result;
  }

  const F f_;
  const Rule rule_;
  const Arguments arguments_;
  std::optional<Output> output_;  // set by the first run
};

}  // namespace custom_internal

// What custom_batching returns.
template <class F, class Rule>
class CustomBatching {
 public:
  CustomBatching(F f, Rule rule) : f_(std::move(f)), rule_(std::move(rule)) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    using Call = custom_internal::BatchingCall<F, Rule, std::decay_t<const Args&>...>;
    using Leaves = std::vector<at::Tensor>;
    const typename Call::Arguments arguments(args...);
    const auto call = std::make_shared<Call>(f_, rule_, arguments);
    auto rules = std::make_shared<custom_internal::BatchRules>();
    rules->value = [call](const Leaves& leaves) { return call->value(leaves); };
    rules->rule = [call](int64_t size, const custom_internal::Batch& batch) {
      return call->run_rule(size, batch);
    };
    const Leaves outputs = custom_internal::call_batched(rules, tree_flatten(arguments));
    return tree_unflatten(call->output(), outputs);
  }

 private:
  F f_;
  Rule rule_;
};

// f with a rule for a batch of examples. See the top of this file.
template <class F, class Rule>
CustomBatching<std::decay_t<F>, std::decay_t<Rule>> custom_batching(F&& f, Rule&& rule) {
  return {std::forward<F>(f), std::forward<Rule>(rule)};
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CUSTOM_BATCHING_H_
