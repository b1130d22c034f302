#ifndef TORCHLIFT_BATCHING_RULES_INDEX_PLACES_H_
#define TORCHLIFT_BATCHING_RULES_INDEX_PLACES_H_

// File: batching/rules/index_places.h
//
// Where the dims of x[i, :, j] come from: arithmetic for the batching rules of index and index_put.

#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

#include <cstdint>
#include <vector>

namespace torchlift {

// NOTE [places of advanced indexing]
// The index tensors broadcast to one shape, of `rank` dims. It takes the place of the indexed dims
// if these are neighbours, and comes first if not:
//   x[:, i, j] -> [x0, i..., x3]      x[i, :, j] -> [i..., x1, x3]
struct Places {
  int64_t rank = 0;     // of the broadcast index
  int64_t leading = 0;  // dims in front of it in the result
  int64_t others = 0;   // dims that are not indexed
  bool adjacent = true;

  int64_t result_rank() const { return rank + others; }
};

// indexed[d]: whether dim d has an index; dims beyond have none. self_rank: of the indexed tensor.
Places places_of(const std::vector<bool>& indexed, int64_t self_rank, int64_t index_rank);

// The order of dims [B, result...] when the operator put the broadcast index right behind the
// batch, as x[arange(B), i, ...] does, although it belongs behind `leading` dims:
//   [B, i..., leading..., rest] -> [B, leading..., i..., rest]
c10::SmallVector<int64_t, 8> order_behind_leading(const Places& places);

// The inverse, for the values that index_put writes.
c10::SmallVector<int64_t, 8> order_in_front_of_leading(const Places& places);

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_INDEX_PLACES_H_
