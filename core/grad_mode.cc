#include "core/grad_mode.h"

#include <ATen/SequenceNumber.h>

#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

uint64_t& noted() {
  static thread_local uint64_t count = 0;
  return count;
}

}  // namespace

void note_nodes() { noted() = at::sequence_number::peek(); }

bool unnoted_nodes() { return at::sequence_number::peek() != noted(); }

bool tracked_outside(const at::Tensor& t) {
  for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (impl->value().requires_grad()) return true;
  }
  return false;
}

void throw_function_hides_outer_gradient(const Level& level) {
  unsupported_error("vmap", "An operator of ", level.describe(),
                    " runs with gradients off on a tensor that a gradient outside of vmap tracks, "
                    "inside an autograd "
                    "Function (or in a no_grad block that follows an operator on plain tensors; "
                    "the two look alike). The "
                    "outer gradient could not see the Function's own backward. Take the gradient "
                    "inside, vmap(grad(f)); or, "
                    "if it is not wanted, use x.detach() first.");
}

}  // namespace torchlift
