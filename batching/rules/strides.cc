#include "batching/rules/strides.h"

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <utility>
#include <vector>

namespace torchlift {
namespace {

// Where each dim of an example is entered, and how many steps of it are left.
struct Box {
  struct Dim {
    int64_t stride;
    int64_t left;
  };
  std::vector<Dim> dims;  // by falling stride
};

// Makes one dim of two that go through memory as one, as rows do that lie end to end.
void join_rows(Box& box) {
  std::vector<Box::Dim> joined;
  for (const Box::Dim& dim : box.dims) {
    if (!joined.empty() && joined.back().stride == dim.stride * (dim.left + 1)) {
      joined.back() = {dim.stride, (joined.back().left + 1) * (dim.left + 1) - 1};
    } else {
      joined.push_back(dim);
    }
  }
  box.dims = std::move(joined);
}

Box box_of(const Strided& example) {
  Box box;
  for (size_t i = 0; i < example.sizes.size(); ++i) {
    if (example.sizes[i] > 1 && example.strides[i] > 0) {
      box.dims.push_back({example.strides[i], example.sizes[i] - 1});
    }
  }
  std::sort(box.dims.begin(), box.dims.end(),
            [](const Box::Dim& a, const Box::Dim& b) { return a.stride > b.stride; });
  join_rows(box);
  return box;
}

// Moves the start of the box `distance` elements on; false if no dim leads there.
bool enter(Box& box, int64_t distance) {
  if (distance < 0) return false;
  for (Box::Dim& dim : box.dims) {
    const int64_t steps = std::min(dim.left, distance / dim.stride);
    dim.left -= steps;
    distance -= steps * dim.stride;
  }
  return distance == 0;
}

// Goes `size - 1` times `stride` through the box, along one of its dims or, as a diagonal does,
// along several at once. Others may have gone there before (overlapping windows): what counts are
// the steps of all of them together.
bool run(Box& box, int64_t size, int64_t stride) {
  if (size <= 1 || stride == 0) return true;
  const int64_t times = size - 1;
  for (Box::Dim& dim : box.dims) {
    if (stride % dim.stride != 0 || times * (stride / dim.stride) > dim.left) continue;
    dim.left -= times * (stride / dim.stride);
    return true;
  }
  Box rest = box;
  for (Box::Dim& dim : rest.dims) {
    const int64_t steps = std::min(stride / dim.stride, dim.left / times);
    dim.left -= times * steps;
    stride -= steps * dim.stride;
  }
  if (stride != 0) return false;
  box = std::move(rest);
  return true;
}

bool is_box(const Strided& example, const Strided& request) {
  Box box = box_of(example);
  if (!enter(box, request.offset - example.offset)) return false;
  for (size_t i = 0; i < request.sizes.size(); ++i) {
    if (!run(box, request.sizes[i], request.strides[i])) return false;
  }
  return true;
}

// The distance between neighbours of an example that lies on every g-th address of its extent, each
// once, as one does that is dense but for the examples in between; 0 if it does not.
int64_t lattice_of(const Strided& example) {
  const Box box = box_of(example);
  if (box.dims.empty()) return 0;
  const int64_t step = box.dims.back().stride;
  int64_t expected = step;
  for (auto dim = box.dims.rbegin(); dim != box.dims.rend(); ++dim) {
    if (dim->stride != expected) return 0;
    expected *= dim->left + 1;
  }
  return step;
}

// Whether all addresses of the request are elements of an example that is a lattice.
bool is_on_lattice(const Strided& example, const Strided& request) {
  const int64_t step = lattice_of(example), first = request.offset - example.offset;
  if (step == 0 || first < 0 || first % step != 0) return false;
  for (size_t i = 0; i < request.sizes.size(); ++i) {
    if (request.sizes[i] > 1 && request.strides[i] % step != 0) return false;
  }
  return first + extent_of(request.sizes, request.strides) <=
         extent_of(example.sizes, example.strides);
}

}  // namespace

int64_t extent_of(c10::IntArrayRef sizes, c10::IntArrayRef strides) {
  int64_t extent = 1;
  for (size_t i = 0; i < sizes.size(); ++i) {
    if (sizes[i] == 0) return 0;
    extent += (sizes[i] - 1) * strides[i];
  }
  return extent;
}

bool reachable(const Strided& example, const Strided& request, int64_t batch_stride) {
  const int64_t needed = extent_of(request.sizes, request.strides);
  if (needed == 0) return true;
  const int64_t owned = extent_of(example.sizes, example.strides);
  if (owned == 0) return false;
  if (is_box(example, request) || is_on_lattice(example, request)) return true;
  const int64_t first = request.offset;
  const int64_t end = request.offset + needed;
  if (batch_stride != 0 && batch_stride < owned) return false;  // the examples interleave
  if (first >= example.offset && end <= example.offset + owned) return true;
  if (batch_stride == 0) return false;
  const int64_t block = example.offset / batch_stride * batch_stride;
  return first >= block && end <= block + batch_stride;
}

}  // namespace torchlift
