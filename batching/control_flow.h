#ifndef TORCHLIFT_BATCHING_CONTROL_FLOW_H_
#define TORCHLIFT_BATCHING_CONTROL_FLOW_H_

// File: batching/control_flow.h
//
// Branches and loops on values, under any stack of transforms:
//
//   cond(pred, true_fn, false_fn, operands...)    an if
//   while_loop(cond_fn, body_fn, init)            a while
//   fori_loop(lower, upper, body_fn, init)        a for over numbers
//   scan(f, init, xs, {.length, .reverse})        a for over the first dim of xs, with results
//
//   auto root = tl::vmap([](const at::Tensor& a) {          // Newton's method, example by example
//     return tl::while_loop([&](const at::Tensor& x) { return (x * x - a).abs().gt(1e-6); },
//                           [&](const at::Tensor& x) { return 0.5 * (x + a / x); }, a);
//   });
//   at::Tensor r = root(at::arange(1, 9, at::kDouble));
//
// Without vmap they are an if, a while and a for: they run eagerly and nothing is traced. Under
// vmap a condition may differ from example to example. Then each branch runs once, for the examples
// that take it and no others; and a loop goes on with the examples that have not finished, so that
// the work is what they ask for. (In nested vmaps a row is a pair of examples: NOTE [rows of
// several levels] in batching/row_set.h.) All of it is differentiable, in reverse and in forward
// mode, any number of times, and a formula that is infinite for other examples leaves no NaN
// behind.
//
// Operands, what loops carry, and results are trees (core/tree.h) of tensors. The functions may
// close over anything; they must be pure: what they write in place into a tensor from outside
// throws where it could be lost, and they may be called for some examples only.
//
// pred, and what cond_fn returns: a bool tensor without dims. What a loop carries keeps its
// structure, shapes and dtypes; both branches return the same. Throws TransformError if not, or
// UnsupportedError for a write into a tensor from outside.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <concepts>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/tree.h"

namespace torchlift {

namespace control_flow_internal {

using Leaves = std::vector<at::Tensor>;
using Step = std::function<Leaves(const Leaves&)>;
using Test = std::function<at::Tensor(const Leaves&)>;

// cond and while_loop on leaves. The functions check what they return. `transform` is named in
// errors.
Leaves cond_leaves(const char* transform, const at::Tensor& pred, const Step& true_fn,
                   const Step& false_fn, const Leaves& operands);
Leaves while_leaves(const char* transform, const Test& test, const Step& body, Leaves carry);

// A scan on leaves: `step` takes what is carried and a slice of xs, and returns what is carried and
// results. Gives what is carried at the end, and the results of all steps, stacked. length: at
// least 1.
struct Scanned {
  Leaves carry;
  Leaves ys;
};
Scanned scan_leaves(const Step& step, Leaves carry, const Leaves& xs, int64_t length, bool reverse);

// The length of a scan.
int64_t scan_length(const Leaves& xs, const std::vector<std::string>& names,
                    std::optional<int64_t> length);
// Slices of a scan of length 0, to learn what f returns.
Leaves empty_slice(const Leaves& xs);
at::Tensor stacked_none(const at::Tensor& like);
// The bounds of a loop: integer tensors without dims.
void check_bound(const char* name, const at::Tensor& bound);

[[noreturn]] void throw_structure(const char* transform, const char* what,
                                  const std::string& mismatch);
void check_leaf(const char* transform, const char* what, const Path& path,
                const at::Tensor& expected, const at::Tensor& got);
[[noreturn]] void throw_constant(const char* transform, const char* what, const Path& path);

// Visitor of walk_trees: the leaves are alike, and other values the same.
struct AlikeCheck {
  const char* transform;
  const char* what;

  void operator()(const Path& path, const at::Tensor& expected, const at::Tensor& got) const {
    check_leaf(transform, what, path, expected, got);
  }
  template <class Constant>
  void operator()(const Path& path, const Constant& expected, const Constant& got) const {
    if constexpr (std::equality_comparable<Constant>) {
      if (!(expected == got)) throw_constant(transform, what, path);
    }
  }
};

template <class T>
void check_alike(const char* transform, const char* what, const T& expected, const T& got) {
  const std::string mismatch = structure_mismatch(expected, got);
  if (!mismatch.empty()) throw_structure(transform, what, mismatch);
  AlikeCheck check{transform, what};
  walk_trees(check, Path{}, expected, got);
}

template <class T>
std::vector<std::string> leaf_names(const T& tree) {
  std::vector<std::string> names;
  for_each_leaf(tree, [&](const at::Tensor&, const Path& path) { names.push_back(path.str()); });
  return names;
}

}  // namespace control_flow_internal

// true_fn(operands...) where pred is true, false_fn(operands...) where it is false.
template <class TrueFn, class FalseFn, class... Operands>
auto cond(const at::Tensor& pred, const TrueFn& true_fn, const FalseFn& false_fn,
          const Operands&... operands) {
  namespace cf = control_flow_internal;
  using Arguments = std::tuple<Operands...>;
  using Result = std::decay_t<std::invoke_result_t<const TrueFn&, const Operands&...>>;
  static_assert(
      std::is_same_v<Result,
                     std::decay_t<std::invoke_result_t<const FalseFn&, const Operands&...>>>,
      "torchlift::cond: both functions must return the same type.");
  const Arguments arguments(operands...);
  std::optional<Result> first;
  const auto run = [&](const auto& f) {
    return [&](const cf::Leaves& leaves) {
      Result result = std::apply(f, tree_unflatten(arguments, leaves));
      cf::Leaves flat = tree_flatten(result);
      if (first.has_value()) {
        cf::check_alike("cond", "false_fn returned, unlike true_fn,", *first, result);
      } else {
        first = std::move(result);
      }
      return flat;
    };
  };
  cf::Leaves leaves =
      cf::cond_leaves("cond", pred, run(true_fn), run(false_fn), tree_flatten(arguments));
  return tree_unflatten(*std::move(first), leaves);
}

// carry = body_fn(carry), from init, while cond_fn(carry).
template <class CondFn, class BodyFn, class T>
T while_loop(const CondFn& cond_fn, const BodyFn& body_fn, T init) {
  namespace cf = control_flow_internal;
  static_assert(std::is_same_v<T, std::decay_t<std::invoke_result_t<const BodyFn&, const T&>>>,
                "torchlift::while_loop: body_fn must return what it takes, of the type of init.");
  const auto test = [&](const cf::Leaves& leaves) -> at::Tensor {
    return cond_fn(tree_unflatten(init, leaves));
  };
  const auto body = [&](const cf::Leaves& leaves) {
    const T carry = tree_unflatten(init, leaves);
    const T next = body_fn(carry);
    cf::check_alike("while_loop", "body_fn returned", carry, next);
    return tree_flatten(next);
  };
  cf::Leaves leaves = cf::while_leaves("while_loop", test, body, tree_flatten(init));
  return tree_unflatten(std::move(init), leaves);
}

// carry = body_fn(i, carry), from init, for i = lower, lower + 1 ... upper - 1.
template <class BodyFn, class T>
T fori_loop(int64_t lower, int64_t upper, const BodyFn& body_fn, T init) {
  namespace cf = control_flow_internal;
  T carry = std::move(init);
  for (int64_t i = lower; i < upper; ++i) {
    T next = body_fn(i, std::as_const(carry));
    cf::check_alike("fori_loop", "body_fn returned", carry, next);
    carry = std::move(next);
  }
  return carry;
}

// The same with bounds that are integer tensors without dims, which may differ from example to
// example; so is i.
template <class BodyFn, class T>
T fori_loop(const at::Tensor& lower, const at::Tensor& upper, const BodyFn& body_fn, T init) {
  namespace cf = control_flow_internal;
  cf::check_bound("lower", lower);
  cf::check_bound("upper", upper);
  using State = std::pair<at::Tensor, T>;
  const auto test = [&](const cf::Leaves& leaves) { return leaves[0].lt(upper); };
  const auto body = [&](const cf::Leaves& leaves) {
    const State state = tree_unflatten(State(lower, init), leaves);
    State next(state.first.add(1), body_fn(state.first, state.second));
    cf::check_alike("fori_loop", "body_fn returned", state.second, next.second);
    return tree_flatten(next);
  };
  const State start(lower, std::move(init));
  cf::Leaves leaves = cf::while_leaves("fori_loop", test, body, tree_flatten(start));
  return tree_unflatten(start, leaves).second;
}

struct ScanOptions {
  // The number of steps; needed only when xs has no tensors.
  std::optional<int64_t> length = std::nullopt;
  // From the last slice of xs to the first; the results are in the order of xs all the same.
  bool reverse = false;
};

// f(carry, x) returns (carry, y), a pair or tuple of two. It runs for each slice x of xs along dim
// 0 (a tree; std::monostate{} with a length for none). Returns the last carry, and the ys, stacked
// along dim 0.
template <class F, class Carry, class Xs>
auto scan(const F& f, Carry init, const Xs& xs, ScanOptions options = {}) {
  namespace cf = control_flow_internal;
  using Stepped = std::decay_t<std::invoke_result_t<const F&, const Carry&, const Xs&>>;
  static_assert(
      std::tuple_size_v<Stepped> == 2 && std::is_same_v<std::tuple_element_t<0, Stepped>, Carry>,
      "torchlift::scan: f(carry, x) must return a pair of a carry, of the type of init, "
      "and a result.");
  using Y = std::tuple_element_t<1, Stepped>;
  const cf::Leaves all = tree_flatten(xs);
  const int64_t length = cf::scan_length(all, cf::leaf_names(xs), options.length);
  if (length == 0) {
    const c10::NoGradGuard no_grad;
    const Stepped step = f(std::as_const(init), tree_unflatten(xs, cf::empty_slice(all)));
    return std::pair<Carry, Y>(
        std::move(init),
        tree_map(std::get<1>(step), [](const at::Tensor& y) { return cf::stacked_none(y); }));
  }
  std::optional<Y> like;
  const cf::Leaves start = tree_flatten(init);
  const auto step = [&](const cf::Leaves& leaves) {
    const auto middle = leaves.begin() + static_cast<int64_t>(start.size());
    const Carry carry = tree_unflatten(init, cf::Leaves(leaves.begin(), middle));
    const Stepped next = f(carry, tree_unflatten(xs, cf::Leaves(middle, leaves.end())));
    cf::check_alike("scan", "f returned, as carry,", carry, std::get<0>(next));
    if (like.has_value()) {
      cf::check_alike("scan", "f returned, unlike before,", *like, std::get<1>(next));
    } else {
      like = std::get<1>(next);
    }
    cf::Leaves flat = tree_flatten(std::get<0>(next));
    const cf::Leaves y = tree_flatten(std::get<1>(next));
    flat.insert(flat.end(), y.begin(), y.end());
    return flat;
  };
  cf::Scanned scanned = cf::scan_leaves(step, start, all, length, options.reverse);
  return std::pair<Carry, Y>(tree_unflatten(std::move(init), scanned.carry),
                             tree_unflatten(*std::move(like), scanned.ys));
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_CONTROL_FLOW_H_
