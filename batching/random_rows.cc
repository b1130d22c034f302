#include "batching/random_rows.h"

#include "core/error.h"
#include "core/random_stream.h"

namespace torchlift {
namespace {

int64_t checked_row(int64_t row) {
  if (row < 0) {
    transform_error("vmap", "row ", row, " of RandomRows: rows are counted from 0.");
  }
  return row;
}

}  // namespace

RandomRows::RandomRows() : stream_(RandomStream::open()) {}

RandomRows::Row::Row(const RandomRows& rows, int64_t row)
    : scope_({.kind = LevelKind::kRow,
              .size = 1,
              .randomness = Randomness::kReproducible,
              .stream = rows.stream_,
              .first_row = checked_row(row)}) {}

}  // namespace torchlift
