#ifndef TORCHLIFT_BATCHING_RULES_VIEW_DIMS_H_
#define TORCHLIFT_BATCHING_RULES_VIEW_DIMS_H_

// File: batching/rules/view_dims.h
//
// Arithmetic on the position of a batch dim.

#include <cstdint>

namespace torchlift {

// Where the batch dim is after the (other) physical dim `removed` has gone.
inline int64_t without_dim(int64_t bdim, int64_t removed) {
  return removed < bdim ? bdim - 1 : bdim;
}

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_VIEW_DIMS_H_
