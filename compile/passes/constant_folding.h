#ifndef TORCHLIFT_COMPILE_PASSES_CONSTANT_FOLDING_H_
#define TORCHLIFT_COMPILE_PASSES_CONSTANT_FOLDING_H_

// File: compile/passes/constant_folding.h

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

struct FoldingOptions {
  // A result larger than this is folded only if it is no larger than the constants it is made of.
  int64_t max_bytes = 4096;
};

// Runs the pure operators whose tensors are all constants (factories have none), and holds what
// they give as constants. Views of constants stay nodes: they cost nothing, and as constants they
// would be stored twice. What an output may share memory with is not folded, since a caller may
// write into that. For graphs without writes. Gives the number of nodes folded; what they
// read may be dead now.
int64_t constant_folding(Graph& graph, const FoldingOptions& options = {});

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_CONSTANT_FOLDING_H_
