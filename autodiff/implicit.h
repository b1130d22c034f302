#ifndef TORCHLIFT_AUTODIFF_IMPLICIT_H_
#define TORCHLIFT_AUTODIFF_IMPLICIT_H_

// File: autodiff/implicit.h
//
// custom_root and fixed_point: the derivative of a solution, and not of the way to it.
//
//   // The y with y^3 = a, by Newton's method.
//   at::Tensor cube_root(const at::Tensor& a) {
//     const auto f = [](const at::Tensor& y, const at::Tensor& a) { return y * y * y - a; };
//     return tl::custom_root(f, at::ones_like(a), newton, std::tuple(a));
//   }
//   at::Tensor g = tl::vmap(tl::grad(cube_root))(as);
//
// NOTE [implicit derivatives]
// y solves f(y, p) = 0. With J the derivative of f by y,
//
//   J y' = -f'(p) p'          a tangent: one linear system with J
//   J^T u = v, then -u f'(p)  a cotangent v: one with its transpose
//
// and both need only products with J, which are a jvp or vjp of f at y. So how a root is found is
// not differentiated, and may be anything. The rule (a custom_vjp, autodiff/custom_rules.h) is
// differentiated in its turn: y is a root again there, and the solution of the linear system is a
// function with a rule of its own, whose transpose solves the transposed system.
//
// f, solve and tangent_solve may run again, later and on other threads: they hold what they need by
// value, and solve finds the root by g alone.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/linear_solvers.h"
#include "core/tree.h"

namespace torchlift {

// The linear solver of custom_root and fixed_point, if none is given.
struct GmresSolver {
  GmresOptions options = {};

  template <class Product, class T>
  T operator()(const Product& product, const T& b) const {
    return gmres(product, b, options);
  }
};

// Where J is symmetric and positive definite: that of a minimum.
struct CgSolver {
  CgOptions options = {};

  template <class Product, class T>
  T operator()(const Product& product, const T& b) const {
    return cg(product, b, options);
  }
};

struct FixedPointOptions {
  // Stops when a step is below tol * (1 + norm of y); eps^0.75 of the dtype if left out.
  std::optional<double> tol = std::nullopt;
  // When it gives up. What has not converged is NaN.
  int64_t max_steps = 10'000;
};

namespace implicit_internal {

using linear_solvers_internal::Leaves;
using linear_solvers_internal::Map;

// f(y, params) = 0, on the tensors of its trees.
struct Problem {
  const char* transform = "";
  std::function<Leaves(const Leaves& y, const Leaves& params)> f = nullptr;
  // A root, from a start.
  std::function<Leaves(const Leaves& initial, const Leaves& params)> solve = nullptr;
  std::function<Leaves(const Map& product, const Leaves& b)> tangent_solve = nullptr;
};

Leaves root(std::shared_ptr<const Problem> problem, const Leaves& initial, const Leaves& params);

// y = g(y) again and again.
Leaves iterate(const Map& g, const Leaves& start, const FixedPointOptions& options);

Leaves minus(const Leaves& a, const Leaves& b);

[[noreturn]] void throw_structure(const char* transform, const char* who,
                                  const std::string& mismatch);

// The functions of a problem, which take and return trees.
template <class F, class Y, class Params, class TangentSolve>
class Trees {
 public:
  Trees(const char* transform, F f, const Y& initial, const Params& params,
        TangentSolve tangent_solve)
      : transform_(transform),
        f_(std::move(f)),
        tangent_solve_(std::move(tangent_solve)),
        y_(without_tensors(initial)),
        params_(without_tensors(params)) {}

  Leaves f(const Leaves& y, const Leaves& params) const {
    const Params trees = tree_unflatten(params_, params);
    const auto of_params = [&](const auto&... each) -> Y {
      return f_(tree_unflatten(y_, y), each...);
    };
    return leaves_of("f", std::apply(of_params, trees));
  }

  Leaves tangent_solve(const Map& product, const Leaves& b) const {
    const std::function<Y(const Y&)> on_trees = [&](const Y& x) {
      return tree_unflatten(y_, product(tree_flatten(x)));
    };
    return leaves_of("tangent_solve", tangent_solve_(on_trees, tree_unflatten(y_, b)));
  }

  Y tree(const Leaves& y) const { return tree_unflatten(y_, y); }

  Leaves leaves_of(const char* who, const Y& result) const {
    const std::string mismatch = structure_mismatch(y_, result);
    if (!mismatch.empty()) throw_structure(transform_, who, mismatch);
    return tree_flatten(result);
  }

 private:
  template <class T>
  static T without_tensors(T tree) {
    return tree_map(std::move(tree), [](const at::Tensor&) { return at::Tensor(); });
  }

  const char* transform_;
  const F f_;
  const TangentSolve tangent_solve_;
  const Y y_;
  const Params params_;
};

}  // namespace implicit_internal

// The root y of f(y, params...) = 0 that `solve` finds, with the derivatives of a root: in forward
// and reverse mode, any number of times, under vmap.
//
//   f              differentiable; a tree of real tensors y (and the params) -> a tree like y. It
//                  closes over nothing that is differentiated.
//   initial        where solve starts. The root does not depend on it.
//   solve          solve(g, initial) -> a root of g, where g(y) = f(y, params...), a
//                  std::function<Y(const Y&)>
//   params         a tuple of trees, whose tensors the root is a function of
//   tangent_solve  tangent_solve(product, b) -> the x with product(x) = b, where product is linear
//                  in a tree like y: the derivative of f by y at the root, or its transpose
//
// Throws TransformError if f or solve return another structure or shape than initial has, or if f
// closes over a tensor that is differentiated.
template <class F, class Y, class Solve, class... Params, class TangentSolve = GmresSolver>
Y custom_root(F f, const Y& initial, Solve solve, const std::tuple<Params...>& params,
              TangentSolve tangent_solve = {}) {
  namespace internal = implicit_internal;
  using Trees = internal::Trees<F, Y, std::tuple<Params...>, TangentSolve>;
  static_assert(std::is_invocable_v<const F&, const Y&, const Params&...>,
                "torchlift::custom_root: f is called as f(y, params...), with a y like initial.");
  const auto trees = std::make_shared<const Trees>("custom_root", std::move(f), initial, params,
                                                   std::move(tangent_solve));
  auto problem = std::make_shared<internal::Problem>();
  using internal::Leaves;
  problem->transform = "custom_root";
  problem->f = [trees](const Leaves& y, const Leaves& p) { return trees->f(y, p); };
  problem->solve = [trees, solve = std::move(solve)](const Leaves& start, const Leaves& p) {
    const std::function<Y(const Y&)> g = [&](const Y& y) {
      return trees->tree(trees->f(tree_flatten(y), p));
    };
    return trees->leaves_of("solve", solve(g, trees->tree(start)));
  };
  problem->tangent_solve = [trees](const internal::Map& product, const Leaves& b) {
    return trees->tangent_solve(product, b);
  };
  return tree_unflatten(
      initial, internal::root(std::move(problem), tree_flatten(initial), tree_flatten(params)));
}

// The y with y = f(y, params...), by repeated application, which needs a contraction; with the
// derivatives of a fixed point: see custom_root. (With another way to find it, y - f(y, params...)
// has the root.)
//
//   const auto f = [](const at::Tensor& y, const at::Tensor& a) { return (a * y).cos(); };
//   at::Tensor y = tl::fixed_point(f, at::full({}, 0.5), std::tuple(a));
template <class F, class Y, class... Params, class TangentSolve = GmresSolver>
Y fixed_point(F f, const Y& initial, const std::tuple<Params...>& params,
              FixedPointOptions options = {}, TangentSolve tangent_solve = {}) {
  namespace internal = implicit_internal;
  using Trees = internal::Trees<F, Y, std::tuple<Params...>, TangentSolve>;
  static_assert(std::is_invocable_v<const F&, const Y&, const Params&...>,
                "torchlift::fixed_point: f is called as f(y, params...), with a y like initial.");
  const auto trees = std::make_shared<const Trees>("fixed_point", std::move(f), initial, params,
                                                   std::move(tangent_solve));
  auto problem = std::make_shared<internal::Problem>();
  using internal::Leaves;
  problem->transform = "fixed_point";
  problem->f = [trees](const Leaves& y, const Leaves& p) {
    return internal::minus(y, trees->f(y, p));
  };
  problem->solve = [trees, options](const Leaves& start, const Leaves& p) {
    return internal::iterate([&](const Leaves& y) { return trees->f(y, p); }, start, options);
  };
  problem->tangent_solve = [trees](const internal::Map& product, const Leaves& b) {
    return trees->tangent_solve(product, b);
  };
  return tree_unflatten(
      initial, internal::root(std::move(problem), tree_flatten(initial), tree_flatten(params)));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_IMPLICIT_H_
