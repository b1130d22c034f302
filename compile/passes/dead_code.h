#ifndef TORCHLIFT_COMPILE_PASSES_DEAD_CODE_H_
#define TORCHLIFT_COMPILE_PASSES_DEAD_CODE_H_

// File: compile/passes/dead_code.h

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

// Drops nodes whose results nobody reads, and constants that nobody reads. Nodes that write, draw
// random numbers, or have no results (assertions) stay: NOTE [what passes keep] in
// compile/passes/node_facts.h. Gives the number of nodes dropped.
int64_t dead_code(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_DEAD_CODE_H_
