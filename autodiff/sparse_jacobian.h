#ifndef TORCHLIFT_AUTODIFF_SPARSE_JACOBIAN_H_
#define TORCHLIFT_AUTODIFF_SPARSE_JACOBIAN_H_

// File: autodiff/sparse_jacobian.h
//
// Jacobians and Hessians that are mostly zero, by as many products as a colouring has colours:
//
//   const auto c = tl::coloring(tl::sparsity(f)(x));                        // once
//   at::Tensor j = tl::sparse_jacobian(f, c)(x);                            // CSR, [m, n]
//   at::Tensor v = tl::sparse_jacobian(f, c, {.layout = tl::SparseLayout::kValues})(x);
//
//   const auto s = tl::coloring(tl::hessian_sparsity(energy)(x), tl::ColoringMode::kSymmetric);
//   at::Tensor h = tl::sparse_hessian(energy, s)(x);                        // CSR, [n, n]
//
// The nonzeros can be differentiated, and with kValues, the nonzeros alone in the order of
// c.col_indices, they can be batched (vmap) too.
//
// A nonzero that the pattern lacks would be added to another one: use the pattern of this very
// function. Throws TransformError if the colouring is of another shape.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <utility>

#include "autodiff/coloring.h"
#include "autodiff/sparse_values.h"
#include "autodiff/sparsity.h"

namespace torchlift {

struct SparseJacobianOptions {
  SparseLayout layout = SparseLayout::kCsr;
  // Products at a time. All of them by default.
  std::optional<int64_t> chunk_size = std::nullopt;
  // Instead: how many bytes a chunk of them may take (batching/chunk_plan.h).
  std::optional<int64_t> memory_budget = std::nullopt;
};

template <class F>
auto sparse_jacobian(F f, Coloring coloring, SparseJacobianOptions options = {}) {
  return [f = std::move(f), coloring = std::move(coloring), options](const at::Tensor& x) {
    const SparseValues result =
        sparse_jacobian_values(autodiff_internal::on_leaves(f), {x}, coloring,
                               {options.chunk_size, options.memory_budget});
    return in_layout("sparse_jacobian", result.values, coloring, options.layout);
  };
}

// Of a function that returns one number: forward over reverse mode.
template <class F>
auto sparse_hessian(F f, Coloring coloring, SparseJacobianOptions options = {}) {
  return [f = std::move(f), coloring = std::move(coloring), options](const at::Tensor& x) {
    const SparseValues result =
        sparse_hessian_values(autodiff_internal::on_leaves(f), {x}, coloring,
                              {options.chunk_size, options.memory_budget});
    return in_layout("sparse_hessian", result.values, coloring, options.layout);
  };
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SPARSE_JACOBIAN_H_
