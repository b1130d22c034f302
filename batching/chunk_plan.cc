#include "batching/chunk_plan.h"

#include <algorithm>
#include <limits>

#include "core/error.h"
#include "core/memory_meter.h"

namespace torchlift {
namespace {

std::optional<MemoryReport>& last_report() {
  static thread_local std::optional<MemoryReport> report;
  return report;
}

}  // namespace

const std::optional<MemoryReport>& memory_report() { return last_report(); }

// Chooses chunk sizes by what the chunks before took: NOTE [chunks by memory].
class ChunkPlan::Planner {
 public:
  Planner(const ChunkedWork& work, int64_t budget, c10::Device device)
      : work_(work), budget_(budget), meter_(device) {}

  void begin() {
    before_ = meter_.current();
    meter_.restart();
  }

  // The chunk of this length has run; what it returns is still in use.
  void measure(int64_t length) {
    const int64_t peak = std::max<int64_t>(meter_.peak() - before_, 0);
    if (length == 1 && peak > budget_) {
      transform_error(work_.transform, "memory_budget is ", budget_, " bytes, but one ", work_.item,
                      " takes ", peak,
                      " at its peak, beside the result. Raise the budget, or make the function use "
                      "less memory.");
    }
    report_.chunks += 1;
    report_.chunk_size = std::max(report_.chunk_size, length);
    report_.peak_bytes = std::max(report_.peak_bytes, peak);
    before_last_ = last_;
    last_ = {length, peak};
  }

  // How many of the remaining items to do next.
  int64_t next_length(int64_t remaining) const {
    const int64_t fitting = std::clamp<int64_t>(predict(), 1, remaining);
    const int64_t chunks = (remaining + fitting - 1) / fitting;
    return (remaining + chunks - 1) / chunks;  // all of much the same size
  }

  void finish(int64_t items) {
    report_.examples = items;
    report_.budget = budget_;
    report_.result_bytes = std::max<int64_t>(meter_.current(), 0);
    last_report() = report_;
  }

 private:
  struct Measured {
    int64_t length = 0;
    int64_t peak = 0;
  };

  // The most items whose predicted peak is within the budget.
  int64_t predict() const {
    if (last_.length == 0) return 1;
    if (last_.peak == 0) return std::numeric_limits<int64_t>::max();
    const double room = static_cast<double>(budget_);
    double each = static_cast<double>(last_.peak) / static_cast<double>(last_.length);
    double fixed = 0;
    if (before_last_.length > 0 && before_last_.length != last_.length) {
      const double slope = static_cast<double>(last_.peak - before_last_.peak) /
                           static_cast<double>(last_.length - before_last_.length);
      if (slope > 0 && slope < each) {
        fixed = static_cast<double>(last_.peak) - slope * static_cast<double>(last_.length);
        each = slope;
      }
    }
    const double fitting = (room - fixed) / each;
    constexpr double kLargest = 1e15;
    return static_cast<int64_t>(std::min(fitting, kLargest));
  }

  const ChunkedWork work_;
  const int64_t budget_;
  MemoryMeter meter_;
  int64_t before_ = 0;
  Measured last_, before_last_;
  MemoryReport report_;
};

void ChunkPlan::check(const ChunkedWork& work, const ChunkOptions& options) {
  if (options.chunk_size.has_value() && *options.chunk_size <= 0) {
    transform_error(work.transform, "chunk_size is ", *options.chunk_size,
                    ", but it is the number of ", work.item,
                    "s to run at a time. Give 1 or more, or leave it out.");
  }
  if (options.memory_budget.has_value() && *options.memory_budget <= 0) {
    transform_error(work.transform, "memory_budget is ", *options.memory_budget,
                    ", but it is the number of bytes that a chunk of the ", work.item,
                    "s may take. Give 1 or more, or leave it out.");
  }
  if (options.chunk_size.has_value() && options.memory_budget.has_value()) {
    transform_error(
        work.transform, "both chunk_size (", *options.chunk_size, ") and memory_budget (",
        *options.memory_budget,
        ") were given, but a memory budget chooses the size of the chunks itself. Leave "
        "one of them out.");
  }
}

ChunkPlan::ChunkPlan(const ChunkedWork& work, const ChunkOptions& options, int64_t size,
                     c10::Device device)
    : options_(options), size_(size) {
  check(work, options);
  if (options.memory_budget.has_value()) {
    planner_ = std::make_unique<Planner>(work, *options.memory_budget, device);
  }
}

ChunkPlan::~ChunkPlan() = default;

bool ChunkPlan::next() {
  start_ += length_;
  const int64_t remaining = size_ - start_;
  if (remaining <= 0) return false;
  if (planner_ == nullptr) {
    length_ = std::min(options_.chunk_size.value_or(remaining), remaining);
    return true;
  }
  length_ = planner_->next_length(remaining);
  planner_->begin();
  return true;
}

void ChunkPlan::measure() {
  if (planner_ != nullptr) planner_->measure(length_);
}

void ChunkPlan::finish() {
  if (planner_ != nullptr) planner_->finish(size_);
}

void ChunkPlan::close() { planner_.reset(); }

}  // namespace torchlift
