#include "compile/own_copy.h"

#include <cstdint>

#include "core/lifted_tensor.h"

namespace torchlift::compile {

at::Tensor own_copy(const at::Tensor& t) {
  if (is_lifted(t) || t.layout() != c10::kStrided) return t.clone();
  if (t.is_non_overlapping_and_dense()) return t.clone();
  int64_t extent = t.numel() == 0 ? 0 : 1;
  for (int64_t dim = 0; dim < t.dim() && extent > 0; ++dim) {
    extent += (t.size(dim) - 1) * t.stride(dim);
  }
  const at::Tensor memory = t.as_strided({extent}, {1}, t.storage_offset()).clone();
  return memory.as_strided(t.sizes(), t.strides(), 0);
}

}  // namespace torchlift::compile
