#ifndef TORCHLIFT_CORE_DISPATCH_H_
#define TORCHLIFT_CORE_DISPATCH_H_

// File: core/dispatch.h
//
// How an operator travels: what the front and back kernels, typed (core/plumbing.h) and boxed
// (core/boxed.h), have in common. See NOTE [front and back keys] in core/keys.h.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>

#include "core/grad_mode.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"

namespace torchlift {

// The thread-local dispatch state at a front kernel that went on to autograd. The back kernel, or a
// front kernel met from below autograd, returns to it before it applies the rule: else the values
// would lose their outer graph and outer tangents.
struct Frame {
  c10::impl::LocalDispatchKeySet tls;
  Frame* previous;
};

// The innermost frame of this thread.
Frame*& current_frame();

// Held by a front kernel while autograd works.
class FrameScope {
 public:
  FrameScope() : frame_{c10::impl::tls_local_dispatch_key_set(), current_frame()} {
    current_frame() = &frame_;
  }
  ~FrameScope() {
    current_frame() = frame_.previous;
    note_nodes();
  }
  FrameScope(const FrameScope&) = delete;
  FrameScope& operator=(const FrameScope&) = delete;

 private:
  Frame frame_;
};

// Held by a back kernel while the rule works.
class RestoreScope {
 public:
  RestoreScope() : frame_(current_frame()) {
    if (frame_ == nullptr) return;
    guard_.emplace(frame_->tls);
    current_frame() = frame_->previous;
  }
  ~RestoreScope() {
    if (frame_ != nullptr) current_frame() = frame_;
  }
  RestoreScope(const RestoreScope&) = delete;
  RestoreScope& operator=(const RestoreScope&) = delete;

 private:
  Frame* frame_;
  std::optional<c10::impl::ForceDispatchKeyGuard> guard_;
};

// True at a front kernel that was reached from below an autograd kernel of ours: derivative code
// dispatches afresh there (_fw_primal calls alias, say). It must act as the back does. The test is
// on AutogradFunctionality, since the excluded set holds no backend bits.
inline bool below_autograd() {
  return current_frame() != nullptr && c10::impl::tls_local_dispatch_key_set().excluded_.has(
                                           c10::DispatchKey::AutogradFunctionality);
}

// Whether autograd would record an operator on t: it has a grad_fn or is a leaf that requires grad,
// under GradMode, or has a forward gradient.
inline bool is_tracked(const at::TensorBase& t) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  const c10::AutogradMetaInterface* meta = impl->autograd_meta();
  if (C10_LIKELY(meta == nullptr)) return false;
  return (c10::GradMode::is_enabled() && meta->requires_grad()) ||
         impl->_fw_grad(/*level=*/0, t).defined();
}

// Finds the deepest level among the arguments of an operator.
class LevelFinder {
 public:
  void operator()(const at::TensorBase& t) {
    LiftedTensorImpl* impl = as_lifted(t);
    if (impl == nullptr) return;
    const int64_t depth = impl->level().depth();
    if (deepest_ == nullptr || depth > depth_) {
      deepest_ = impl;
      depth_ = depth;
    } else if (C10_UNLIKELY(depth == depth_ && !impl->level().usual()) &&
               impl->level().narrows(deepest_->level())) {
      deepest_ = impl;
    }
  }

  // Throws when there is none, when it has ended, or when a transform of torch.func is at work. The
  // reference is valid as long as the finder and the argument.
  const LevelPtr& level() const;

 private:
  LiftedTensorImpl* deepest_ = nullptr;
  int64_t depth_ = 0;
  mutable LevelPtr narrowed_;
};

// Whether an argument of `level` is tracked; throws if an argument is of another level as deep (it
// escaped from a level that has ended). At a front kernel, that may also be a level that this one
// narrows: such an argument counts as tracked, so that the autograd path is taken, where it is
// brought to this level as other arguments are hidden.
class TrackedFinder {
 public:
  explicit TrackedFinder(const Level& level, bool at_front = false)
      : level_(level), at_front_(at_front) {}
  void operator()(const at::TensorBase& t) {
    const LiftedTensorImpl* impl = as_lifted(t);
    if (impl == nullptr) return;
    if (&impl->level() == &level_) {
      tracked_ = tracked_ || is_tracked(t);
      batched_ = batched_ || impl->bdim().has_value();
    } else if (C10_UNLIKELY(!impl->level().alive() || impl->level().depth() >= level_.depth())) {
      check_alive(t);
      if (!at_front_ || !level_.narrows(impl->level())) throw_same_depth(impl->level());
      tracked_ = true;
    }
  }
  bool tracked() const { return tracked_; }
  // Whether an argument of the level has a batch dim.
  bool batched() const { return batched_; }

 private:
  [[noreturn]] static void throw_same_depth(const Level& other);

  const Level& level_;
  const bool at_front_;
  bool tracked_ = false;
  bool batched_ = false;
};

// NOTE [hidden arguments]
// On the autograd path of a level, an argument of a lower level or a plain tensor must not take
// part: if it is tracked, autograd would record an edge (or mix a tangent) of another domain; if it
// has further dispatch keys (sparse, meta, a Python subclass), they would be dispatched on before
// our back key. Such an argument is lifted without a batch dim, which gives it no autograd state of
// this domain. (One of a level that this one narrows becomes some of its examples; lift_alias knows
// what to do.)
inline bool needs_hiding(const at::TensorBase& t, const Level& level) {
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  if (impl->key_set().has(kFrontKey)) {
    const Level& own = static_cast<const LiftedTensorImpl*>(impl)->level();
    if (own.depth() == level.depth()) return &own != &level;
  }
  return !kPlainKeys.has_all(impl->key_set()) || is_tracked(t);
}

// Whether a view taken now must be recorded by autograd although nothing is tracked: a later
// in-place write through the view, or into its base, may be.
inline bool records_views() { return c10::GradMode::is_enabled(); }

// Throws: `op` would write values that differ from example to example into a tensor that has no
// batch dim.
[[noreturn]] void throw_write_to_unbatched(const char* op, const at::Tensor& target,
                                           const Level& level);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_DISPATCH_H_
