#include "core/dispatch.h"

#include "core/error.h"
#include "core/narrow.h"

namespace torchlift {

Frame*& current_frame() {
  static thread_local Frame* frame = nullptr;
  return frame;
}

const LevelPtr& LevelFinder::level() const {
  TORCH_INTERNAL_ASSERT(deepest_ != nullptr, "torchlift: a front kernel met no lifted tensor");
  check_no_torch_func("an operator on a tensor of torchlift's vmap");
  if (C10_LIKELY(deepest_->level().usual())) return deepest_->level_ptr();
  check_alive(at::Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(deepest_)));
  narrowed_ = narrowed_now(deepest_->level_ptr());
  return narrowed_;
}

void TrackedFinder::throw_same_depth(const Level& other) {
  unsupported_error(
      "vmap", "A tensor of ", other.describe(),
      " met a tensor of another level that is as deep: one of them belongs to another "
      "thread, or escaped from its function. Pass it as an argument instead.");
}

void throw_write_to_unbatched(const char* op, const at::Tensor& target, const Level& level) {
  if (level.kind() == LevelKind::kJvp) {
    unsupported_error(
        "jvp", op, " writes a value of ", level.describe(),
        ", which is inside another jvp, into a ", "tensor of shape ", target.sizes(),
        " that does not belong to it, because it was made without looking at an argument, or comes "
        "from outside the function. Use the out-of-place operator, or make the target from an "
        "argument: x.new_zeros(shape) becomes torch.zeros_like(x).");
  }
  const LiftedTensorImpl* impl = as_lifted(target);
  if (impl != nullptr && level.narrows(impl->level())) throw_write_outside(op, target, level);
  if (level.kind() == LevelKind::kInterpreted) {
    unsupported_error(
        level.transform(), op,
        " writes a value that depends on the arguments into a tensor of "
        "shape ",
        target.sizes(),
        " that does not, and comes from outside the function. Use the out-of-place operator, or "
        "make the target in the function.");
  }
  unsupported_error(
      "vmap", op, " writes values that differ between examples (of ", level.describe(),
      ") into a tensor of shape ", target.sizes(),
      " that has no batch dimension, because it was made without looking at a batched tensor, or "
      "comes "
      "from outside the function. Use the out-of-place operator, or make the target from a batched "
      "tensor: x.new_zeros(shape) becomes torch.zeros_like(x), or pass it to vmap with in_dims=0.");
}

}  // namespace torchlift
