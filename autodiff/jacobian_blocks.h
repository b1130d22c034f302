#ifndef TORCHLIFT_AUTODIFF_JACOBIAN_BLOCKS_H_
#define TORCHLIFT_AUTODIFF_JACOBIAN_BLOCKS_H_

// File: autodiff/jacobian_blocks.h
//
// Jacobians of functions of flat lists of tensors, below the typed API (autodiff/jacobian.h) and
// the Python one.

#include <ATen/core/Tensor.h>
#include <c10/util/FunctionRef.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "autodiff/reverse.h"
#include "batching/chunk_plan.h"

namespace torchlift {

// What a function on leaves returned: the first `values` of them are differentiated.
struct LeafOutputs {
  std::vector<at::Tensor> leaves;
  size_t values = 0;
};
using LeafFunction = c10::function_ref<LeafOutputs(const std::vector<at::Tensor>&)>;

// What complex tensors among the inputs and outputs mean.
enum class ComplexNumbers : uint8_t {
  kRefuse,
  // The function is holomorphic, and all tensors are complex: a derivative is one complex number.
  kHolomorphic,
  // A complex tensor is its real view: see at::view_as_real. Blocks are those of the views.
  kRealView,
};

// What a user's options say; throws TransformError if they say both.
ComplexNumbers complex_numbers(const char* transform, bool holomorphic, bool real_view);

struct JacobianBlocks {
  // blocks[i][j] has the shape of value i followed by that of input j.
  std::vector<std::vector<at::Tensor>> blocks;
  // All outputs, as the caller may see them.
  std::vector<at::Tensor> outputs;
};

// One pass of f, and one backward pass for each chunk of rows (all at once by default).
JacobianBlocks reverse_jacobian(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                const ChunkOptions& chunks,
                                ComplexNumbers numbers = ComplexNumbers::kRefuse);

// One pass of f for each chunk of columns.
JacobianBlocks forward_jacobian(LeafFunction f, const std::vector<at::Tensor>& inputs,
                                const ChunkOptions& chunks,
                                ComplexNumbers numbers = ComplexNumbers::kRefuse);

// The cheaper of the two: forward when there are fewer columns than rows. Runs f once more to count
// the rows.
JacobianBlocks any_jacobian(LeafFunction f, const std::vector<at::Tensor>& inputs,
                            const ChunkOptions& chunks,
                            ComplexNumbers numbers = ComplexNumbers::kRefuse);

// --- one pass ------------------------------------------------------------------------------------

// Runs f with `count` tangents at once for each input: [count, ...its shape], or undefined for a
// constant; they must not be used otherwise. `out` gets what f returned. Returns the tangents of
// the values, [count, ...]. Errors are in the name of `transform`.
std::vector<at::Tensor> push_tangents(const char* transform, LeafFunction f,
                                      const std::vector<at::Tensor>& inputs,
                                      std::vector<at::Tensor> tangents, int64_t count,
                                      LeafOutputs& out,
                                      ComplexNumbers numbers = ComplexNumbers::kRefuse);

// Pulls `count` cotangents at once back: for each output [count, ...its shape], or undefined for
// zeros. Returns the gradients of the inputs, [count, ...]. With `last` the graph is freed.
std::vector<at::Tensor> pull_cotangents(const Pullback& pullback,
                                        std::vector<at::Tensor> cotangents, int64_t count,
                                        bool last);

// Throws TransformError or UnsupportedError, in the name of `transform`, if inputs or values have
// no derivative.
void check_differentiable(const char* transform, const LeafOutputs& out,
                          const std::vector<at::Tensor>& inputs);

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_JACOBIAN_BLOCKS_H_
