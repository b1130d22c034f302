#include "batching/rules/index_places.h"

#include <cstddef>

namespace torchlift {
namespace {

// [0, then `count` dims from `first`, then `more` dims from `second`, then the rest]
c10::SmallVector<int64_t, 8> order(int64_t first, int64_t count, int64_t second, int64_t more,
                                   int64_t total) {
  c10::SmallVector<int64_t, 8> dims{0};
  for (int64_t i = 0; i < count; ++i) dims.push_back(first + i);
  for (int64_t i = 0; i < more; ++i) dims.push_back(second + i);
  for (int64_t dim = 1 + count + more; dim < total; ++dim) dims.push_back(dim);
  return dims;
}

}  // namespace

Places places_of(const std::vector<bool>& indexed, int64_t self_rank, int64_t index_rank) {
  Places places;
  places.rank = index_rank;
  int64_t first = -1;
  int64_t last = -1;
  int64_t count = 0;
  for (size_t dim = 0; dim < indexed.size(); ++dim) {
    if (!indexed[dim]) continue;
    if (first < 0) first = static_cast<int64_t>(dim);
    last = static_cast<int64_t>(dim);
    ++count;
  }
  places.others = self_rank - count;
  places.adjacent = last - first + 1 == count;
  places.leading = places.adjacent && first > 0 ? first : 0;
  return places;
}

c10::SmallVector<int64_t, 8> order_behind_leading(const Places& places) {
  return order(1 + places.rank, places.leading, 1, places.rank, 1 + places.result_rank());
}

c10::SmallVector<int64_t, 8> order_in_front_of_leading(const Places& places) {
  return order(1 + places.leading, places.rank, 1, places.leading, 1 + places.result_rank());
}

}  // namespace torchlift
