#ifndef TORCHLIFT_AUTODIFF_CURVATURE_BLOCKS_H_
#define TORCHLIFT_AUTODIFF_CURVATURE_BLOCKS_H_

// File: autodiff/curvature_blocks.h
//
// Second derivatives without a Hessian, of functions of flat lists of tensors: below the typed API
// (autodiff/curvature.h) and the Python one.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "autodiff/jacobian_blocks.h"
#include "batching/chunk_plan.h"

namespace torchlift {

struct Products {
  std::vector<at::Tensor> products;  // one for each input, of its shape
  std::vector<at::Tensor> outputs;   // of f, as the caller may see them
};

// H v, for the Hessian H of f's one value (shape []), by forward over reverse mode.
Products hessian_vector_product(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                const std::vector<at::Tensor>& tangents);

// v^T H, by reverse over reverse mode. Equal to H v; for functions without forward mode.
Products vector_hessian_product(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                const std::vector<at::Tensor>& cotangents);

// J^T H_loss J v, with J the Jacobian of f and H_loss the Hessian of `loss` at f's values (N.
// Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002).
Products gauss_newton_product(LeafFunction f, LeafFunction loss,
                              const std::vector<at::Tensor>& inputs,
                              const std::vector<at::Tensor>& tangents);

struct Laplacian {
  std::vector<at::Tensor> sums;     // one for each value, of its shape
  std::vector<at::Tensor> outputs;  // of f
};

// The sum of the second derivatives of f along every input number, in chunks, or along the
// directions given ([directions, ...the input's shape] for each input). By taylor_laplacian; where
// that throws UnsupportedError, f is called anew by nested_laplacian.
Laplacian laplacian_of(LeafFunction f, const std::vector<at::Tensor>& inputs,
                       const ChunkOptions& chunks,
                       const std::optional<std::vector<at::Tensor>>& directions = std::nullopt);

// Its parts: by series whose second terms are summed as they are made (autodiff/jet_scope.h), which
// autograd Functions and custom_jvp do not have; and by second_derivatives.
Laplacian taylor_laplacian(LeafFunction f, const std::vector<at::Tensor>& inputs,
                           const ChunkOptions& chunks,
                           const std::optional<std::vector<at::Tensor>>& directions);
Laplacian nested_laplacian(LeafFunction f, const std::vector<at::Tensor>& inputs,
                           const ChunkOptions& chunks,
                           const std::optional<std::vector<at::Tensor>>& directions);

struct SecondDerivatives {
  // rows[i]: d^2/ds^2 of value i along each direction, [directions, ...its shape].
  std::vector<at::Tensor> rows;
  std::vector<at::Tensor> outputs;
};

// The second derivatives of f along every input number (all of them laid end to end), by forward
// over forward mode. f runs once for each chunk of directions, here and in laplacian_of. transform:
// the name in error messages.
SecondDerivatives second_derivatives(const char* transform, LeafFunction f,
                                     const std::vector<at::Tensor>& inputs,
                                     const ChunkOptions& chunks);

// ... along the directions given, [directions, ...the input's shape] for each input.
SecondDerivatives second_derivatives_along(const char* transform, LeafFunction f,
                                           const std::vector<at::Tensor>& inputs,
                                           const std::vector<at::Tensor>& directions);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_CURVATURE_BLOCKS_H_
