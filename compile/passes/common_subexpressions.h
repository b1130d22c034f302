#ifndef TORCHLIFT_COMPILE_PASSES_COMMON_SUBEXPRESSIONS_H_
#define TORCHLIFT_COMPILE_PASSES_COMMON_SUBEXPRESSIONS_H_

// File: compile/passes/common_subexpressions.h

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

// Computes once what several nodes compute of the same arguments, and holds equal small constants
// once. Pure operators only: what draws random numbers is done as often as before. For graphs
// without writes. Gives the number of nodes and constants merged away; dead_code() drops nothing
// further.
int64_t common_subexpressions(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_COMMON_SUBEXPRESSIONS_H_
