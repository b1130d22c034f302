#include "core/level.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/AutogradState.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <utility>

#include "core/error.h"
#include "core/grad_mode.h"
#include "core/inference_mode.h"
#include "core/interpreter.h"
#include "core/keys.h"
#include "core/lifted_tensor.h"
#include "core/random_stream.h"
#include "core/runtime.h"

namespace torchlift {

namespace {

struct ThreadState {
  std::vector<LevelPtr> levels;
  // Random operators belong to levels[0 .. random_limit - 1]; -1 stands for all of them.
  int64_t random_limit = -1;
  DomainLimit domain_limit;
  // Of the levels that were opened in inference mode.
  std::vector<std::pair<const Level*, std::unique_ptr<InferenceModeOff>>> inference_modes;
};

ThreadState& thread_state() {
  static thread_local ThreadState state;
  return state;
}

LevelPtr push_level(Level::Options options) {
  initialize_runtime();
  check_no_torch_func("a torchlift transform");
  if (options.randomness == Randomness::kReproducible && options.stream == nullptr) {
    options.stream = RandomStream::open();
  }
  auto& levels = thread_state().levels;
  auto level =
      c10::make_intrusive<Level>(static_cast<int64_t>(levels.size()) + 1, std::move(options));
  levels.push_back(level);
  note_nodes();
  return level;
}

// Whether random operators may belong to such a level.
bool draws(LevelKind kind) { return kind == LevelKind::kVmap || kind == LevelKind::kRow; }

// Whether the mode key is included: for random operators, and for those that make tensors.
c10::DispatchKeySet mode_keys(LevelKind kind) {
  return draws(kind) || kind == LevelKind::kInterpreted ? c10::DispatchKeySet(kModeKey)
                                                        : c10::DispatchKeySet();
}

constexpr int64_t kNoRule = std::numeric_limits<int64_t>::max();

// For a level that is being opened: none of the rule's levels is a domain in it.
DomainLimit limit_of_rule(int64_t rule, DomainLimit limit) {
  if (rule == kNoRule) return limit;
  const auto around = static_cast<int64_t>(thread_state().levels.size()) - 1;
  return {.depth = limit.open > 0 ? std::min(limit.depth, rule - 1) : rule - 1, .open = around};
}

}  // namespace

Level::Level(int64_t depth, Options options)
    : depth_(depth),
      options_(std::move(options)),
      grad_at_entry_(c10::GradMode::is_enabled()),
      forward_at_entry_(c10::AutogradState::get_tls_state().get_fw_grad_mode()),
      root_(this),
      unusual_(0) {}

Level::Level(LevelPtr base, int64_t size)
    : depth_(base->depth_),
      options_{.kind = base->kind(),
               .size = size,
               .randomness = base->randomness(),
               .interpreter = base->options_.interpreter},
      grad_at_entry_(base->grad_at_entry_),
      forward_at_entry_(base->forward_at_entry_),
      base_(std::move(base)),
      root_(base_->root_),
      unusual_(1) {}

bool Level::narrows(const Level& other) const {
  const Level* level = base();
  while (level != nullptr && level != &other) level = level->base();
  return level != nullptr;
}

const char* Level::transform() const {
  switch (options_.kind) {
    case LevelKind::kTangents:
      return "jacfwd";
    case LevelKind::kJvp:
      return "jvp";
    case LevelKind::kInterpreted:
      return options_.interpreter->transform();
    case LevelKind::kVmap:
    case LevelKind::kRow:
      break;
  }
  return "vmap";
}

std::string Level::describe() const {
  if (kind() == LevelKind::kJvp || kind() == LevelKind::kInterpreted) {
    return c10::str(transform(), " level ", depth_);
  }
  if (base() != nullptr) {
    return c10::str(transform(), " level ", depth_, " (", options_.size, " of its ", root_->size(),
                    " examples)");
  }
  if (kind() == LevelKind::kRow) {
    return c10::str("row ", first_row(), " of random_rows, level ", depth_);
  }
  return c10::str(transform(), " level ", depth_, " (size ", options_.size, ")");
}

LevelScope::LevelScope(Level::Options options)
    : level_(push_level(std::move(options))),
      mode_guard_(mode_keys(level_->kind())),
      rule_depth_(std::exchange(rule_depth(), kNoRule)),
      domain_limit_(thread_state().domain_limit) {
  ThreadState& state = thread_state();
  state.domain_limit = limit_of_rule(rule_depth_, domain_limit_);
  if (c10::InferenceMode::is_enabled()) {
    state.inference_modes.emplace_back(level_.get(), std::make_unique<InferenceModeOff>());
  }
}

void Level::note_shared(c10::intrusive_ptr_target* shared) {
  auto strong = c10::intrusive_ptr<c10::intrusive_ptr_target>::reclaim_copy(shared);
  const std::lock_guard<std::mutex> lock(shared_mutex_);
  if (shared_.size() >= shared_limit_) {
    shared_.erase(
        std::remove_if(shared_.begin(), shared_.end(), [](const auto& t) { return t.expired(); }),
        shared_.end());
    shared_limit_ = 2 * shared_.size() + 64;
  }
  shared_.emplace_back(strong);
}

void Level::settle_shared() {
  for (const auto& weak : shared_) {
    const auto shared = weak.lock();
    if (shared) settle(*static_cast<LiftedTensorImpl*>(shared.get()));
  }
  shared_.clear();
}

LevelScope::~LevelScope() {
  level_->settle_shared();
  rule_depth() = rule_depth_;
  ThreadState& state = thread_state();
  state.domain_limit = domain_limit_;
  if (!state.inference_modes.empty() && state.inference_modes.back().first == level_.get()) {
    state.inference_modes.pop_back();
  }
  level_->alive_.store(false, std::memory_order_relaxed);
  level_->unusual_.fetch_add(1, std::memory_order_relaxed);
  // Scopes are destroyed in the reverse of their order, so ours is the last.
  state.levels.pop_back();
}

Level* current_level() {
  const ThreadState& state = thread_state();
  for (auto level = state.levels.rbegin(); level != state.levels.rend(); ++level) {
    if (is_domain(**level)) return level->get();
  }
  return nullptr;
}

bool is_domain(const Level& level) {
  const DomainLimit limit = thread_state().domain_limit;
  if (level.depth() <= limit.open && level.depth() > limit.depth) return false;
  return level.kind() != LevelKind::kTangents && level.kind() != LevelKind::kRow;
}

DomainLimit exchange_domain_limit(DomainLimit limit) {
  return std::exchange(thread_state().domain_limit, limit);
}

const std::vector<LevelPtr>& level_stack() { return thread_state().levels; }

LevelPtr exchange_level(LevelPtr level) {
  return std::exchange(thread_state().levels[level->depth() - 1], std::move(level));
}

Level* random_level() {
  const ThreadState& state = thread_state();
  const auto open = static_cast<int64_t>(state.levels.size());
  int64_t limit = state.random_limit < 0 || state.random_limit > open ? open : state.random_limit;
  while (limit > 0 && !draws(state.levels[limit - 1]->kind())) --limit;
  return limit == 0 ? nullptr : state.levels[limit - 1].get();
}

int64_t& rule_depth() {
  static thread_local int64_t depth = kNoRule;
  return depth;
}

RandomHandledScope::RandomHandledScope(const Level& handled)
    : within_(handled.depth()),
      saved_(std::exchange(thread_state().random_limit, handled.depth() - 1)) {}

RandomHandledScope::~RandomHandledScope() { thread_state().random_limit = saved_; }

void check_no_torch_func(const char* what) {
  constexpr c10::DispatchKeySet kModes({c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
                                        c10::DispatchKey::FuncTorchDynamicLayerBackMode});
  if (C10_UNLIKELY(c10::impl::tls_local_dispatch_key_set().included_.has_any(kModes))) {
    unsupported_error(
        "torchlift", what,
        " was used inside a transform of torch.func, which gives its tensors a meaning "
        "torchlift cannot see. Use torchlift's vmap, grad, vjp for the whole composition.");
  }
}

}  // namespace torchlift
