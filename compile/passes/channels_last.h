#ifndef TORCHLIFT_COMPILE_PASSES_CHANNELS_LAST_H_
#define TORCHLIFT_COMPILE_PASSES_CHANNELS_LAST_H_

// File: compile/passes/channels_last.h
//
// Puts images into channels-last memory where a max pool reads them on the CPU: there libtorch's
// kernel takes vectors of channels, for other layouts number after number (5 to 20 times as long).
//
//   const std::vector<ValueId> chosen = channels_last(graph);
//
// NOTE [one layout through a network]
// The convolution that makes what is pooled gives channels-last memory by itself, if its weight has
// it; pointwise operators and views pass it on, convolutions after the pool keep it, and so do the
// gradients on the way back. So nothing large is copied on such a way: only weights are. Where an
// operator stands in the way, what it reads is copied back to the layout that it had, and where
// nothing but a copy gives a pool such memory, a copy is made, which still is quicker. Where copies
// would be more than pools save, the graph stays as it is. Outputs have
// the layout that they had, but that those with gaps in their memory are contiguous then.

#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// The values whose strides are others now, views left out: kernels are expected to give these, and
// a run has to see to it that they did (RunPlan::chosen in compile/replay.h), as other kernels may
// be at work there. Empty where there is nothing to gain; the graph is as it was then. Pools give
// the same bits as before; convolutions round otherwise, as another kernel computes them. For
// graphs without writes; with dynamic dims, too.
std::vector<ValueId> channels_last(Graph& graph);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PASSES_CHANNELS_LAST_H_
