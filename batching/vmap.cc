#include "batching/vmap.h"

#include <ATen/Context.h>
#include <ATen/core/Generator.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <mutex>

#include "core/dispatch.h"
#include "core/error.h"

namespace torchlift::vmap_internal {
namespace {

// The state of the random generators that a function may draw from, to start again from there.
class RandomState {
 public:
  explicit RandomState(c10::Device device) {
    save(c10::Device(c10::kCPU));
    if (device.is_cuda()) save(device);
  }

  void restore() {
    for (Saved& saved : saved_) {
      const std::lock_guard<std::mutex> lock(saved.generator.mutex());
      saved.generator.set_state(saved.state);
    }
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

}  // namespace

void check_options(const VmapOptions& options) {
  if (options.chunk_size.has_value() && *options.chunk_size <= 0) {
    transform_error(
        "vmap", "chunk_size is ", *options.chunk_size,
        ", but it is the number of examples to run at a time. Give 1 or more, or leave it out.");
  }
  if (options.axis_size.has_value() && *options.axis_size < 0) {
    transform_error("vmap", "axis_size is ", *options.axis_size,
                    ", but it is the number of examples. Give 0 or more, or leave it out.");
  }
}

struct ChunkJoiner::State {
  int64_t chunk_size;
  int64_t size;
  c10::Device device;
  bool same_random;
  std::optional<RandomState> random;
  std::vector<JoinedLeaf> leaves;
};

ChunkJoiner::ChunkJoiner(const VmapOptions& options, int64_t size, c10::Device device)
    : state_(new State{.chunk_size = *options.chunk_size,
                       .size = size,
                       .device = device,
                       .same_random = options.randomness == Randomness::kSame}) {}

ChunkJoiner::~ChunkJoiner() = default;

int64_t ChunkJoiner::chunk_length(int64_t start) const {
  return std::min(state_->chunk_size, state_->size - start);
}

void ChunkJoiner::begin_chunk() {
  if (!state_->same_random) return;
  if (state_->random.has_value()) {
    state_->random->restore();
  } else {
    state_->random.emplace(state_->device);
  }
}

void ChunkJoiner::end_chunk(int64_t start, int64_t length, std::vector<at::Tensor> leaves,
                            const std::vector<std::optional<int64_t>>& dims) {
  auto& joined = state_->leaves;
  const bool first = start == 0;
  if (first) joined.resize(leaves.size());
  if (joined.size() != leaves.size()) {
    transform_error("vmap", "with chunk_size, one chunk returned ", leaves.size(),
                    " tensors, an earlier one ", joined.size(),
                    ". The function must return the same structure for every chunk.");
  }
  for (const auto i : c10::irange(leaves.size())) {
    JoinedLeaf& leaf = joined[i];
    at::Tensor& piece = leaves[i];
    if (first) leaf.dim = dims[i];
    if (!leaf.dim.has_value() || !piece.defined()) {
      if (first) leaf.whole = std::move(piece);
      continue;
    }
    if (first && is_plain(piece)) {
      leaf.whole = at::empty(with_size(piece, *leaf.dim, state_->size), piece.options());
    } else if (!first) {
      check_like_first(leaf, piece);
    }
    if (leaf.whole.defined()) {
      leaf.whole.narrow(*leaf.dim, start, length).copy_(piece);
    } else {
      leaf.pieces.push_back(std::move(piece));
    }
  }
}

std::vector<at::Tensor> ChunkJoiner::join() {
  std::vector<at::Tensor> result;
  for (JoinedLeaf& leaf : state_->leaves) {
    result.push_back(leaf.pieces.empty() ? std::move(leaf.whole) : at::cat(leaf.pieces, *leaf.dim));
    leaf.pieces.clear();
  }
  return result;
}

void OutDimCollector::operator()(const Path& path, const at::Tensor& leaf) const {
  std::optional<int64_t> dim = find_dim(out_dims, path, "out_dims").dim;
  if (dim.has_value() && *dim < 0 && leaf.defined()) *dim += leaf.dim();
  dims.push_back(dim);
}

}  // namespace torchlift::vmap_internal
