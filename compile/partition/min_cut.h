#ifndef TORCHLIFT_COMPILE_PARTITION_MIN_CUT_H_
#define TORCHLIFT_COMPILE_PARTITION_MIN_CUT_H_

// File: compile/partition/min_cut.h

#include <cstdint>
#include <vector>

namespace torchlift::compile {

struct FlowEdge {
  int32_t from = 0;
  int32_t to = 0;
  int64_t capacity = 0;  // not negative; the sum of all must fit int64_t
};

// For each of `vertices` vertices, whether it lies on the side of `sink` in a cut of minimum
// capacity between source and sink: of all such cuts, the one with the fewest vertices there.
std::vector<bool> sink_side_of_min_cut(int32_t vertices, const std::vector<FlowEdge>& edges,
                                       int32_t source, int32_t sink);

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_PARTITION_MIN_CUT_H_
