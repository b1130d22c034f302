#ifndef TORCHLIFT_AUTODIFF_INTERPRETED_ARGUMENTS_H_
#define TORCHLIFT_AUTODIFF_INTERPRETED_ARGUMENTS_H_

// File: autodiff/interpreted_arguments.h
//
// Functions with rules of their own, for derivatives or batches, know nothing of levels whose batch
// dim holds parts of a value (core/interpreter.h): without their rule a custom derivative would be
// ignored without a word, and with it the parts would be taken for examples.

#include <ATen/core/Tensor.h>

#include <string_view>

#include "core/error.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/recorder.h"

namespace torchlift {

// The level at which t, or a value in it, has a batch dim of parts; or null. (A recording level
// has one part, which is the value.)
inline const Level* interpreted_level(const at::Tensor& t) {
  if (!t.defined()) return nullptr;
  for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
       impl = as_lifted(impl->value())) {
    const Level& level = impl->level();
    if (level.kind() != LevelKind::kInterpreted || recorder_of(level) != nullptr) continue;
    if (impl->bdim()) return &level;
  }
  return nullptr;
}

// What else can be done there.
inline const char* advice_at(const Level& level) {
  if (std::string_view(level.transform()) != "sparsity") return "";
  return " Or give the pattern yourself: coloring(pattern) takes any that contains the nonzeros.";
}

// what: "custom_jvp".
inline void check_not_interpreted(const char* what, const at::Tensor& t) {
  const Level* level = interpreted_level(t);
  if (level == nullptr) return;
  unsupported_error(level->transform(), what,
                    ": a function with a rule of its own was called on a tensor that ",
                    level->transform(),
                    " follows, and its rule does not say what to do there. Call the operators that "
                    "it is made of; or, where a constant is meant, use torchlift.stop_gradient on "
                    "its argument.",
                    advice_at(*level));
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_INTERPRETED_ARGUMENTS_H_
