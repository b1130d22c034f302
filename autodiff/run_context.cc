#include "autodiff/run_context.h"

#include <ATen/autocast_mode.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/forward_grad.h>

#include <algorithm>

#include "autodiff/forward_mode.h"
#include "autodiff/reverse_formulas.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;

constexpr c10::DeviceType kAutocastDevices[] = {c10::kCPU, c10::kCUDA};

// Whoever watches operators from Python now is not the one who did then.
constexpr DispatchKeySet kPythonKeys({DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                                      DispatchKey::PreDispatch, DispatchKey::PythonDispatcher});

DispatchKeySet with_python_of(DispatchKeySet keys, DispatchKeySet now) {
  return (keys - kPythonKeys) | (now & kPythonKeys);
}

// A level that means the same as one that has ended.
LevelPtr level_like(const Level& level) {
  const c10::AutoGradMode grad(level.grad_at_entry());
  const at::AutoFwGradMode forward(level.forward_at_entry());
  return c10::make_intrusive<Level>(level.depth(), Level::Options{.kind = level.kind(),
                                                                  .size = level.size(),
                                                                  .randomness = level.randomness(),
                                                                  .stream = level.stream(),
                                                                  .first_row = level.first_row()});
}

// One that has no meaning, to stand in a place of the stack.
Level::Options nothing() { return {.kind = LevelKind::kTangents, .size = 1}; }

}  // namespace

RunContext::RunContext()
    : domain_limit_(exchange_domain_limit({})),
      keys_(c10::impl::tls_local_dispatch_key_set()),
      grad_mode_(c10::AutogradState::get_tls_state().get_grad_mode()),
      forward_grad_mode_(c10::AutogradState::get_tls_state().get_fw_grad_mode()),
      forward_(forward_mode_open()),
      reverse_formulas_(reverse_formulas_open()) {
  exchange_domain_limit(domain_limit_);
  for (const LevelPtr& level : level_stack()) {
    levels_.push_back({level, level->outer_grad_mode()});
  }
  if (forward_) dual_level_ = torch::autograd::ForwardADLevel::try_get_by_idx(kDual);
  for (const c10::DeviceType device : kAutocastDevices) {
    autocast_dtypes_.emplace_back(device, at::autocast::get_autocast_dtype(device));
  }
}

bool RunContext::narrowed() const {
  return std::any_of(levels_.begin(), levels_.end(),
                     [](const Open& open) { return open.level->base() != nullptr; });
}

bool RunContext::same_forward_mode() const {
  if (!forward_) return true;
  const auto dual_level = dual_level_.lock();
  if (!forward_mode_open() || dual_level == nullptr ||
      dual_level != torch::autograd::ForwardADLevel::try_get_by_idx(kDual)) {
    return false;
  }
  return std::all_of(levels_.begin(), levels_.end(), [](const Open& open) {
    const LevelKind kind = open.level->kind();
    return open.level->alive() || (kind != LevelKind::kJvp && kind != LevelKind::kTangents);
  });
}

ContextScope::ContextScope(const RunContext& context)
    : reverse_formulas_(context.reverse_formulas_) {
  open_levels(context);
  if (reverse_formulas_) open_reverse_formulas();
  domain_limit_ = exchange_domain_limit(context.domain_limit_);
  c10::AutogradState& state = c10::AutogradState::get_tls_state();
  grad_mode_ = state.get_grad_mode();
  forward_grad_mode_ = state.get_fw_grad_mode();
  state.set_grad_mode(context.grad_mode_);
  state.set_fw_grad_mode(context.forward_grad_mode_);
  for (const auto& [device, dtype] : context.autocast_dtypes_) {
    autocast_dtypes_.emplace_back(device, at::autocast::get_autocast_dtype(device));
    at::autocast::set_autocast_dtype(device, dtype);
  }
  const auto now = c10::impl::tls_local_dispatch_key_set();
  DispatchKeySet included = with_python_of(context.keys_.included_, now.included_);
  // Of a jvp that has ended, and had nothing to do with the function.
  if (!now.included_.has(kForwardKey)) included = included - DispatchKeySet(kForwardKey);
  keys_.emplace(included, with_python_of(context.keys_.excluded_, now.excluded_));
}

ContextScope::~ContextScope() {
  keys_.reset();
  if (reverse_formulas_) close_reverse_formulas();
  for (const auto& [device, dtype] : autocast_dtypes_) {
    at::autocast::set_autocast_dtype(device, dtype);
  }
  c10::AutogradState& state = c10::AutogradState::get_tls_state();
  state.set_grad_mode(grad_mode_);
  state.set_fw_grad_mode(forward_grad_mode_);
  exchange_domain_limit(domain_limit_);
  for (const auto& [level, mode] : outer_grad_) level->set_outer_grad_mode(mode);
  while (!replaced_.empty()) {
    exchange_level(std::move(replaced_.back()));
    replaced_.pop_back();
  }
  while (!pushed_.empty()) pushed_.pop_back();
}

void ContextScope::open_levels(const RunContext& context) {
  while (level_stack().size() < context.levels_.size()) {
    pushed_.push_back(std::make_unique<LevelScope>(nothing()));
  }
  for (const RunContext::Open& open : context.levels_) {
    LevelPtr level = open.level;
    if (!level->alive()) {
      level = level_like(*open.level);
      again_.emplace_back(open.level, level);
    }
    outer_grad_.emplace_back(level, level->outer_grad_mode());
    level->set_outer_grad_mode(open.outer_grad);
    put(std::move(level));
  }
  const auto open = static_cast<int64_t>(level_stack().size());
  for (auto depth = static_cast<int64_t>(context.levels_.size()) + 1; depth <= open; ++depth) {
    put(c10::make_intrusive<Level>(depth, nothing()));
  }
}

void ContextScope::put(LevelPtr level) { replaced_.push_back(exchange_level(std::move(level))); }

at::Tensor ContextScope::enter(const at::Tensor& t) const {
  if (again_.empty() || !t.defined()) return t;
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl == nullptr) return t;
  for (const auto& [ended, again] : again_) {
    if (ended.get() != &impl->level()) continue;
    at::Tensor entered = lift_alias(enter(impl->value()), impl->bdim(), again);
    // Nobody differentiates there any more, but libtorch may compute in another way.
    if (t.requires_grad()) entered.set_requires_grad(true);
    return entered;
  }
  return t;
}

NoAutocastCache::NoAutocastCache() : saved_(at::autocast::is_autocast_cache_enabled()) {
  at::autocast::set_autocast_cache_enabled(false);
}

NoAutocastCache::~NoAutocastCache() { at::autocast::set_autocast_cache_enabled(saved_); }

}  // namespace torchlift
