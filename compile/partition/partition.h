#ifndef TORCHLIFT_COMPILE_PARTITION_PARTITION_H_
#define TORCHLIFT_COMPILE_PARTITION_PARTITION_H_

// File: compile/partition/partition.h
//
// Cuts a joint graph, which computes a function and its gradients, into one for the forward and one
// for the backward pass.
//
//   joint:     (primals..., tangents...) -> (outputs..., gradients...)
//   forward:   (primals...)              -> (outputs..., saved...)
//   backward:  (saved..., tangents...)   -> (gradients...)
//
//   const Partition parts = min_cut_partition(joint, {.primals = 3, .outputs = 1});
//   std::cout << parts.saved_bytes << " bytes saved, " << parts.recomputed_nodes << " nodes again";

#include <cstdint>
#include <string>
#include <vector>

#include "compile/graph.h"

namespace torchlift::compile {

struct PartitionOptions {
  size_t primals = 0;  // the first inputs of the joint graph; the others are tangents
  size_t outputs = 0;  // the first outputs; the others are gradients
  // Sizes of the dynamic dims, to count bytes with.
  std::vector<int64_t> symbols;
};

struct SavedValue {
  std::string name;     // in the joint graph
  int64_t bytes = 0;    // of the memory that it keeps
  bool primal = false;  // an input: kept by the caller, mostly, in any case
};

struct Partition {
  Graph forward;
  Graph backward;
  std::vector<SavedValue> saved;
  // Memory that several saved values share is counted once.
  int64_t saved_bytes = 0;
  // That part of it which is no primal.
  int64_t saved_activation_bytes = 0;
  // What the backward pass computes a second time: nodes but views, elements of their results, and
  // bytes that they read and write.
  int64_t recomputed_nodes = 0;
  int64_t recomputed_elements = 0;
  int64_t recomputed_bytes = 0;
};

// Saves all values of the forward pass that the backward pass reads.
Partition default_partition(const Graph& joint, const PartitionOptions& options);

struct MinCutOptions {
  // Reductions, softmax and normalizations may be computed again, as pointwise operators may.
  bool recompute_reductions = true;
};

// Saves as few bytes as possible, and computes the rest of what the backward pass reads again from
// them, as functorch's min_cut_rematerialization_partition does: a minimum cut between the
// primals and the backward pass. Views, pointwise operators, factories and (see above) reductions
// may be computed again unless their result is less than a quarter of what they read; products of
// matrices, convolutions and all else are not; random operators never are. Of several
// cuts of the same size, the one with the least to compute again.
Partition min_cut_partition(const Graph& joint, const PartitionOptions& options,
                            const MinCutOptions& min_cut = {});

// Both throw TransformError if there are fewer inputs or outputs than the options say, an output
// depends on a tangent, or the joint graph writes (run functionalize() first).

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PARTITION_PARTITION_H_
