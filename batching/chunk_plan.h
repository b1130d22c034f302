#ifndef TORCHLIFT_BATCHING_CHUNK_PLAN_H_
#define TORCHLIFT_BATCHING_CHUNK_PLAN_H_

// File: batching/chunk_plan.h
//
// How much to do at a time, to bound memory: the examples of a vmap, the rows of a Jacobian. The
// chunks have a given size, or one that a memory budget allows:
//
// NOTE [chunks by memory]
// The first chunk is one example. What it takes at its peak, beside what outlives it, is measured
// (core/memory_meter.h). As a chunk's memory grows at most in proportion to its examples, the
// second may hold budget / peak of them; from then on a line through the last two chunks predicts
// the peak of the next. What outlives a chunk is not counted: its part of the result, and what
// autograd keeps of it where the result is differentiated from outside.

#include <c10/core/Device.h>

#include <cstdint>
#include <memory>
#include <optional>

namespace torchlift {

// All at once if neither is given.
struct ChunkOptions {
  std::optional<int64_t> chunk_size = std::nullopt;
  std::optional<int64_t> memory_budget = std::nullopt;  // bytes
};

// What a call with a memory budget did. Examples are those of a vmap; for a Jacobian, its rows or
// columns.
struct MemoryReport {
  int64_t examples = 0;
  int64_t chunks = 0;
  int64_t chunk_size = 0;    // of the largest chunk
  int64_t budget = 0;        // bytes, as given
  int64_t peak_bytes = 0;    // the most that a chunk took beside the result, measured
  int64_t result_bytes = 0;  // the result, and what autograd keeps for it
};

// Of the last call with memory_budget that ended on this thread; nothing if there was none.
//
//   vmap(f, {.memory_budget = 100 << 20})(xs);
//   std::cout << memory_report()->chunk_size;
const std::optional<MemoryReport>& memory_report();

// What is done in chunks, for messages.
struct ChunkedWork {
  const char* transform;         // "vmap"
  const char* item = "example";  // "row"
};

//   ChunkPlan plan({.transform = "jacrev", .item = "row"}, options, rows, device);
//   while (plan.next()) {
//     ...do those from plan.start() on, plan.length() of them...
//     plan.measure();
//     ...put the results where they belong, drop everything else...
//   }
//   plan.finish();
class ChunkPlan {
 public:
  // Throws TransformError if chunk_size or memory_budget is not positive, or both are given.
  static void check(const ChunkedWork& work, const ChunkOptions& options);

  // Checks the options, too.
  ChunkPlan(const ChunkedWork& work, const ChunkOptions& options, int64_t size, c10::Device device);
  ~ChunkPlan();

  // Goes to the next chunk, if there is one.
  bool next();
  int64_t start() const { return start_; }
  int64_t length() const { return length_; }
  bool is_last() const { return start_ + length_ == size_; }
  // The chunk has run, and what it returns is still in use. Throws TransformError if one item takes
  // more than the budget.
  void measure();
  // The result is whole: makes the report.
  void finish();
  // Stops measuring, as the destructor does. For owners that may be destroyed late.
  void close();

 private:
  class Planner;

  const ChunkOptions options_;
  const int64_t size_;
  int64_t start_ = 0;
  int64_t length_ = 0;
  std::unique_ptr<Planner> planner_;  // with a memory budget
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_CHUNK_PLAN_H_
