#ifndef TORCHLIFT_COMPILE_BLOCKED_GROUP_H_
#define TORCHLIFT_COMPILE_BLOCKED_GROUP_H_

// File: compile/blocked_group.h
//
// Runs pointwise operators piece by piece: all of them on a block that fits the cache, then all of
// them on the next. What lies between two of them is never larger than a block.
//
//   std::vector<BlockedGroup> groups = blocked_groups(graph);   // compile/passes/blocked_groups.h
//   run_blocks(group, graph, [&](Slots* slots) { ...each node, on what the slots hold... },
//   &slots);
//
// NOTE [bits of blocks]
// A kernel takes most elements by vectors and the last few of a row one by one, which may round
// otherwise; some look at how memory is aligned, too. So blocks begin at multiples of
// kBlockAlignment elements, and have all of a row or a multiple of that: each element is computed
// as by the kernel on everything, on one thread. On several, kernels share out the elements of each
// call, and there are last few in each share; so the results of blocks may differ from those of
// the kernel on everything in a last bit here and there, as these do from one number of threads to
// another.

#include <ATen/core/Tensor.h>
#include <c10/core/DispatchKeySet.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

// In elements; of the smallest dtype twice the widest vector, and as much again.
inline constexpr int64_t kBlockAlignment = 256;

// The tensors of a run, by the id of their value.
using Slots = std::vector<at::Tensor>;

// Whether a result may take the memory of a value that nobody reads any more. Not if that is a view
// that conjugates or negates (the result would be one, too), nor zeros without memory.
inline bool can_be_written_over(const at::Tensor& t) {
  constexpr c10::DispatchKeySet kLazy(
      {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor});
  return !t.key_set().has_any(kLazy);
}

// Nodes first, ..., first + count - 1, whose results are dense and have the same sizes and strides.
struct BlockedGroup {
  size_t first = 0;
  size_t count = 0;
  // The results, their dims in the order of their memory; those that are one dim in every operand
  // are one here.
  std::vector<int64_t> sizes;
  // A block is `chunk` rows of this dim for each thread (the last block of them up to twice as
  // many), and one row of each dim before it.
  size_t split = 0;
  int64_t chunk = 0;

  // Read by the group. Tensors without dims are not among these: they are no matter of blocks.
  struct Input {
    ValueId id = kNoValue;
    std::vector<int64_t> strides;  // along `sizes`; 0 where it is broadcast
    bool single = false;           // of one element
  };
  std::vector<Input> inputs;

  // Made by the group, read outside of it.
  struct Output {
    ValueId id = kNoValue;
    ValueId over = kNoValue;  // the input whose memory it takes, if any
  };
  std::vector<Output> outputs;
};

// Calls body once for each block. It finds the group's inputs in the slots, as views of this block,
// and views of what the outputs are to be written to; leaves the slots of the outputs as they are,
// and drops all other results. Afterwards the slots hold the inputs as before, and the outputs.
// For tensors that neither autograd nor levels look at.
void run_blocks(const BlockedGroup& group, const Graph& graph,
                const std::function<void(Slots* slots)>& body, Slots* slots);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_BLOCKED_GROUP_H_
