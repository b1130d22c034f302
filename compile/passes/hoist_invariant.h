#ifndef TORCHLIFT_COMPILE_PASSES_HOIST_INVARIANT_H_
#define TORCHLIFT_COMPILE_PASSES_HOIST_INVARIANT_H_

// File: compile/passes/hoist_invariant.h
//
// Batch-invariant hoisting: what a program computes for every row of a batch though all rows are
// equal is computed for one row, and expanded.
//
//   rows = aten.expand(w, [n, 3])            rows = aten.slice(aten.expand(w, [n, 3]), 0, 0, 1)
//   s = aten.sin(rows)  # f32[n, 3]          s = aten.expand(aten.sin(rows), [n, 3])
//   y = aten.mul.Tensor(s, x)                y = aten.mul.Tensor(s, x)
//
// NOTE [invariant dims]
// A value is invariant along a dim in which its stride is 0. An operator's result is invariant
// along a dim if every argument that has this dim is: pointwise operators, products of matrices,
// reductions over other dims, softmax. Views of what was expanded stay views of it. A reader that
// would get another type from an expanded argument (strides are part of it) is given a copy, so
// that all types stay. Strides of inputs are not relied on.
//
// Where a dynamic dim has size 0, so has the row.
//
// Kernels may round the last bit differently on one row than on many, and so may this pass.

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

struct HoistOptions {
  // An operator is left alone if it would read, or write, not as many elements less: the views of a
  // row and back cost about as much. What has dynamic dims is taken to be large.
  int64_t min_saved_elements = 4096;
};

// For graphs without writes. Gives the number of nodes that run on fewer rows; what they were
// computed from before may be dead now.
int64_t hoist_invariant(Graph& graph, const HoistOptions& options = {});

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_HOIST_INVARIANT_H_
