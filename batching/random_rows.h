#ifndef TORCHLIFT_BATCHING_RANDOM_ROWS_H_
#define TORCHLIFT_BATCHING_RANDOM_ROWS_H_

// File: batching/random_rows.h
//
// A loop that draws the numbers of vmap with Randomness::kReproducible, row by row:
//
//   at::manual_seed(0);
//   at::Tensor mapped = vmap(f, {.randomness = Randomness::kReproducible})(xs);
//
//   at::manual_seed(0);
//   const RandomRows rows;                       // takes from the generator what vmap takes
//   for (int64_t i = 0; i < xs.size(0); ++i) {
//     const RandomRows::Row row(rows, i);
//     looped.push_back(f(xs[i]));                // equals mapped[i], bit for bit
//   }
//
// Rows may come in any order, on any thread, more than once. Inside of a Row, a vmap and further
// RandomRows are the inner ones of a nested pair. See NOTE [reproducible numbers] in
// core/random_stream.h.

#include <cstdint>
#include <memory>

#include "core/level.h"

namespace torchlift {

class RandomStream;

class RandomRows {
 public:
  RandomRows();

  // While it lives, random operators of this thread draw the numbers of row `row` (>= 0).
  class Row {
   public:
    Row(const RandomRows& rows, int64_t row);

   private:
    LevelScope scope_;
  };

 private:
  std::shared_ptr<RandomStream> stream_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RANDOM_ROWS_H_
