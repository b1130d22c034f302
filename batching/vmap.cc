#include "batching/vmap.h"

#include "core/error.h"

namespace torchlift::vmap_internal {

Chunks::Options chunk_options(const VmapOptions& options) {
  return {.randomness = options.randomness,
          .chunk_size = options.chunk_size,
          .memory_budget = options.memory_budget};
}

void check_options(const VmapOptions& options) {
  Chunks::check(chunk_options(options));
  if (options.axis_size.has_value() && *options.axis_size < 0) {
    transform_error("vmap", "axis_size is ", *options.axis_size,
                    ", but it is the number of examples. Give 0 or more, or leave it out.");
  }
}

void OutDimCollector::operator()(const Path& path, const at::Tensor& leaf) const {
  std::optional<int64_t> dim = find_dim(out_dims, path, "out_dims").dim;
  if (dim.has_value() && *dim < 0 && leaf.defined()) *dim += leaf.dim();
  dims.push_back(dim);
}

}  // namespace torchlift::vmap_internal
