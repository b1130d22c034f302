#ifndef TORCHLIFT_CORE_INFERENCE_MODE_H_
#define TORCHLIFT_CORE_INFERENCE_MODE_H_

// File: core/inference_mode.h
//
// NOTE [inference mode]
// What is made in inference mode has no autograd state, and operators go past autograd: a gradient
// taken there would be zero. So the functions that transforms call run outside of it (a vmap's with
// gradients off, as they were), and what they return is an ordinary tensor. Inference tensors can
// be mapped over and differentiated; where a function closes over one that autograd has to save,
// libtorch says so in an error.

#include <c10/core/AutogradState.h>
#include <c10/core/InferenceMode.h>

#include <optional>

namespace torchlift {

// Inference mode is off on this thread while it lives; gradients stay off where it was on.
class InferenceModeOff {
 public:
  InferenceModeOff() {
    if (!c10::InferenceMode::is_enabled()) return;
    off_.emplace(false);
    c10::AutogradState& state = c10::AutogradState::get_tls_state();
    state.set_grad_mode(false);
    state.set_fw_grad_mode(false);
  }
  InferenceModeOff(const InferenceModeOff&) = delete;
  InferenceModeOff& operator=(const InferenceModeOff&) = delete;

 private:
  std::optional<c10::InferenceMode> off_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_INFERENCE_MODE_H_
