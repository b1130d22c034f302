#include "nn_functional/functional_call.h"

#include <algorithm>
#include <string>

#include "core/error.h"

namespace torchlift::functional_internal {
namespace {

void check_names(const StateSlots& slots, const ReturnBuffers& wanted) {
  for (const auto& [name, mode] : wanted.modes) {
    const ReturnBuffers only{.modes = {{name, BufferMode::kFrozen}}};
    bool fits = false;
    for (const std::string& buffer : slots.buffer_names()) {
      fits = fits || only.mode_of(buffer) == BufferMode::kFrozen;
    }
    if (fits) continue;
    transform_error("functional_call", "ReturnBuffers names '", name, "', but ",
                    slots.module_name(),
                    " has no buffer of that name and no module of that name with buffers.");
  }
}

}  // namespace

BufferCopies::BufferCopies(const StateSlots& slots, const States& states,
                           const ReturnBuffers& wanted)
    : wanted_(wanted), substitutions_(slots.bind(states)) {
  check_names(slots, wanted);
  const std::vector<std::string> names = slots.buffer_names();
  const std::vector<at::Tensor> own = slots.buffers();
  for (size_t i = 0; i < own.size(); ++i) {
    const auto bound = std::find_if(substitutions_.begin(), substitutions_.end(),
                                    [&](const Substitution& s) { return s.own.is_same(own[i]); });
    const at::Tensor given = bound == substitutions_.end() ? own[i] : bound->value;
    buffers_.push_back({names[i], given, copy_per_row(given)});
    if (bound == substitutions_.end()) {
      substitutions_.push_back({own[i], buffers_.back().copy});
    } else {
      bound->value = buffers_.back().copy;
    }
  }
}

ModuleState BufferCopies::results() const {
  ModuleState found;
  for (const Buffer& buffer : buffers_) {
    switch (wanted_.mode_of(buffer.name)) {
      case BufferMode::kPerRow:
        found.emplace(buffer.name, buffer.copy);
        break;
      case BufferMode::kShared:
        found.emplace(buffer.name, share_over_rows(buffer.copy));
        break;
      case BufferMode::kFrozen:
        found.emplace(buffer.name, buffer.given);
        break;
    }
  }
  return found;
}

}  // namespace torchlift::functional_internal
