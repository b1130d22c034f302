#ifndef TORCHLIFT_AUTODIFF_CURVATURE_H_
#define TORCHLIFT_AUTODIFF_CURVATURE_H_

// File: autodiff/curvature.h
//
// Second derivatives without a Hessian: hvp, vhp, ggn_vp, laplacian, hessian_diag. And linearize.
//
//   at::Tensor energy(const at::Tensor& x);                          // -> []
//
//   auto [e, hv] = tl::hvp(energy, x, v);                            // H v: forward over reverse
//   auto [e, vh] = tl::vhp(energy, x, v);                            // v^T H: reverse over reverse
//   auto [y, gv] = tl::ggn_vp(model, loss, params, v);               // J^T H_loss J v
//   at::Tensor lap = tl::laplacian(f)(x);                            // sum of d^2 f / dx_i^2
//   at::Tensor est = tl::laplacian(f, {.samples = 16})(x);           // Hutchinson's estimate of it
//   at::Tensor diag = tl::hessian_diag(energy)(x);                   // x's shape
//   auto [y, push] = tl::linearize(f, x);                            // push(t) is the tangent of y
//
// Primals are a tree, or a std::tuple of trees for a function of several arguments; v has the same
// type, and so has a product. hvp and vhp need a function that returns one real number; the others
// take any tensor. laplacian and hessian_diag are exact, and no Hessian is made: f runs once for
// all directions ({.chunk_size = n}: once for n of them; {.memory_budget = bytes}: for as many as
// fit), hessian_diag by forward over forward mode, laplacian as the "forward Laplacian": with D
// directions, f's value, D first derivatives, and one sum of second derivatives
// (autodiff/jet_series.h). The estimate is the mean of v^T H v over random signs v (M. Hutchinson,
// "A stochastic estimator of the trace of the influence matrix for Laplacian smoothing splines",
// 1990).
//
// Throws TransformError for primals that have no derivative, a v that does not fit them, and values
// of the wrong shape or dtype.

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros_like_ops.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/curvature_blocks.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/primals.h"
#include "autodiff/vjp.h"
#include "core/tree.h"

namespace torchlift {

struct LaplacianOptions {
  // Directions at a time. All of them by default.
  std::optional<int64_t> chunk_size = std::nullopt;
  // Instead: how many bytes a chunk of them may take (batching/chunk_plan.h).
  std::optional<int64_t> memory_budget = std::nullopt;
  // Estimate from so many random directions. Exact by default.
  std::optional<int64_t> samples = std::nullopt;
};

namespace autodiff_internal {

// The leaves of trees of arguments, of which all are differentiated.
template <class Arguments>
std::vector<at::Tensor> defined_leaves(const Arguments& arguments) {
  std::vector<at::Tensor> leaves;
  for_each_leaf(arguments, [&](const at::Tensor& leaf) {
    if (leaf.defined()) leaves.push_back(leaf);
  });
  return leaves;
}

// The tangents of the defined leaves of `primals`.
template <class Arguments>
std::vector<at::Tensor> tangents_of(const Arguments& primals, const Arguments& tangents) {
  std::vector<at::Tensor> leaves;
  const auto collect = [&](const Path&, const auto& primal, const auto& tangent) {
    if constexpr (std::is_same_v<std::decay_t<decltype(primal)>, at::Tensor>) {
      if (primal.defined()) leaves.push_back(tangent);
    }
  };
  walk_trees(collect, Path{}, primals, tangents);
  return leaves;
}

template <class Arguments>
Arguments with_leaves(Arguments arguments, std::vector<at::Tensor> leaves) {
  GradientPlacer place{leaves};
  walk_trees(place, Path{}, arguments);
  return arguments;
}

// The tree that was given for arguments: itself, or the tuple.
template <class Given, class Arguments>
auto as_given(Arguments arguments) {
  if constexpr (IsTuple<Given>::value) {
    return arguments;
  } else {
    return std::get<0>(std::move(arguments));
  }
}

// f as a function of leaves; the first result is kept.
template <class F, class Arguments>
class LeafCall {
 public:
  using Output = decltype(std::apply(std::declval<const F&>(), std::declval<const Arguments&>()));

  LeafCall(const F& f, const Arguments& arguments) : f_(f), arguments_(arguments) {}

  LeafOutputs operator()(const std::vector<at::Tensor>& leaves) {
    const Arguments replaced = with_leaves(arguments_, leaves);
    Output result = std::apply(f_, replaced);
    LeafOutputs out{tree_flatten(result), 0};
    out.values = out.leaves.size();
    if (!output_.has_value()) output_ = std::move(result);
    return out;
  }

  Output output(const std::vector<at::Tensor>& leaves) {
    return tree_unflatten(*std::move(output_), leaves);
  }

 private:
  const F& f_;
  const Arguments& arguments_;
  std::optional<Output> output_;
};

template <class Arguments>
void check_arguments(const char* transform, const Arguments& primals, const Arguments& tangents) {
  check_tangents(transform, primals, tangents,
                 std::make_index_sequence<std::tuple_size_v<Arguments>>());
}

// Random signs, [samples, ...shape], for each input.
std::vector<at::Tensor> random_signs(const std::vector<at::Tensor>& inputs, int64_t samples);
// Each sum over samples as their mean.
std::vector<at::Tensor> means(const std::vector<at::Tensor>& sums, int64_t samples);
// [directions, ...] -> for each input [..., ...its shape].
std::vector<at::Tensor> split_diagonal(const at::Tensor& rows,
                                       const std::vector<at::Tensor>& inputs);

}  // namespace autodiff_internal

// {value, H v} of a function that returns one number.
template <class F, class Primals>
auto hvp(const F& f, const Primals& primals, const Primals& v) {
  namespace internal = autodiff_internal;
  const auto arguments = internal::as_arguments(primals);
  const auto tangents = internal::as_arguments(v);
  internal::check_arguments("hvp", arguments, tangents);
  internal::LeafCall call(f, arguments);
  Products result = hessian_vector_product(call, internal::defined_leaves(arguments),
                                           internal::tangents_of(arguments, tangents));
  auto product = internal::with_leaves(arguments, std::move(result.products));
  return std::pair(call.output(result.outputs), internal::as_given<Primals>(std::move(product)));
}

// {value, v^T H} of a function that returns one number.
template <class F, class Primals>
auto vhp(const F& f, const Primals& primals, const Primals& v) {
  namespace internal = autodiff_internal;
  const auto arguments = internal::as_arguments(primals);
  const auto cotangents = internal::as_arguments(v);
  internal::check_arguments("vhp", arguments, cotangents);
  internal::LeafCall call(f, arguments);
  Products result = vector_hessian_product(call, internal::defined_leaves(arguments),
                                           internal::tangents_of(arguments, cotangents));
  auto product = internal::with_leaves(arguments, std::move(result.products));
  return std::pair(call.output(result.outputs), internal::as_given<Primals>(std::move(product)));
}

// {f's value, J^T H_loss J v}: the generalised Gauss-Newton product. loss takes f's value.
template <class F, class Loss, class Primals>
auto ggn_vp(const F& f, const Loss& loss, const Primals& primals, const Primals& v) {
  namespace internal = autodiff_internal;
  const auto arguments = internal::as_arguments(primals);
  const auto tangents = internal::as_arguments(v);
  internal::check_arguments("ggn_vp", arguments, tangents);
  internal::LeafCall call(f, arguments);
  using Output = typename decltype(call)::Output;
  std::optional<Output> like;
  const auto keep = [&](const std::vector<at::Tensor>& leaves) {
    LeafOutputs out = call(leaves);
    like = call.output(out.leaves);
    return out;
  };
  const auto loss_of = [&](const std::vector<at::Tensor>& leaves) {
    const Output at_leaves = tree_unflatten(*like, leaves);
    return LeafOutputs{{loss(at_leaves)}, 1};
  };
  Products result = gauss_newton_product(keep, loss_of, internal::defined_leaves(arguments),
                                         internal::tangents_of(arguments, tangents));
  auto product = internal::with_leaves(arguments, std::move(result.products));
  return std::pair(tree_unflatten(*std::move(like), result.outputs),
                   internal::as_given<Primals>(std::move(product)));
}

// What laplacian returns.
template <class F>
class LaplacianFunction {
 public:
  LaplacianFunction(F f, LaplacianOptions options) : f_(std::move(f)), options_(options) {}

  template <class... Args>
  auto operator()(const Args&... args) const {
    namespace internal = autodiff_internal;
    const std::tuple<std::decay_t<const Args&>...> arguments(args...);
    internal::check_arguments("laplacian", arguments, arguments);
    internal::LeafCall call(f_, arguments);
    const std::vector<at::Tensor> inputs = internal::defined_leaves(arguments);
    std::optional<std::vector<at::Tensor>> signs;
    if (options_.samples.has_value()) signs = internal::random_signs(inputs, *options_.samples);
    const ChunkOptions chunks{options_.chunk_size, options_.memory_budget};
    const std::vector<at::Tensor> sums = laplacian_of(call, inputs, chunks, signs).sums;
    return call.output(options_.samples.has_value() ? internal::means(sums, *options_.samples)
                                                    : sums);
  }

 private:
  F f_;
  LaplacianOptions options_;
};

// The sum of all second derivatives d^2 f / dx_i^2 of each number that f returns, by all of f's
// arguments: a tree of the type and shapes of f's result.
template <class F>
auto laplacian(F&& f, LaplacianOptions options = {}) {
  return LaplacianFunction<std::decay_t<F>>(std::forward<F>(f), options);
}

// What hessian_diag returns.
template <class F>
class HessianDiagFunction {
 public:
  HessianDiagFunction(F f, JacobianOptions options) : f_(std::move(f)), options_(options) {}

  template <class Arg>
  auto operator()(const Arg& arg) const {
    namespace internal = autodiff_internal;
    const std::tuple<Arg> arguments(arg);
    internal::check_arguments("hessian_diag", arguments, arguments);
    internal::LeafCall call(f_, arguments);
    const std::vector<at::Tensor> inputs = internal::defined_leaves(arguments);
    const SecondDerivatives second = second_derivatives(
        "hessian_diag", call, inputs, ChunkOptions{options_.chunk_size, options_.memory_budget});
    const auto value = call.output(second.outputs);
    size_t row = 0;
    const auto next = [&] {
      return std::get<0>(
          internal::with_leaves(arguments, internal::split_diagonal(second.rows[row++], inputs)));
    };
    return internal::make_jacobian(value, next);
  }

 private:
  F f_;
  JacobianOptions options_;
};

// The diagonal of the Hessian of each number that f returns, by f's one argument: with the
// structure of jacrev(f)(x), each tensor of the value's shape followed by the argument's.
template <class F>
auto hessian_diag(F&& f, JacobianOptions options = {}) {
  return HessianDiagFunction<std::decay_t<F>>(std::forward<F>(f), options);
}

namespace autodiff_internal {

// What linearize returns: the transpose of a pullback.
template <class Primals, class Pull>
class Linearized {
 public:
  Linearized(Primals primals, Pull push) : primals_(std::move(primals)), push_(std::move(push)) {}

  auto operator()(const Primals& tangents) const {
    const auto arguments = as_arguments(primals_);
    check_arguments("linearize", arguments, as_arguments(tangents));
    // A missing tangent is zero, which the pullback knows too.
    return push_(as_arguments(tangents));
  }

 private:
  Primals primals_;
  Pull push_;
};

}  // namespace autodiff_internal

// {value, push}: push(tangents) is the tangent of the value, as jvp returns it, without running f
// again. It is the transpose of the pullback, so f needs derivatives in reverse mode, twice.
template <class F, class Primals>
auto linearize(const F& f, const Primals& primals) {
  namespace internal = autodiff_internal;
  const auto arguments = internal::as_arguments(primals);
  const auto run = [&f](const auto& all) { return std::apply(f, all); };
  auto [value, pullback] = vjp(run, arguments);
  auto zeros = tree_map(value, [](const at::Tensor& t) {
    return at::_ops::zeros_like::call(t, /*dtype=*/{}, /*layout=*/{}, /*device=*/{},
                                      /*pin_memory=*/{}, /*memory_format=*/{});
  });
  const auto pull = [pullback = std::move(pullback)](const auto& cotangent) {
    return pullback(cotangent);
  };
  auto transposed = vjp(pull, zeros);
  using Pull = std::decay_t<decltype(transposed.second)>;
  return std::pair(std::move(value),
                   internal::Linearized<Primals, Pull>(primals, std::move(transposed.second)));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CURVATURE_H_
