#ifndef TORCHLIFT_BATCHING_VMAP_H_
#define TORCHLIFT_BATCHING_VMAP_H_

// File: batching/vmap.h
//
// vmap: turns a function of one example into a function of a batch of examples, which runs once,
// not once an example.
//
//   at::Tensor score(const Params& p, const at::Tensor& x);   // x: [features] -> []
//
//   auto scores = tl::vmap(score, {.in_dims = tl::in(tl::kNone, 0)});
//   at::Tensor s = scores(params, xs);                        // xs: [batch, features] -> [batch]
//
// The function may be anything that can be called: a function pointer, a lambda, another transform.
// Its arguments and its result are trees (core/tree.h); numbers in them are carried along. It is
// called with const references. vmap returns a value: copy it, keep it, call it from several
// threads at once.
//
// Options (all have a default):
//   in_dims     which dim of which argument holds the examples: see batching/batch_dims.h. Default
//   0.
//               Numbers and undefined tensors that are not named by an entry of their own are
//               skipped.
//   out_dims    where the examples go in the result. Default 0. A result that does not depend on
//   the
//               example is repeated, as a view; with kNone it is returned once.
//   randomness  kError: random operators throw. kSame: all examples see the same numbers.
//   kDifferent:
//               each sees its own. kReproducible: each sees its own, which depend on the seed, the
//               call and the example alone, so that any chunk_size and a loop
//               (batching/random_rows.h) give the same numbers.
//   chunk_size  how many examples to run at a time, to bound memory. The result is that of a run
//   without
//               chunks, but for the random numbers of kDifferent.
//   memory_budget  instead: how many bytes a chunk may take at its peak, beside the result.
//               The size of the chunks is chosen by what the first ones take; memory_report()
//               (batching/chunks.h) tells it. Throws if one example takes more.
//   axis_size   the number of examples; needed only when no argument is batched.
//
// Throws TransformError, before the function runs, if in_dims does not fit the arguments, if a dim
// is out of range, if the batched dims differ in size, or if nothing is batched; and after it, if
// out_dims does not fit the result.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "batching/batch_dims.h"
#include "batching/chunks.h"
#include "core/level.h"
#include "core/tree.h"

namespace torchlift {

struct VmapOptions {
  Dims in_dims = 0;
  Dims out_dims = 0;
  Randomness randomness = Randomness::kError;
  std::optional<int64_t> chunk_size = std::nullopt;
  std::optional<int64_t> axis_size = std::nullopt;
  std::optional<int64_t> memory_budget = std::nullopt;
};

namespace vmap_internal {

Chunks::Options chunk_options(const VmapOptions& options);

// Throws if chunk_size, axis_size or memory_budget is not a size.
void check_options(const VmapOptions& options);

// The dims of the leaves of a result, by out_dims.
struct OutDimCollector {
  const Dims& out_dims;
  std::vector<std::optional<int64_t>>& dims;

  void operator()(const Path& path, const at::Tensor& leaf) const;
  template <class Constant>
  void operator()(const Path&, const Constant&) const {}
};

template <class Visitor, class Tuple, size_t... I>
void walk_arguments(Visitor& visit, Tuple& arguments, std::index_sequence<I...>) {
  (walk_trees(visit, Path{nullptr, PathStep::argument(I, sizeof...(I))}, std::get<I>(arguments)),
   ...);
}

}  // namespace vmap_internal

// What vmap returns.
template <class F>
class VmapFunction {
 public:
  VmapFunction(F f, VmapOptions options) : f_(std::move(f)), options_(std::move(options)) {
    vmap_internal::check_options(options_);
  }

  template <class... Args>
  auto operator()(const Args&... args) const {
    static_assert(
        std::is_invocable_v<const F&, const std::decay_t<const Args&>&...>,
        "torchlift::vmap: the function cannot be called with these arguments. They are handed "
        "to it by const reference (take them by value or by const reference), and a lambda "
        "must not be mutable.");
    static_assert(
        !std::is_void_v<std::invoke_result_t<const F&, const std::decay_t<const Args&>&...>>,
        "torchlift::vmap: the function returns nothing; it must return a tree of tensors.");
    return call(std::tuple<std::decay_t<const Args&>...>(args...));
  }

 private:
  template <class Tuple>
  auto call(Tuple arguments) const {
    constexpr auto kIndices = std::make_index_sequence<std::tuple_size_v<Tuple>>();
    MappedInputs inputs(options_.in_dims, options_.axis_size);
    vmap_internal::walk_arguments(inputs, arguments, kIndices);
    if (inputs.inconsistent()) {
      inputs.start_report();
      vmap_internal::walk_arguments(inputs, arguments, kIndices);
      inputs.throw_report();
    }
    const int64_t size = inputs.batch_size();
    if (options_.chunk_size.value_or(size) < size ||
        (options_.memory_budget.has_value() && size > 0)) {
      return run_in_chunks(arguments, inputs, size);
    }
    const LevelScope scope({.size = size, .randomness = options_.randomness});
    inputs.lift(scope.level());
    return run(arguments, scope);
  }

  template <class Tuple>
  auto run(const Tuple& arguments, const LevelScope& scope) const {
    auto result = std::apply(f_, arguments);
    MappedOutputs outputs(options_.out_dims, *scope.level());
    walk_trees(outputs, Path{}, result);
    return result;
  }

  template <class Tuple>
  auto run_in_chunks(Tuple& arguments, MappedInputs& inputs, int64_t size) const {
    using Result = decltype(run(arguments, std::declval<const LevelScope&>()));
    Chunks chunks(vmap_internal::chunk_options(options_), size, inputs.device());
    std::optional<Result> first;
    while (chunks.next()) {
      const LevelScope scope(chunks.level());
      inputs.lift_slice(chunks.start(), scope.level());
      Result result = run(arguments, scope);
      std::vector<std::optional<int64_t>> dims;
      vmap_internal::OutDimCollector collect{options_.out_dims, dims};
      walk_trees(collect, Path{}, std::as_const(result));
      chunks.end(tree_flatten(result), dims);
      if (!first.has_value())
        first = tree_map(std::move(result), [](at::Tensor&) { return at::Tensor(); });
    }
    return tree_unflatten(*std::move(first), chunks.join());
  }

  F f_;
  VmapOptions options_;
};

// See the top of this file.
template <class F>
VmapFunction<std::decay_t<F>> vmap(F&& f, VmapOptions options = {}) {
  return VmapFunction<std::decay_t<F>>(std::forward<F>(f), std::move(options));
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_VMAP_H_
