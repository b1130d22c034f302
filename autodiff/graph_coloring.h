#ifndef TORCHLIFT_AUTODIFF_GRAPH_COLORING_H_
#define TORCHLIFT_AUTODIFF_GRAPH_COLORING_H_

// File: autodiff/graph_coloring.h
//
// Colourings of sparse matrices, on the index arrays of their CSR form. Columns of one colour are
// computed in one product with the matrix, rows in one from the left; the colouring is such that
// every nonzero can be read off a product. See A. Gebremedhin, F. Manne, A. Pothen, "What color is
// your Jacobian? Graph coloring for computing derivatives", SIAM Review 47 (2005), whose terms are
// used here.
//
//   const SparsePattern tridiagonal{.rows = n, .columns = n, .starts = ..., .places = ...};
//   MatrixColoring c = color_columns(tridiagonal);       // c.column_colors: 0 1 2 0 1 2 ...
//
// All orders that greedy colouring may take are tried until one needs as few colours as any must:
// as they come, most neighbours first, and fewest neighbours last.

#include <cstdint>
#include <span>
#include <vector>

namespace torchlift {

// CSR. The columns of a row need no order, and come once.
struct SparsePattern {
  int64_t rows = 0;
  int64_t columns = 0;
  std::span<const int64_t> starts;  // rows + 1
  std::span<const int64_t> places;  // the columns of all nonzeros

  std::span<const int64_t> row(int64_t i) const {
    return places.subspan(starts[i], starts[i + 1] - starts[i]);
  }
};

inline constexpr int64_t kNoColor = -1;

struct MatrixColoring {
  // kNoColor where no product needs the column (row).
  std::vector<int64_t> column_colors;
  std::vector<int64_t> row_colors;
  int64_t forward = 0;  // how many colours columns have: products J s
  int64_t reverse = 0;  // ... and rows: products s^T J
  // Where each nonzero, in the order of the pattern, is found in the products: first come those
  // of the columns, [forward, rows], then those of the rows, [reverse, columns], both flat.
  std::vector<int64_t> sources;
};

// No two columns of a colour have a nonzero in one row (a distance-2 colouring).
MatrixColoring color_columns(const SparsePattern& pattern);
// No two rows of a colour have a nonzero in one column.
MatrixColoring color_rows(const SparsePattern& pattern);
// Some rows, the densest, by products from the left, and all others by columns; or the same of the
// transpose: whichever needs the fewest products (a bidirectional colouring).
MatrixColoring color_both(const SparsePattern& pattern);
// Of a symmetric pattern: neighbours differ, and every path of four vertices has three colours (a
// star colouring). A nonzero is found at its own place or at its mirror image's.
MatrixColoring color_symmetric(const SparsePattern& pattern);

// Whether a pattern is that of a symmetric matrix.
bool is_symmetric(const SparsePattern& pattern);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_GRAPH_COLORING_H_
