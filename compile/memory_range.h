#ifndef TORCHLIFT_COMPILE_MEMORY_RANGE_H_
#define TORCHLIFT_COMPILE_MEMORY_RANGE_H_

// File: compile/memory_range.h
//
// Where the numbers of tensors lie: two storages may be of the same memory, as two that
// torch.from_numpy made of one array are.

#include <ATen/core/Tensor.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/impl/COW.h>

#include <cstdint>

namespace torchlift::compile {

// Bytes [begin, end). Empty where nothing is known to lie (no storage, the meta device).
struct MemoryRange {
  uintptr_t begin = 0;
  uintptr_t end = 0;

  bool empty() const { return begin == end; }
  bool overlaps(const MemoryRange& other) const {
    return begin < other.end && other.begin < end && !empty() && !other.empty();
  }
  bool operator==(const MemoryRange&) const = default;
};

// All of the storage's memory.
inline MemoryRange memory_range(c10::StorageImpl& storage) {
  const auto begin = reinterpret_cast<uintptr_t>(storage._mutable_data_ptr_no_checks().get());
  return begin == 0 ? MemoryRange() : MemoryRange{begin, begin + storage.nbytes()};
}

inline MemoryRange memory_range(const at::Tensor& t) {
  return t.has_storage() ? memory_range(*t.storage().unsafeGetStorageImpl()) : MemoryRange();
}

// Lazy clones lie where what they are of does, until one is written.
inline bool is_lazy_clone(c10::StorageImpl& storage) {
  return c10::impl::cow::is_cow_data_ptr(storage._mutable_data_ptr_no_checks());
}

// Whether what is written into one may be seen in the other.
inline bool may_share_memory(const at::Tensor& a, const at::Tensor& b) {
  if (!a.has_storage() || !b.has_storage()) return false;
  c10::StorageImpl* const memory = a.storage().unsafeGetStorageImpl();
  return memory == b.storage().unsafeGetStorageImpl() ||
         (!is_lazy_clone(*memory) && memory_range(a).overlaps(memory_range(b)));
}

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_MEMORY_RANGE_H_
