#ifndef TORCHLIFT_BATCHING_CHUNKS_H_
#define TORCHLIFT_BATCHING_CHUNKS_H_

// File: batching/chunks.h
//
// A batch in chunks, to bound memory: which examples are next, what random numbers they see, the
// results put together. The chunks have a given size, or one that a memory budget allows:
//
// NOTE [chunks by memory]
// The first chunk is one example. What it takes at its peak, beside what outlives it, is measured
// (core/memory_meter.h). As a chunk's memory grows at most in proportion to its examples, the
// second may hold budget / peak of them; from then on a line through the last two chunks predicts
// the peak of the next. What outlives a chunk is not counted: its part of the result, and what
// autograd keeps of it where the result is differentiated from outside.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "core/level.h"

namespace torchlift {

// What a call with a memory budget did.
struct MemoryReport {
  int64_t examples = 0;
  int64_t chunks = 0;
  int64_t chunk_size = 0;    // of the largest chunk
  int64_t budget = 0;        // bytes, as given
  int64_t peak_bytes = 0;    // the most that a chunk took beside the result, measured
  int64_t result_bytes = 0;  // the result, and what autograd keeps for it
};

// Of the last vmap with memory_budget that ended on this thread; nothing if there was none.
//
//   vmap(f, {.memory_budget = 100 << 20})(xs);
//   std::cout << memory_report()->chunk_size;
const std::optional<MemoryReport>& memory_report();

// One run over a batch. On the way the tensors of each chunk are dropped, so that the peak is the
// result and one chunk.
//
//   Chunks chunks({.chunk_size = 10}, size, device);
//   while (chunks.next()) {
//     LevelScope scope(chunks.level());
//     ...run f on the examples from chunks.start() on, chunks.length() of them...
//     chunks.end(leaves, dims);
//   }
//   result = chunks.join();
class Chunks {
 public:
  struct Options {
    Randomness randomness = Randomness::kError;
    std::optional<int64_t> chunk_size = std::nullopt;
    std::optional<int64_t> memory_budget = std::nullopt;  // bytes
  };

  // Throws TransformError if chunk_size or memory_budget is not positive, or both are given.
  static void check(const Options& options);

  // size: of the whole batch, at least 1.
  Chunks(const Options& options, int64_t size, c10::Device device);
  ~Chunks();

  // Goes to the next chunk, if there is one.
  bool next();
  int64_t start() const;
  int64_t length() const;
  // The level that the chunk runs in.
  Level::Options level() const;
  // Takes the leaves of the chunk's result and, for each, the dim (>= 0) that holds the examples;
  // without one it is the first chunk's. Throws TransformError if they do not fit the first
  // chunk's, or if one example takes more than the budget.
  void end(std::vector<at::Tensor> leaves, const std::vector<std::optional<int64_t>>& dims);
  // The leaves of the whole result.
  std::vector<at::Tensor> join();
  // Stops measuring, as the destructor does. For owners that may be destroyed late.
  void close();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_CHUNKS_H_
