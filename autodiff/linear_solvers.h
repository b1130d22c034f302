#ifndef TORCHLIFT_AUTODIFF_LINEAR_SOLVERS_H_
#define TORCHLIFT_AUTODIFF_LINEAR_SOLVERS_H_

// File: autodiff/linear_solvers.h
//
// Linear solvers that see a matrix by its products with vectors only: gmres for any regular matrix,
// cg for a symmetric positive definite one.
//
//   // (H + 0.1 I) x = g, without H
//   at::Tensor x = tl::cg([&](const at::Tensor& v) { return hessian_product(v) + 0.1 * v; }, g);
//
// Vectors are trees (core/tree.h) of real tensors; the product takes one and returns one like it.
// The solvers are made of operators and while_loop: under vmap each example has its own system, and
// stops when it is solved. What is not solved in the given number of steps is NaN, which is better
// than a number that is no solution.
//
// To differentiate a solution, use custom_root (autodiff/implicit.h), which solves another system
// instead of differentiating the steps.
//
// Throws TransformError if an unknown is no real floating-point tensor, or if a product does not
// have the structure and the shapes of b.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "core/tree.h"

namespace torchlift {

struct GmresOptions {
  // How small the residual must get, relative to b; eps^0.75 of the dtype if left out.
  std::optional<double> tol = std::nullopt;
  // Products before it starts again from where it is; it keeps as many vectors.
  int64_t restart = 20;
  int64_t max_restarts = 50;
};

struct CgOptions {
  std::optional<double> tol = std::nullopt;  // as above
  // 10 for each unknown, if left out.
  std::optional<int64_t> max_steps = std::nullopt;
};

namespace linear_solvers_internal {

using Leaves = std::vector<at::Tensor>;
using Map = std::function<Leaves(const Leaves&)>;

// Lists of tensors like these, as vectors of one dimension.
class Vectors {
 public:
  Vectors(const char* transform, const Leaves& like);

  at::Tensor join(const Leaves& parts) const;
  Leaves split(const at::Tensor& vector) const;

  int64_t size() const { return size_; }
  at::ScalarType dtype() const { return dtype_; }
  // Throws unless the parts have the shapes of `like`. who: "the product".
  void check(const char* who, const Leaves& parts) const;

 private:
  const char* transform_;
  Leaves like_;
  std::vector<int64_t> sizes_;
  int64_t size_ = 0;
  at::ScalarType dtype_ = at::kFloat;
};

double default_tolerance(at::ScalarType dtype);

// x where it is a solution, NaN where it is not.
at::Tensor known(const at::Tensor& converged, const at::Tensor& x);

Leaves gmres(const Map& product, const Leaves& b, const GmresOptions& options);
Leaves cg(const Map& product, const Leaves& b, const CgOptions& options);

[[noreturn]] void throw_structure(const char* transform, const std::string& mismatch);

// The product on lists of tensors.
template <class Product, class T>
Map on_leaves(const char* transform, const Product& product, const T& like) {
  return [&product, &like, transform](const Leaves& vector) {
    const T result = product(tree_unflatten(like, vector));
    const std::string mismatch = structure_mismatch(like, result);
    if (!mismatch.empty()) throw_structure(transform, mismatch);
    return tree_flatten(result);
  };
}

}  // namespace linear_solvers_internal

// The x with product(x) = b, for any regular matrix. Saad, Schultz: "GMRES: a generalized minimal
// residual algorithm for solving nonsymmetric linear systems" (1986).
template <class Product, class T>
T gmres(const Product& product, const T& b, GmresOptions options = {}) {
  namespace internal = linear_solvers_internal;
  return tree_unflatten(
      b, internal::gmres(internal::on_leaves("gmres", product, b), tree_flatten(b), options));
}

// The x with product(x) = b, for a symmetric positive definite matrix. Hestenes, Stiefel: "Methods
// of conjugate gradients for solving linear systems" (1952).
template <class Product, class T>
T cg(const Product& product, const T& b, CgOptions options = {}) {
  namespace internal = linear_solvers_internal;
  return tree_unflatten(
      b, internal::cg(internal::on_leaves("cg", product, b), tree_flatten(b), options));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_LINEAR_SOLVERS_H_
