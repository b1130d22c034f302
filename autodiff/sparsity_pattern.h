#ifndef TORCHLIFT_AUTODIFF_SPARSITY_PATTERN_H_
#define TORCHLIFT_AUTODIFF_SPARSITY_PATTERN_H_

// File: autodiff/sparsity_pattern.h
//
// Sparsity patterns of functions of flat lists of tensors, below the typed API
// (autodiff/sparsity.h) and the Python one. See NOTE [dependence] in autodiff/dependence.h.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "autodiff/jacobian_blocks.h"

namespace torchlift {

struct PatternOptions {
  // How many inputs to propagate at a time. By default as many as bound the memory of a tensor.
  std::optional<int64_t> chunk_size = std::nullopt;
};

// The numbers of all values of f, laid end to end, by those of all inputs: a bool CSR tensor that
// has an element, true, wherever a value may depend on an input, for whatever inputs of these
// shapes. f runs once a chunk of inputs. Throws TransformError for inputs or values that are not of
// a real floating dtype; UnsupportedError where f looks at values.
at::Tensor jacobian_pattern(LeafFunction f, const std::vector<at::Tensor>& inputs,
                            const PatternOptions& options);

// The same of the gradients of f's one value: symmetric.
at::Tensor hessian_pattern(LeafFunction f, const std::vector<at::Tensor>& inputs,
                           const PatternOptions& options);

// The operators that were taken for dense in the last pattern computed on this thread: where one of
// them is met, the pattern may have more elements than needed.
const std::vector<std::string>& dense_operators();

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_SPARSITY_PATTERN_H_
