#include "autodiff/forward.h"

#include <ATen/ops/zeros_like.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/variable.h>

#include <mutex>
#include <utility>

#include "core/dispatch.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/open_transforms.h"
#include "core/runtime.h"

namespace torchlift {
namespace {

using torch::autograd::ForwardADLevel;

// Scopes that share the level we opened.
struct Shared {
  std::mutex mutex;
  int64_t count = 0;
};

Shared& shared() {
  static auto* state = new Shared();
  return *state;
}

Level::Options level_options(bool isolated, std::optional<int64_t> directions) {
  if (!directions.has_value()) return {.kind = LevelKind::kJvp};
  return {.kind = isolated ? LevelKind::kVmap : LevelKind::kTangents,
          .size = *directions,
          .randomness = Randomness::kSame};
}

// The tangent of t, in t's dtype: some of libtorch's formulas make a wider one (that of frexp for
// bfloat16 is float32).
at::Tensor tangent_of(const at::Tensor& t) {
  const at::Tensor& tangent = t._fw_grad(kDual);
  if (!tangent.defined() || tangent.scalar_type() == t.scalar_type()) return tangent;
  return tangent.is_complex() == t.is_complex() ? tangent.to(t.scalar_type()) : tangent;
}

// Ends the tangent of t (see NOTE [one dual level]: another thread may keep the level open).
void drop_tangent(const at::Tensor& t) {
  auto* meta = torch::autograd::impl::get_autograd_meta(t);
  if (meta == nullptr || meta->fw_grad_ == nullptr || !meta->fw_grad_->contains(kDual)) return;
  meta->fw_grad_->reset(kDual);
}

// t without its graph in this domain.
at::Tensor without_graph(const at::Tensor& t) {
  if (!t.defined() || !t.requires_grad()) return t;
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? t.detach() : lift_alias(impl->value(), impl->bdim(), impl->level_ptr());
}

}  // namespace

DualLevel::DualLevel() {
  const std::lock_guard<std::mutex> lock(shared().mutex);
  if (shared().count == 0) {
    foreign_ = ForwardADLevel::try_get_by_idx(kDual);
    if (foreign_ != nullptr) return;
    ForwardADLevel::get_next_idx();
    first_ = true;
  }
  ++shared().count;
}

DualLevel::~DualLevel() {
  if (foreign_ != nullptr) return;
  // Destroyed after the lock is gone: that ends the life of tangents, and of what they own.
  std::shared_ptr<ForwardADLevel> closed;
  const std::lock_guard<std::mutex> lock(shared().mutex);
  if (--shared().count > 0) return;
  closed = ForwardADLevel::try_get_by_idx(kDual);
  ForwardADLevel::release_idx(kDual);
}

ForwardScope::ForwardScope(std::optional<int64_t> directions)
    : outer_grad_(c10::GradMode::is_enabled()) {
  initialize_runtime();
  check_no_torch_func("a forward-mode transform");
  const bool isolated = !dual_level_.first();
  if (isolated || directions.has_value()) {
    // A tangent is no dual number, nor is what a formula makes of it. So the rules of a level of
    // tangents leave forward mode as they find it (see NOTE [forward mode of outer domains] in
    // core/grad_mode.h): off in the formulas of forward_kernels.cc.
    const Level::Options options = level_options(isolated, directions);
    const at::AutoFwGradMode mode(options.kind != LevelKind::kTangents &&
                                  c10::AutogradState::get_tls_state().get_fw_grad_mode());
    level_scope_.emplace(options);
  }
  domain_ = current_level();
  if (!outer_grad_) outer_guard_.emplace(domain_, OuterGradMode::kOff);
  grad_guard_.emplace(true);
  forward_guard_.emplace(true);
  mode_.emplace();
  if (!level_scope_.has_value()) note_transform_opened("forward mode");  // else the level tells
}

ForwardScope::~ForwardScope() {
  if (mode_.has_value() && !level_scope_.has_value()) note_transform_closed();
  mode_.reset();
  forward_guard_.reset();
  grad_guard_.reset();
  outer_guard_.reset();
}

at::Tensor ForwardScope::in_domain(const at::Tensor& x) const {
  if (domain_ == nullptr || depth_of(x) >= domain_->depth()) return x;
  return lift_alias(x, std::nullopt, LevelPtr::reclaim_copy(domain_));
}

at::Tensor ForwardScope::constant(const at::Tensor& x) {
  check_alive(x);
  return in_domain(x);
}

at::Tensor ForwardScope::dual(const at::Tensor& primal, const at::Tensor& given) {
  check_alive(primal);
  check_alive(given);
  // Formulas of reverse mode save them.
  const at::Tensor x = primal.is_inference() ? primal.clone() : primal;
  const at::Tensor tangent = given.is_inference() ? given.clone() : given;
  at::Tensor lifted_tangent;
  if (level_scope_.has_value() && level_scope_->level()->kind() != LevelKind::kJvp) {
    lifted_tangent = lift(tangent, 0, level_scope_->level());
  } else {
    lifted_tangent = in_domain(tangent);
  }
  at::Tensor dual = in_domain(outer_grad_ ? x : without_graph(x));
  if (dual.is_same(x)) {
    // Another tensor, and no view to forward mode: the tangent is not the base's.
    const DerivativeScope derivative;
    dual = x._fw_primal(kDual);
  }
  if (domain_ != nullptr && (domain_->kind() == LevelKind::kJvp || !level_scope_.has_value())) {
    // Of all the levels that x belongs to: what f writes into x in place is written into it too.
    lifted_tangent = at::zeros_like(dual).add(lifted_tangent);
  }
  dual._set_fw_grad(lifted_tangent, kDual, /*is_inplace_op=*/false);
  return dual;
}

void ForwardScope::check_output(const at::Tensor& output, std::optional<int64_t> bdim) const {
  if (!bdim.has_value()) return;
  transform_error("jacfwd", "the function returned a tensor of shape ", output.sizes(),
                  " that differs from direction to direction: it took a tangent apart. Return "
                  "the value, not the tangent.");
}

std::vector<ForwardOutput> ForwardScope::finish(const std::vector<at::Tensor>& outputs) {
  std::vector<ForwardOutput> results;
  results.reserve(outputs.size());
  const bool own_level = level_scope_.has_value() && domain_ == level_scope_->level().get();
  for (const at::Tensor& output : outputs) {
    if (!output.defined()) {
      results.emplace_back();
      continue;
    }
    check_alive(output);
    const bool foreign = own_level && depth_of(output) != domain_->depth();
    ForwardOutput result{output, foreign ? at::Tensor() : tangent_of(output), std::nullopt};
    if (level_scope_.has_value()) {
      const Level& level = *level_scope_->level();
      Lowered primal = lower(output, level);
      check_output(output, primal.bdim);
      result.primal = std::move(primal.value);
      if (result.tangent.defined()) {
        Lowered tangent = lower(result.tangent, level);
        result.tangent = std::move(tangent.value);
        result.bdim = tangent.bdim;
      }
    }
    results.push_back(std::move(result));
  }
  if (!level_scope_.has_value()) note_transform_closed();
  mode_.reset();
  forward_guard_.reset();
  grad_guard_.reset();
  outer_guard_.reset();
  for (const at::Tensor& output : outputs) {
    if (output.defined() && !own_level) drop_tangent(output);
  }
  if (!outer_grad_) {
    for (ForwardOutput& result : results) {
      result.primal = without_graph(result.primal);
      result.tangent = without_graph(result.tangent);
    }
  }
  return results;
}

}  // namespace torchlift
