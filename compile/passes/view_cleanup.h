#ifndef TORCHLIFT_COMPILE_PASSES_VIEW_CLEANUP_H_
#define TORCHLIFT_COMPILE_PASSES_VIEW_CLEANUP_H_

// File: compile/passes/view_cleanup.h

#include <cstdint>

#include "compile/graph.h"

namespace torchlift::compile {

// Removes views and copies that change nothing: views, reshapes, expands and slices whose result
// has the type of their argument, strides too; alias, detach; clone, contiguous and conversions
// that give the type they got. Makes one view of a chain of views, reshapes, squeezes and
// unsqueezes, or none where the chain comes back to where it began. Outputs stay copies where they
// were. For graphs without writes. Gives the number of nodes that became needless or simpler: the
// former are dead now.
int64_t view_cleanup(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_VIEW_CLEANUP_H_
