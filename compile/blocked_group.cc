#include "compile/blocked_group.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/TensorImpl.h>

#include <algorithm>
#include <utility>

namespace torchlift::compile {
namespace {

int64_t numel(at::IntArrayRef sizes) {
  int64_t all = 1;
  for (const int64_t size : sizes) all *= size;
  return all;
}

std::vector<int64_t> contiguous_strides(at::IntArrayRef sizes) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * sizes[d];
  return strides;
}

// A view of one block of a tensor, which is moved from block to block.
class Window {
 public:
  Window(const BlockedGroup& group, const at::Tensor& whole, std::vector<int64_t> strides,
         bool single)
      : group_(group),
        strides_(std::move(strides)),
        start_(whole.storage_offset()),
        single_(single),
        view_(whole.unsafeGetTensorImpl()->shallow_copy_and_detach(
            c10::VariableVersion(0), /*allow_tensor_metadata_change=*/true)) {
    if (single_) impl().set_sizes_and_strides(at::IntArrayRef{1}, at::IntArrayRef{1}, start_);
  }

  const at::Tensor& view() const { return view_; }

  // outer: the number of the rows before the split dim.
  void move_to(int64_t outer, int64_t begin, int64_t rows) {
    if (single_) return;
    int64_t offset = start_ + begin * strides_[group_.split];
    for (size_t d = group_.split; d-- > 0;) {
      offset += outer % group_.sizes[d] * strides_[d];
      outer /= group_.sizes[d];
    }
    if (rows == rows_) return impl().set_storage_offset(offset);
    rows_ = rows;
    std::vector<int64_t> sizes(group_.sizes.begin() + static_cast<int64_t>(group_.split),
                               group_.sizes.end());
    sizes[0] = rows;
    impl().set_sizes_and_strides(sizes, at::IntArrayRef(strides_).slice(group_.split), offset);
  }

 private:
  c10::TensorImpl& impl() const { return *view_.unsafeGetTensorImpl(); }

  const BlockedGroup& group_;
  std::vector<int64_t> strides_;
  int64_t start_;
  bool single_;
  int64_t rows_ = -1;
  at::Tensor view_;
};

// The views, and their way through the blocks.
class Walk {
 public:
  Walk(const BlockedGroup& group, const Slots& whole, const std::function<void(Slots*)>& body,
       Slots* slots)
      : group_(group),
        body_(body),
        slots_(*slots),
        chunk_(group.chunk * (at::in_parallel_region() ? 1 : at::get_num_threads())) {
    windows_.reserve(group.inputs.size() + group.outputs.size());
    for (const BlockedGroup::Input& input : group.inputs) {
      add(input.id, whole, input.strides, input.single);
    }
    const std::vector<int64_t> dense = contiguous_strides(group.sizes);
    for (const BlockedGroup::Output& output : group.outputs) add(output.id, whole, dense, false);
  }

  // All rows of the split dim. A rest is part of the last block.
  void run(int64_t outer) {
    const int64_t end = group_.sizes[group_.split];
    int64_t begin = 0;
    while (begin < end) {
      const int64_t rows = end - begin < 2 * chunk_ ? end - begin : chunk_;
      for (Window& window : windows_) window.move_to(outer, begin, rows);
      body_(&slots_);
      begin += rows;
    }
  }

 private:
  void add(ValueId id, const Slots& whole, const std::vector<int64_t>& strides, bool single) {
    const at::Tensor tensor = whole[static_cast<size_t>(id)];
    windows_.emplace_back(group_, tensor, strides, single);
    slots_[static_cast<size_t>(id)] = windows_.back().view();
  }

  const BlockedGroup& group_;
  const std::function<void(Slots*)>& body_;
  Slots& slots_;
  int64_t chunk_;
  std::vector<Window> windows_;
};

}  // namespace

void run_blocks(const BlockedGroup& group, const Graph& graph,
                const std::function<void(Slots* slots)>& body, Slots* slots) {
  Slots whole = *slots;
  for (const BlockedGroup::Output& output : group.outputs) {
    at::Tensor& result = whole[static_cast<size_t>(output.id)];
    if (output.over != kNoValue && can_be_written_over(whole[static_cast<size_t>(output.over)])) {
      result = whole[static_cast<size_t>(output.over)];
      continue;
    }
    const TensorType& type = graph.type(output.id);
    result = at::empty_strided(type.concrete_sizes(), type.concrete_strides(),
                               at::TensorOptions(type.dtype).device(type.device));
  }
  const int64_t outer = numel(at::IntArrayRef(group.sizes).slice(0, group.split));
  Walk walk(group, whole, body, slots);
  for (int64_t i = 0; i < outer; ++i) walk.run(i);
  *slots = std::move(whole);
}

}  // namespace torchlift::compile
