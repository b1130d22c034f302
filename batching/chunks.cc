#include "batching/chunks.h"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include "core/dispatch.h"
#include "core/error.h"
#include "core/random_state.h"
#include "core/random_stream.h"

namespace torchlift {
namespace {

// Where the chunks draw random numbers from, to start each from there: the generators, and the
// numbers of a level around this vmap.
class DrawState {
 public:
  explicit DrawState(c10::Device device) : generators_({device}), around_(reproducible_level()) {
    if (around_ != nullptr) calls_ = around_->calls();
  }

  void restore() const {
    generators_.restore();
    if (around_ != nullptr) around_->set_calls(calls_);
  }

 private:
  RandomState generators_;
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

constexpr ChunkedWork kWork{.transform = "vmap"};

ChunkOptions plan_options(const Chunks::Options& options) {
  return {.chunk_size = options.chunk_size, .memory_budget = options.memory_budget};
}

}  // namespace

struct Chunks::State {
  Options options;
  int64_t size;
  c10::Device device;
  ChunkPlan plan;
  std::optional<DrawState> random;                 // with kSame
  std::shared_ptr<RandomStream> stream = nullptr;  // with kReproducible
  std::vector<JoinedLeaf> leaves;
};

void Chunks::check(const Options& options) { ChunkPlan::check(kWork, plan_options(options)); }

Chunks::Chunks(const Options& options, int64_t size, c10::Device device)
    : state_(new State{.options = options,
                       .size = size,
                       .device = device,
                       .plan = {kWork, plan_options(options), size, device}}) {
  if (options.randomness == Randomness::kReproducible) state_->stream = RandomStream::open();
}

Chunks::~Chunks() = default;

void Chunks::close() { state_->plan.close(); }

bool Chunks::next() {
  State& s = *state_;
  if (!s.plan.next()) return false;
  if (s.options.randomness != Randomness::kSame) return true;
  if (s.random.has_value()) {
    s.random->restore();
  } else {
    s.random.emplace(s.device);
  }
  return true;
}

int64_t Chunks::start() const { return state_->plan.start(); }

int64_t Chunks::length() const { return state_->plan.length(); }

Level::Options Chunks::level() const {
  return {.size = length(),
          .randomness = state_->options.randomness,
          .stream = state_->stream,
          .first_row = start()};
}

void Chunks::end(std::vector<at::Tensor> leaves, const std::vector<std::optional<int64_t>>& dims) {
  State& s = *state_;
  s.plan.measure();
  const bool first = s.plan.start() == 0;
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
      leaf.whole.narrow(*leaf.dim, start(), length()).copy_(piece);
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
  state_->plan.finish();
  return result;
}

}  // namespace torchlift
