#ifndef TORCHLIFT_CORE_GRAD_MODE_H_
#define TORCHLIFT_CORE_GRAD_MODE_H_

// File: core/grad_mode.h
//
// NOTE [grad mode of outer domains]
// GradMode is one flag for all domains. That is right while a user's function runs: no_grad inside
// f means "do not differentiate this", at every level. It is wrong in two places, where we
// ourselves change the flag for the sake of one domain:
//  - the backward pass of an inner gradient runs with GradMode off (no second derivative is wanted
//  in
//    *this* domain), while outer domains still have to record what it does to the values;
//  - grad(f) called under no_grad must record f in its own domain, but outer domains must not
//  record.
// So a level carries an override, OuterGradMode, which every rule of that level applies to GradMode
// before it touches values. Being part of the level, it reaches the threads of the autograd engine
// too.

#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/AutogradState.h>

#include "core/level.h"

namespace torchlift {

// GradMode as the domains around `level` must see it now.
inline bool outer_grad_enabled(const Level& level) {
  switch (level.outer_grad_mode()) {
    case OuterGradMode::kOn:
      return true;
    case OuterGradMode::kOff:
      return false;
    case OuterGradMode::kInherit:
      break;
  }
  return c10::GradMode::is_enabled();
}

// NOTE [autograd Functions and outer domains]
// An autograd Function runs its forward with GradMode off, for the sake of the domain it is applied
// in. Under vmap, outer domains would take that for no_grad and lose their gradient, silently. The
// flag does not tell the two apart, but applying a Function makes an autograd node first, and
// entering no_grad does not. So every rule notes how many nodes this thread has made, and an
// operator that runs with GradMode off, on values that an outer domain tracks, after nodes were
// made that no rule has seen, is refused. (A plain tensor's operator just before a no_grad block is
// the one harmless thing refused with it.)

// Notes the nodes made so far on this thread.
void note_nodes();
// Whether nodes were made since.
bool unnoted_nodes();

// Whether an outer domain tracks the value in t.
bool tracked_outside(const at::Tensor& t);

[[noreturn]] void throw_function_hides_outer_gradient(const Level& level);

// NOTE [forward mode of outer domains]
// libtorch turns forward mode off while the forward and the jvp of an autograd Function run, for
// the sake of the domain it is applied in. The tangents of outer domains go on: a rule works on
// values with forward mode as it was when its level was entered.

// Held while a rule of `level` works on values.
class OuterGradScope {
 public:
  explicit OuterGradScope(const Level& level) : at_work_(level.depth()) {
    c10::AutogradState& state = c10::AutogradState::get_tls_state();
    if (C10_UNLIKELY(level.outer_grad_mode() != OuterGradMode::kInherit)) {
      changed_ = true;
      saved_ = state.get_grad_mode();
      state.set_grad_mode(outer_grad_enabled(level));
    }
    if (C10_UNLIKELY(!state.get_fw_grad_mode()) && level.forward_at_entry()) {
      forward_changed_ = true;
      state.set_fw_grad_mode(true);
    }
  }
  ~OuterGradScope() {
    note_nodes();
    if (changed_) c10::GradMode::set_enabled(saved_);
    if (forward_changed_) c10::AutogradState::get_tls_state().set_fw_grad_mode(false);
  }
  OuterGradScope(const OuterGradScope&) = delete;
  OuterGradScope& operator=(const OuterGradScope&) = delete;

  // Whether the arguments must be checked by tracked_outside.
  static bool suspicious(const Level& level) {
    return C10_UNLIKELY(!c10::GradMode::is_enabled()) && level.grad_at_entry() &&
           level.outer_grad_mode() == OuterGradMode::kInherit && unnoted_nodes();
  }

 private:
  const RuleDepthScope at_work_;
  // Not an optional<AutoGradMode>: GCC 12 takes its reset for a read of an uninitialized value.
  bool changed_ = false;
  bool saved_ = false;
  bool forward_changed_ = false;
};

// Sets the override of a level (nothing when level is null: there is no outer domain then).
class OuterGradModeGuard {
 public:
  OuterGradModeGuard(Level* level, OuterGradMode mode) : level_(level) {
    if (level_ != nullptr) {
      saved_ = level_->outer_grad_mode();
      level_->set_outer_grad_mode(mode);
    }
  }
  ~OuterGradModeGuard() {
    if (level_ != nullptr) level_->set_outer_grad_mode(saved_);
  }
  OuterGradModeGuard(const OuterGradModeGuard&) = delete;
  OuterGradModeGuard& operator=(const OuterGradModeGuard&) = delete;

 private:
  Level* level_;
  OuterGradMode saved_ = OuterGradMode::kInherit;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_GRAD_MODE_H_
