#ifndef TORCHLIFT_AUTODIFF_SPARSE_VALUES_H_
#define TORCHLIFT_AUTODIFF_SPARSE_VALUES_H_

// File: autodiff/sparse_values.h
//
// The nonzeros of sparse Jacobians and Hessians of functions of flat lists of tensors, below the
// typed API (autodiff/sparse_jacobian.h) and the Python one.

#include <ATen/core/Tensor.h>

#include <vector>

#include "autodiff/coloring.h"
#include "autodiff/jacobian_blocks.h"
#include "batching/chunk_plan.h"

namespace torchlift {

struct SparseValues {
  // The nonzeros, in the order of the colouring's pattern: [nonzeros].
  at::Tensor values;
  // All outputs of f, as the caller may see them.
  std::vector<at::Tensor> outputs;
};

// One pass of f for each direction of the colouring, with as many products at once as the chunks
// allow. Throws TransformError if the colouring is of another shape.
SparseValues sparse_jacobian_values(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                    const Coloring& coloring, const ChunkOptions& chunks);

// The same of the gradients of f's one value, forward over reverse. Any colouring will do; a
// symmetric one needs the fewest products.
SparseValues sparse_hessian_values(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                   const Coloring& coloring, const ChunkOptions& chunks);

enum class SparseLayout : uint8_t {
  kCsr,
  kCoo,
  kValues,  // the nonzeros alone, a strided tensor
};

// The values in the places of the colouring's pattern. Throws UnsupportedError if a transform is at
// work on them and the layout is a sparse one, which no level can batch.
at::Tensor in_layout(const char* transform, const at::Tensor& values, const Coloring& coloring,
                     SparseLayout layout);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SPARSE_VALUES_H_
