#include "batching/chunks.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "core/dispatch.h"
#include "core/error.h"
#include "core/memory_meter.h"
#include "core/random_stream.h"

namespace torchlift {
namespace {

// What a function may draw random numbers from, to start again from there: the generators, and the
// numbers of a level around this vmap.
class RandomState {
 public:
  explicit RandomState(c10::Device device) : around_(reproducible_level()) {
    save(c10::Device(c10::kCPU));
    if (device.is_cuda()) save(device);
    if (around_ != nullptr) calls_ = around_->calls();
  }

  void restore() {
    for (Saved& saved : saved_) {
      const std::lock_guard<std::mutex> lock(saved.generator.mutex());
      saved.generator.set_state(saved.state);
    }
    if (around_ != nullptr) around_->set_calls(calls_);
  }

 private:
  struct Saved {
    at::Generator generator;
    at::Tensor state;
  };

  void save(c10::Device device) {
    at::Generator generator = at::globalContext().defaultGenerator(device);
    const std::lock_guard<std::mutex> lock(generator.mutex());
    saved_.push_back({generator, generator.get_state()});
  }

  std::vector<Saved> saved_;
  Level* around_;
  int64_t calls_ = 0;
};

// Whether the chunks of this result can be copied into one tensor: nobody records the copies.
bool is_plain(const at::Tensor& leaf) {
  return depth_of(leaf) == 0 && !is_tracked(leaf) && leaf.layout() == c10::kStrided;
}

std::vector<int64_t> with_size(const at::Tensor& t, int64_t dim, int64_t size) {
  std::vector<int64_t> sizes = t.sizes().vec();
  sizes[dim] = size;
  return sizes;
}

// One leaf of the result.
struct JoinedLeaf {
  std::optional<int64_t> dim;
  at::Tensor whole;                // filled chunk by chunk...
  std::vector<at::Tensor> pieces;  // ...or put together in the end
};

void check_like_first(const JoinedLeaf& leaf, const at::Tensor& piece) {
  const at::Tensor& first = leaf.whole.defined() ? leaf.whole : leaf.pieces.front();
  if (with_size(first, *leaf.dim, 0) == with_size(piece, *leaf.dim, 0) &&
      first.scalar_type() == piece.scalar_type()) {
    return;
  }
  transform_error(
      "vmap", "with chunk_size, one chunk of a result has shape ", piece.sizes(), " and dtype ",
      piece.scalar_type(), ", an earlier one ", first.sizes(), " and ", first.scalar_type(),
      " (but for dim ", *leaf.dim,
      ", which holds the examples). The function must return the same shapes for every chunk.");
}

std::optional<MemoryReport>& last_report() {
  static thread_local std::optional<MemoryReport> report;
  return report;
}

// Chooses chunk sizes by what the chunks before took: NOTE [chunks by memory].
class Planner {
 public:
  Planner(int64_t budget, c10::Device device) : budget_(budget), meter_(device) {}

  void begin() {
    before_ = meter_.current();
    meter_.restart();
  }

  // The chunk of this length has run; what it returns is still in use.
  void measure(int64_t length) {
    const int64_t peak = std::max<int64_t>(meter_.peak() - before_, 0);
    if (length == 1 && peak > budget_) {
      transform_error("vmap", "memory_budget is ", budget_, " bytes, but one example takes ", peak,
                      " at its peak, beside the result. Raise the budget, or make the function use "
                      "less memory.");
    }
    report_.chunks += 1;
    report_.chunk_size = std::max(report_.chunk_size, length);
    report_.peak_bytes = std::max(report_.peak_bytes, peak);
    before_last_ = last_;
    last_ = {length, peak};
  }

  // How many of the remaining examples to run next.
  int64_t next_length(int64_t remaining) const {
    const int64_t fitting = std::clamp<int64_t>(predict(), 1, remaining);
    const int64_t chunks = (remaining + fitting - 1) / fitting;
    return (remaining + chunks - 1) / chunks;  // all of much the same size
  }

  void finish(int64_t examples) {
    report_.examples = examples;
    report_.budget = budget_;
    report_.result_bytes = std::max<int64_t>(meter_.current(), 0);
    last_report() = report_;
  }

 private:
  struct Measured {
    int64_t length = 0;
    int64_t peak = 0;
  };

  // The most examples whose predicted peak is within the budget.
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

  const int64_t budget_;
  MemoryMeter meter_;
  int64_t before_ = 0;
  Measured last_, before_last_;
  MemoryReport report_;
};

}  // namespace

const std::optional<MemoryReport>& memory_report() { return last_report(); }

struct Chunks::State {
  Options options;
  int64_t size;
  c10::Device device;
  int64_t start = 0;
  int64_t length = 0;
  std::optional<RandomState> random;               // with kSame
  std::shared_ptr<RandomStream> stream = nullptr;  // with kReproducible
  std::optional<Planner> planner;                  // with a memory budget
  std::vector<JoinedLeaf> leaves;
};

void Chunks::check(const Options& options) {
  if (options.chunk_size.has_value() && *options.chunk_size <= 0) {
    transform_error(
        "vmap", "chunk_size is ", *options.chunk_size,
        ", but it is the number of examples to run at a time. Give 1 or more, or leave it out.");
  }
  if (options.memory_budget.has_value() && *options.memory_budget <= 0) {
    transform_error("vmap", "memory_budget is ", *options.memory_budget,
                    ", but it is the number of bytes that a chunk of the examples may take. Give 1 "
                    "or more, or leave it out.");
  }
  if (options.chunk_size.has_value() && options.memory_budget.has_value()) {
    transform_error(
        "vmap", "both chunk_size (", *options.chunk_size, ") and memory_budget (",
        *options.memory_budget,
        ") were given, but a memory budget chooses the size of the chunks itself. Leave "
        "one of them out.");
  }
}

Chunks::Chunks(const Options& options, int64_t size, c10::Device device)
    : state_(new State{.options = options, .size = size, .device = device}) {
  if (options.randomness == Randomness::kReproducible) state_->stream = RandomStream::open();
  if (options.memory_budget.has_value()) state_->planner.emplace(*options.memory_budget, device);
}

Chunks::~Chunks() = default;

void Chunks::close() { state_->planner.reset(); }

bool Chunks::next() {
  State& s = *state_;
  s.start += s.length;
  const int64_t remaining = s.size - s.start;
  if (remaining <= 0) return false;
  if (s.planner.has_value()) {
    s.length = s.planner->next_length(remaining);
    s.planner->begin();
  } else {
    s.length = std::min(*s.options.chunk_size, remaining);
  }
  if (s.options.randomness != Randomness::kSame) return true;
  if (s.random.has_value()) {
    s.random->restore();
  } else {
    s.random.emplace(s.device);
  }
  return true;
}

int64_t Chunks::start() const { return state_->start; }

int64_t Chunks::length() const { return state_->length; }

Level::Options Chunks::level() const {
  return {.size = state_->length,
          .randomness = state_->options.randomness,
          .stream = state_->stream,
          .first_row = state_->start};
}

void Chunks::end(std::vector<at::Tensor> leaves, const std::vector<std::optional<int64_t>>& dims) {
  State& s = *state_;
  if (s.planner.has_value()) s.planner->measure(s.length);
  const bool first = s.start == 0;
  if (first) s.leaves.resize(leaves.size());
  if (s.leaves.size() != leaves.size()) {
    transform_error("vmap", "with chunk_size, one chunk returned ", leaves.size(),
                    " tensors, an earlier one ", s.leaves.size(),
                    ". The function must return the same structure for every chunk.");
  }
  for (const auto i : c10::irange(leaves.size())) {
    JoinedLeaf& leaf = s.leaves[i];
    at::Tensor& piece = leaves[i];
    if (first) leaf.dim = dims[i];
    if (!leaf.dim.has_value() || !piece.defined()) {
      if (first) leaf.whole = std::move(piece);
      continue;
    }
    if (first && is_plain(piece)) {
      leaf.whole = at::empty(with_size(piece, *leaf.dim, s.size), piece.options());
    } else if (!first) {
      check_like_first(leaf, piece);
    }
    if (leaf.whole.defined()) {
      leaf.whole.narrow(*leaf.dim, s.start, s.length).copy_(piece);
    } else {
      leaf.pieces.push_back(std::move(piece));
    }
  }
}

std::vector<at::Tensor> Chunks::join() {
  std::vector<at::Tensor> result;
  for (JoinedLeaf& leaf : state_->leaves) {
    result.push_back(leaf.pieces.empty() ? std::move(leaf.whole) : at::cat(leaf.pieces, *leaf.dim));
    leaf.pieces.clear();
  }
  if (state_->planner.has_value()) state_->planner->finish(state_->size);
  return result;
}

}  // namespace torchlift
