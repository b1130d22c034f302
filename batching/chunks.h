#ifndef TORCHLIFT_BATCHING_CHUNKS_H_
#define TORCHLIFT_BATCHING_CHUNKS_H_

// File: batching/chunks.h
//
// A batch in chunks, to bound memory: which examples are next (batching/chunk_plan.h), what random
// numbers they see, the results put together.

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "batching/chunk_plan.h"
#include "core/level.h"

namespace torchlift {

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
