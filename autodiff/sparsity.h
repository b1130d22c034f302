#ifndef TORCHLIFT_AUTODIFF_SPARSITY_H_
#define TORCHLIFT_AUTODIFF_SPARSITY_H_

// File: autodiff/sparsity.h
//
// Which elements of a Jacobian, or a Hessian, can be other than zero.
//
//   at::Tensor f(const at::Tensor& x);                    // [n] -> [m]
//   at::Tensor pattern = tl::sparsity(f)(x);              // [m, n]: a bool CSR tensor
//   at::Tensor curved = tl::hessian_sparsity(energy)(x);  // [n, n]
//
// The pattern is propagated through f's operators, not probed at x: it holds for every x of that
// shape, and for the same constants (what f closes over). NOTE [dependence] in
// autodiff/dependence.h says how. Tensors of other shapes are laid end to end, row by row. An
// operator that is in no table is taken for dense: dense_operators() tells which were, in the last
// call on this thread.
//
// Throws TransformError if x or f(x) is not of a real floating dtype; UnsupportedError if f looks
// at values that depend on x (x.item(), a shape).

#include <ATen/core/Tensor.h>

#include <type_traits>
#include <utility>
#include <vector>

#include "autodiff/sparsity_pattern.h"

namespace torchlift {

namespace autodiff_internal {

// A function of one tensor that returns one, as one of leaves.
template <class F>
auto on_leaves(const F& f) {
  static_assert(std::is_invocable_r_v<at::Tensor, const F&, const at::Tensor&>,
                "torchlift: a sparse Jacobian is one of a function of one at::Tensor that returns "
                "one.");
  return [&f](const std::vector<at::Tensor>& leaves) { return LeafOutputs{{f(leaves[0])}, 1}; };
}

}  // namespace autodiff_internal

template <class F>
auto sparsity(F f, PatternOptions options = {}) {
  return [f = std::move(f), options](const at::Tensor& x) {
    return jacobian_pattern(autodiff_internal::on_leaves(f), {x}, options);
  };
}

// Of the Hessian of a function that returns one number: symmetric.
template <class F>
auto hessian_sparsity(F f, PatternOptions options = {}) {
  return [f = std::move(f), options](const at::Tensor& x) {
    return hessian_pattern(autodiff_internal::on_leaves(f), {x}, options);
  };
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SPARSITY_H_
