#ifndef TORCHLIFT_CORE_RANDOM_STREAM_H_
#define TORCHLIFT_CORE_RANDOM_STREAM_H_

// File: core/random_stream.h
//
// NOTE [reproducible numbers]
// With Randomness::kReproducible the numbers that example i sees depend on the seed, on which
// random operator of the function asks (the call), and on i. They do not depend on the batch the
// example is in: a loop, chunks of any size and the whole batch at once agree bit for bit.
//
// A call of vmap takes one 64-bit number from the default CPU generator, the root. A vmap that is
// called inside of a reproducible one takes none: it is known by its place among the calls of the
// function around it. A key is folded (core/philox.h), outermost level first, from
//
//   root -> row of the outer level -> call that opened the inner level -> row of the inner level
//        -> call that draws
//
// and the numbers of an example are Philox's at the counters 0, 1, 2... of its key. Operators that
// cannot draw from a counter (poisson, randperm...) run once a row, from a sequential generator
// whose state is made of that key. `generator=` arguments work the same way, with a root that is
// taken from that generator when a call of vmap first meets it.
//
// Levels of other modes take part: "different" ones inside or around of it with their rows, "same"
// ones with nothing, and one that allows no random operator throws.

#include <ATen/core/Generator.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/level.h"

namespace torchlift {

// One call of vmap with Randomness::kReproducible: what its chunks have in common. Thread-safe.
class RandomStream {
 public:
  // Of a call that starts now on this thread.
  static std::shared_ptr<RandomStream> open();

  // Which call of the function around it opened it; nothing for the outermost.
  std::optional<int64_t> opened_as() const {
    return root_ == nullptr ? std::nullopt : std::optional<int64_t>(opened_as_);
  }

  // The root of the numbers drawn with this generator.
  uint64_t root(const std::optional<at::Generator>& generator);

 private:
  explicit RandomStream(uint64_t seed) : seed_(seed) {}
  RandomStream(std::shared_ptr<RandomStream> root, int64_t opened_as)
      : root_(std::move(root)), opened_as_(opened_as) {}

  std::shared_ptr<RandomStream> root_;  // the outermost stream; null here if it is this one
  int64_t opened_as_ = 0;
  uint64_t seed_ = 0;
  std::mutex mutex_;
  std::vector<std::pair<at::Generator, uint64_t>> generators_;
};

// The innermost level open on this thread with Randomness::kReproducible, or null.
Level* reproducible_level();

// The key of one row with the row of `level` folded in; `level` takes part in random numbers.
uint64_t fold_row(uint64_t key, const Level& level, int64_t row);

// Whether the rows of the level draw different numbers. Throws if it allows no random numbers.
bool has_own_numbers(const Level& level, const char* op);

// --- operators that run once a row ---------------------------------------------------------------

// Lives while a rule of `level` runs a random operator once for each of its rows:
//
//   RowDraws rows(level, generator);
//   for (int64_t i = 0; i < level.size(); ++i) {
//     rows.begin(i);
//     ...call the operator on row i...
//   }
//
// The levels around do likewise. When none is left, the operator draws from a generator that is
// seeded for this row of every level.
class RowDraws {
 public:
  RowDraws(const Level& level, const std::optional<at::Generator>& generator, const char* op);
  ~RowDraws();
  RowDraws(const RowDraws&) = delete;
  RowDraws& operator=(const RowDraws&) = delete;

  void begin(int64_t row);

  // The loop over the rows of the outermost level so far, or null.
  static RowDraws* current();
  // The key for the next operator that draws, in the current row of all loops.
  uint64_t next_key();

 private:
  const Level& level_;
  RowDraws* const inner_;
  const bool own_numbers_;
  uint64_t root_ = 0;  // of the innermost loop, and the call it stands for
  int64_t call_ = 0;
  int64_t drawn_ = 0;
  int64_t row_ = 0;

  RowDraws& innermost() { return inner_ == nullptr ? *this : inner_->innermost(); }
};

// While it lives, no loop over rows is at work on this thread.
class NoRowDraws {
 public:
  NoRowDraws();
  ~NoRowDraws();
  NoRowDraws(const NoRowDraws&) = delete;
  NoRowDraws& operator=(const NoRowDraws&) = delete;

 private:
  RowDraws* saved_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_RANDOM_STREAM_H_
