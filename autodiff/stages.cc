#include "autodiff/stages.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/AutogradState.h>

#include <algorithm>
#include <map>
#include <utility>

#include "autodiff/forward_mode.h"
#include "core/dispatch.h"
#include "core/grad_mode.h"
#include "core/lifted_tensor.h"
#include "core/narrow.h"

namespace torchlift {
namespace {

using at::Tensor;

bool has_tangent(const Tensor& t) { return t._fw_grad(kDual).defined(); }

// GradMode as the domains around `level` see it, where GradMode is `grad` in the level's own.
bool grad_around(const Level& level, bool grad) {
  const OuterGradMode mode = level.outer_grad_mode();
  return mode == OuterGradMode::kInherit ? grad : mode == OuterGradMode::kOn;
}

bool differentiated(const Tensor& given, bool grad, bool forward) {
  const Tensor* t = &given;
  while (true) {
    if ((grad && t->requires_grad()) || (forward && has_tangent(*t))) return true;
    const LiftedTensorImpl* impl = as_lifted(*t);
    if (impl == nullptr) return false;
    grad = grad_around(impl->level(), grad);
    forward = forward || impl->level().forward_at_entry();
    t = &impl->value();
  }
}

bool forward_mode_on() { return c10::AutogradState::get_tls_state().get_fw_grad_mode(); }

// The deepest level among the tensors, or null.
LevelPtr deepest_level(const TensorList& tensors) {
  LevelFinder finder;
  bool any = false;
  for (const Tensor& t : tensors) {
    if (!t.defined() || !is_lifted(t)) continue;
    finder(t);
    any = true;
  }
  return any ? finder.level() : LevelPtr();
}

// Whether t has a batch dim wherever `like` does.
bool spans(const Tensor& t, const Tensor& like) {
  const LiftedTensorImpl* wanted = as_lifted(like);
  if (wanted == nullptr) return true;
  const LiftedTensorImpl* own = as_lifted(t);
  if (own == nullptr) {
    return !wanted->bdim().has_value() && spans(t, wanted->value());
  }
  if (own->level().depth() > wanted->level().depth()) return spans(own->value(), like);
  if (&own->level() != &wanted->level()) {
    return !wanted->bdim().has_value() && spans(t, wanted->value());
  }
  return own->bdim().has_value() >= wanted->bdim().has_value() &&
         spans(own->value(), wanted->value());
}

}  // namespace

bool is_differentiable(const Tensor& t) {
  return t.defined() && (t.is_floating_point() || t.is_complex());
}

int64_t deepest_of(const TensorList& tensors) {
  int64_t depth = 0;
  for (const Tensor& t : tensors) {
    if (t.defined()) depth = std::max(depth, depth_of(t));
  }
  return depth;
}

std::vector<uint32_t> versions_of(const TensorList& tensors) {
  std::vector<uint32_t> versions;
  for (const Tensor& t : tensors) {
    const bool counted = t.defined() && !t.is_inference();
    versions.push_back(counted ? t.unsafeGetTensorImpl()->version_counter().current_version() : 0);
  }
  return versions;
}

bool Stage::owns(const Tensor& t) const { return t.defined() && depth_of(t) == depth(); }

bool Stage::tracked() const {
  return grad && std::any_of(tensors.begin(), tensors.end(),
                             [this](const Tensor& t) { return owns(t) && t.requires_grad(); });
}

bool Stage::dual() const {
  return forward && std::any_of(tensors.begin(), tensors.end(),
                                [this](const Tensor& t) { return owns(t) && has_tangent(t); });
}

bool Stage::batched() const {
  return std::any_of(bdims.begin(), bdims.end(), [](const auto& bdim) { return bdim.has_value(); });
}

LoweredList lower_all(const TensorList& tensors, const Level& level) {
  LoweredList list;
  for (const Tensor& t : tensors) {
    Lowered lowered = lower(t, level);
    list.values.push_back(std::move(lowered.value));
    list.bdims.push_back(lowered.bdim);
  }
  return list;
}

std::vector<Stage> stages_of(TensorList tensors) {
  std::vector<Stage> stages;
  bool grad = c10::GradMode::is_enabled();
  bool forward = forward_mode_on();
  while (LevelPtr level = deepest_level(tensors)) {
    LoweredList lowered = lower_all(tensors, *level);
    stages.push_back({level, std::move(tensors), std::move(lowered.bdims), grad, forward});
    grad = grad_around(*level, grad);
    forward = forward || level->forward_at_entry();
    tensors = std::move(lowered.values);
  }
  BatchDims none(tensors.size());
  stages.push_back({LevelPtr(), std::move(tensors), std::move(none), grad, forward});
  return stages;
}

TensorList narrowed(TensorList tensors) {
  const LevelPtr level = deepest_level(tensors);
  if (!level) return tensors;
  for (Tensor& t : tensors) {
    if (!t.defined()) continue;
    check_alive(t);
    if (narrows_level_of(*level, t)) t = narrow(t, level);
  }
  return tensors;
}

bool differentiated_anywhere(const TensorList& tensors) {
  const bool grad = c10::GradMode::is_enabled();
  const bool forward = forward_mode_on();
  return std::any_of(tensors.begin(), tensors.end(), [&](const Tensor& t) {
    return t.defined() && differentiated(t, grad, forward);
  });
}

Tensor constant_from(const Tensor& t, int64_t depth) {
  if (!t.defined() || depth_of(t) < depth) return t;
  const bool clean = !t.requires_grad() && !has_tangent(t);
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl == nullptr) {
    if (clean) return t;
    const DerivativeScope derivative;
    return t.detach();
  }
  const Tensor value = constant_from(impl->value(), depth);
  if (clean && value.is_same(impl->value())) return t;
  return lift_alias(value, impl->bdim(), impl->level_ptr());
}

Tensor without_tangent(const Tensor& t, int64_t depth) {
  if (!t.defined() || depth_of(t) != depth || !has_tangent(t)) return t;
  const DerivativeScope derivative;
  return t._fw_primal(kDual);
}

Tensor own_value(const Tensor& value, const TensorList& others) {
  const bool others_too =
      std::any_of(others.begin(), others.end(), [&](const Tensor& t) { return t.is_same(value); });
  if (others_too || value.is_view()) return value.clone();
  const DerivativeScope derivative;
  const Tensor own = value.detach();
  own.unsafeGetTensorImpl()->set_allow_tensor_metadata_change(true);
  return own;
}

Tensor tangent_for(const Tensor& primal, Tensor tangent, const TensorList& others) {
  if (tangent.scalar_type() != primal.scalar_type()) tangent = tangent.to(primal.scalar_type());
  if (!spans(tangent, primal) || depth_of(tangent) < depth_of(primal)) {
    return at::zeros_like(primal).add(tangent);
  }
  const bool others_too = std::any_of(others.begin(), others.end(),
                                      [&](const Tensor& t) { return t.is_same(tangent); });
  return others_too || tangent.is_view() ? tangent.clone() : tangent;
}

OpenLevels::OpenLevels(const TensorList& tensors) {
  std::map<int64_t, LevelPtr> wanted;
  for (const Tensor& t : tensors) {
    if (!t.defined()) continue;
    for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
         impl = as_lifted(impl->value())) {
      wanted.emplace(impl->level().depth(), impl->level_ptr());
    }
  }
  const auto open = static_cast<int64_t>(level_stack().size());
  for (const auto& [depth, level] : wanted) {
    if (depth <= open) continue;
    // A level without a meaning in each place, until the wanted one takes it.
    while (static_cast<int64_t>(level_stack().size()) < depth) {
      opened_.push_back(
          std::make_unique<LevelScope>(Level::Options{.kind = LevelKind::kTangents, .size = 1}));
    }
    exchange_level(level);
  }
}

OpenLevels::~OpenLevels() {
  while (!opened_.empty()) opened_.pop_back();
}

}  // namespace torchlift
