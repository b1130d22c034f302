#include "compile/own_copy.h"

#include <ATen/ops/empty_strided.h>

#include "core/lifted_tensor.h"

namespace torchlift::compile {

at::Tensor own_copy(const at::Tensor& t) {
  if (is_lifted(t) || t.layout() != c10::kStrided) return t.clone();
  at::Tensor stored = t;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.stride(d) == 0 && t.size(d) > 1) stored = stored.narrow(d, 0, 1);
  }
  if (stored.is_non_overlapping_and_dense()) return stored.clone().expand(t.sizes());
  at::Tensor copy =
      at::empty_strided(stored.sizes(), stored.strides(), stored.options().requires_grad(false));
  return copy.copy_(stored).expand(t.sizes());
}

}  // namespace torchlift::compile
