#ifndef TORCHLIFT_AUTODIFF_COLORING_H_
#define TORCHLIFT_AUTODIFF_COLORING_H_

// File: autodiff/coloring.h
//
// Colourings of sparse Jacobians and Hessians: which products with them tell all of their nonzeros.
// Found once for a pattern, used for as many Jacobians as one likes:
//
//   const at::Tensor pattern = tl::sparsity(f)(x);              // autodiff/sparsity.h
//   const tl::Coloring c = tl::coloring(pattern);
//   c.colors();                                                 // 3, for a tridiagonal one
//   const auto jacobian = tl::sparse_jacobian(f, c);            // autodiff/sparse_jacobian.h
//
// How colours are found is in autodiff/graph_coloring.h.

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace torchlift {

enum class ColoringMode : uint8_t {
  kAuto,       // whichever of the next three needs the fewest products
  kForward,    // columns: Jacobian-vector products
  kReverse,    // rows: vector-Jacobian products
  kBoth,       // some rows and the columns of the rest, or the other way around
  kSymmetric,  // for a Hessian: Hessian-vector products, about half as many as its columns need
};

// "forward"
const char* name_of(ColoringMode mode);

struct Coloring {
  ColoringMode mode = ColoringMode::kForward;  // never kAuto
  int64_t rows = 0;
  int64_t columns = 0;
  // The pattern, as the index arrays of a CSR tensor: int64, on CPU, columns in their order.
  at::Tensor crow_indices;
  at::Tensor col_indices;
  // The colour of each column and each row; -1 where no product needs it.
  at::Tensor column_colors;
  at::Tensor row_colors;
  int64_t forward = 0;  // colours of columns
  int64_t reverse = 0;  // colours of rows
  // Where each nonzero is found in the products: see MatrixColoring.
  at::Tensor sources;

  // How many products it takes.
  int64_t colors() const { return forward + reverse; }
  int64_t nonzeros() const { return col_indices.size(0); }
};

// `pattern`: [values, inputs], a CSR or COO tensor whose elements are the nonzeros, whatever their
// values; or a strided one that is not zero where the Jacobian may not be. Throws TransformError if
// it is no matrix, or with kSymmetric if it is not symmetric.
Coloring coloring(const at::Tensor& pattern, ColoringMode mode = ColoringMode::kAuto);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_COLORING_H_
