#include "autodiff/cotangents.h"

#include <c10/util/SmallVector.h>

#include "core/interpreter.h"
#include "core/lifted_tensor.h"

namespace torchlift {

at::Tensor batched_like(const at::Tensor& cotangent, const at::Tensor& output) {
  const LiftedTensorImpl* impl = as_lifted(output);
  if (impl == nullptr) return cotangent;
  const LiftedTensorImpl* own = as_lifted(cotangent);
  if (own != nullptr && own->level().depth() > impl->level().depth()) {
    // A batch of cotangents: each is one of the output's domain.
    return lift(batched_like(own->value(), output), own->bdim(), own->level_ptr());
  }
  auto [value, bdim] = lower(cotangent, impl->level());
  const Interpreter* interpreter = impl->level().interpreter();
  if (impl->bdim() && !bdim && interpreter != nullptr) {
    value = interpreter->spread(value, impl->level().size());
    bdim = 0;
  } else if (impl->bdim() && !bdim) {
    c10::SmallVector<int64_t, 8> sizes{impl->level().size()};
    sizes.append(value.sizes().begin(), value.sizes().end());
    value = value.expand(sizes);
    bdim = 0;
  }
  return lift(batched_like(value, impl->value()), bdim, impl->level_ptr());
}

}  // namespace torchlift
