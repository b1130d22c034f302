#include "batching/sparse_results.h"

#include <ATen/core/List.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/util/intrusive_ptr.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/lifted_tensor.h"
#include "core/recorder.h"
#include "core/tensor_operators.h"

namespace torchlift {
namespace {

struct Mark {
  c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl> tensor;
  int64_t sparse_dims;
};

// Levels belong to a thread, and so do their tensors.
std::vector<Mark>& marks() {
  static thread_local std::vector<Mark> all;
  return all;
}

const Mark* mark_of(const at::Tensor& t) {
  for (const Mark& mark : marks()) {
    const bool same = mark.tensor._unsafe_get_target() == t.unsafeGetTensorImpl();
    if (same && !mark.tensor.expired()) return &mark;
  }
  return nullptr;
}

void forget_the_dead() {
  auto& all = marks();
  all.erase(std::remove_if(all.begin(), all.end(),
                           [](const Mark& mark) { return mark.tensor.expired(); }),
            all.end());
}

struct RecordedMark {
  c10::weak_intrusive_ptr<c10::StorageImpl> memory;
  int64_t sparse_dims;
};

// The engine's threads see tensors of a trace, too.
struct RecordedMarks {
  std::mutex mutex;
  std::vector<RecordedMark> all;
};

RecordedMarks& recorded_marks() {
  static auto* const marks = new RecordedMarks;
  return *marks;
}

at::Tensor innermost(const at::Tensor& t) {
  at::Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = at::Tensor(impl->value());
  return value;
}

}  // namespace

void mark_sparse(const at::Tensor& t, int64_t sparse_dims) {
  forget_the_dead();
  marks().push_back(
      {c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>(t.getIntrusivePtr()),
       sparse_dims});
}

bool is_marked_sparse(const at::Tensor& t) { return mark_of(t) != nullptr; }

at::Tensor as_marked(at::Tensor batch, const at::Tensor& t, int64_t dim) {
  const Mark* mark = mark_of(t);
  if (mark == nullptr) return batch;
  return batch.to_sparse(mark->sparse_dims + (dim <= mark->sparse_dims ? 1 : 0));
}

void mark_recorded_sparse(const at::Tensor& t, int64_t sparse_dims) {
  RecordedMarks& marks = recorded_marks();
  const std::lock_guard<std::mutex> lock(marks.mutex);
  std::erase_if(marks.all, [](const RecordedMark& mark) { return mark.memory.expired(); });
  marks.all.push_back({innermost(t).storage().getWeakStorageImpl(), sparse_dims});
}

std::optional<int64_t> recorded_sparse_dims(const at::Tensor& t) {
  if (!is_recorded(t)) return std::nullopt;
  RecordedMarks& marks = recorded_marks();
  const std::lock_guard<std::mutex> lock(marks.mutex);
  if (marks.all.empty()) return std::nullopt;
  const at::Tensor plain = innermost(t);
  if (!plain.has_storage()) return std::nullopt;
  const c10::StorageImpl* memory = plain.storage().unsafeGetStorageImpl();
  for (const RecordedMark& mark : marks.all) {
    if (mark.memory._unsafe_get_target() == memory && !mark.memory.expired()) {
      return mark.sparse_dims;
    }
  }
  return std::nullopt;
}

std::optional<int64_t> sparse_dims_of_result(const at::Tensor& t) {
  if (const Mark* mark = mark_of(t)) return mark->sparse_dims;
  return recorded_sparse_dims(t);
}

int64_t& ReadsAsDense::depth() {
  static thread_local int64_t depth = 0;
  return depth;
}

at::Tensor dense_coo(int64_t sparse_dim, c10::SymIntArrayRef size, const at::Tensor& indices,
                     const at::Tensor& values, std::optional<at::ScalarType> dtype) {
  const at::Tensor added = dtype.has_value() ? values.to(*dtype) : values;
  const at::Tensor zeros = added.new_zeros_symint(size);
  if (sparse_dim == 0) return zeros + added.sum(0);
  c10::List<std::optional<at::Tensor>> places;
  for (const at::Tensor& place : indices.unbind(0)) places.push_back(place);
  return zeros.index_put(places, added, /*accumulate=*/true);
}

}  // namespace torchlift
