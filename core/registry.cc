#include "core/registry.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>

#include <memory>
#include <mutex>
#include <unordered_set>
#include <utility>

#include "core/boxed.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/interpreter.h"
#include "core/promotion.h"

namespace torchlift {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::KernelFunction;
using c10::OperatorHandle;
using c10::OperatorName;
using torch::jit::Stack;

constexpr const char* kDebugName = "torchlift";

std::vector<RuleEntry>& mutable_rules() {
  static auto* rules = new std::vector<RuleEntry>();
  return *rules;
}

BoxedRule& fallback_rule() {
  static BoxedRule rule = nullptr;
  return rule;
}

RandomRule& random_rule() {
  static RandomRule rule = nullptr;
  return rule;
}

// Registrations live as long as the process: libtorch's tables are torn down after us at exit.
std::vector<c10::RegistrationHandleRAII>& handles() {
  static auto* all = new std::vector<c10::RegistrationHandleRAII>();
  return *all;
}

void for_each_argument_tensor(const OperatorHandle& op, Stack* stack,
                              const std::function<void(const at::Tensor&)>& f) {
  for (const c10::IValue& arg : torch::jit::last(*stack, op.schema().arguments().size())) {
    for_each_tensor(arg, f);
  }
}

struct Site {
  LevelPtr level;
  bool tracked;
  bool batched;
};

Site inspect(const OperatorHandle& op, Stack* stack, bool at_front) {
  LevelFinder finder;
  for_each_argument_tensor(op, stack, [&](const at::Tensor& t) { finder(t); });
  const LevelPtr& level = finder.level();
  TrackedFinder found(*level, at_front);
  for_each_argument_tensor(op, stack, [&](const at::Tensor& t) { found(t); });
  return {level, found.tracked(), found.batched()};
}

// See NOTE [nested and quantized tensors] in core/lifted_tensor.cc: no rule knows one, nor does a
// loop, which would hand the same nested tensor to every example of another shape.
void check_none_nested(const OperatorHandle& op, const Level& level, Stack* stack) {
  for_each_argument_tensor(op, stack, [&](const at::Tensor& t) {
    if (C10_LIKELY(!t.is_nested())) return;
    unsupported_error(level.transform(), toString(op.operator_name()),
                      " has a nested tensor among its arguments and one that differs between the "
                      "examples of ",
                      level.describe(),
                      ". Use to_padded_tensor() on the nested one, or work on its unbind().");
  });
}

void apply(const OperatorHandle& op, BoxedRule rule, const Site& site, Stack* stack) {
  if (OuterGradScope::suspicious(*site.level)) {
    for_each_argument_tensor(op, stack, [&](const at::Tensor& t) {
      if (tracked_outside(t)) throw_function_hides_outer_gradient(*site.level);
    });
  }
  const OuterGradScope outer_grad(*site.level);
  if (!site.batched) return apply_unbatched(op, site.level, stack);
  check_none_nested(op, *site.level, stack);
  if (C10_UNLIKELY(site.level->interpreter() != nullptr) && interpret(op, site.level, stack)) {
    return;
  }
  if (rule == nullptr) {
    unsupported_error("vmap", "torchlift has no batching rule for ", toString(op.operator_name()),
                      ", and no fallback is installed: link //batching:fallback.");
  }
  rule(op, site.level, stack);
}

void hide_arguments(const OperatorHandle& op, const LevelPtr& level, Stack* stack) {
  const size_t count = op.schema().arguments().size();
  for (size_t i = 0; i < count; ++i) {
    c10::IValue& arg = (*stack)[stack->size() - count + i];
    if (writes_argument(op, i)) {
      for_each_tensor(arg, [&](const at::Tensor& t) {
        const auto* impl = as_lifted(t);
        if (impl != nullptr && &impl->level() == level.get()) return;
        throw_write_to_unbatched(op.schema().name().c_str(), t, *level);
      });
      continue;
    }
    bool found = false;
    for_each_tensor(arg, [&](const at::Tensor& t) { found = found || needs_hiding(t, *level); });
    if (!found) continue;
    arg = map_tensors(arg, [&](const at::Tensor& t) {
      return needs_hiding(t, *level) ? lift_alias(t, std::nullopt, level) : t;
    });
  }
}

void register_kernel(const OperatorName& name, DispatchKey key, KernelFunction kernel,
                     std::optional<c10::impl::CppSignature> signature) {
  handles().push_back(
      c10::Dispatcher::singleton().registerImpl(name, key, std::move(kernel), signature,
                                                /*inferred_function_schema=*/nullptr, kDebugName));
}

void back_boxed(const OperatorHandle& op, BoxedRule rule, Stack* stack) {
  RestoreScope restore;
  apply(op, rule, inspect(op, stack, /*at_front=*/false), stack);
}

void back_fallback(const OperatorHandle& op, Stack* stack) {
  back_boxed(op, fallback_rule(), stack);
}

// Operators defined after start-up (torch.library, say) get their back kernel when first needed.
void ensure_back_kernel(const OperatorHandle& op) {
  if (C10_LIKELY(op.hasKernelForDispatchKey(kBackKey))) return;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (op.hasKernelForDispatchKey(kBackKey)) return;
  register_kernel(op.operator_name(), kBackKey,
                  KernelFunction::makeFromBoxedFunction<&back_fallback>(), std::nullopt);
}

bool has_view_result(const OperatorHandle& op) {
  for (const auto& result : op.schema().returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;
  }
  return false;
}

void front_boxed(const OperatorHandle& op, BoxedRule rule, DispatchKeySet keys, Stack* stack) {
  if (below_autograd()) return back_boxed(op, rule, stack);
  const Site site = inspect(op, stack, /*at_front=*/true);
  const bool record = site.tracked || keys.has_any(c10::autocast_dispatch_keyset) ||
                      (records_views() && has_view_result(op));
  if (!record) return apply(op, rule, site, stack);
  ensure_back_kernel(op);
  hide_arguments(op, site.level, stack);
  FrameScope frame;
  op.redispatchBoxed(keys & kRecordKeys, stack);
}

// The front kernel of every operator without a row. One that libtorch makes of others is
// decomposed, after autocast has had its say.
void front_fallback(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  if (op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
    if (C10_UNLIKELY(keys.has_any(c10::autocast_dispatch_keyset))) {
      op.redispatchBoxed(keys & kRecordKeys, stack);
      return;
    }
    op.callBoxedForDispatchKey(DispatchKey::CompositeImplicitAutograd, *stack);
    return;
  }
  front_boxed(op, fallback_rule(), keys, stack);
}

// Autograd's kernel of operators that have none of their own: those that others define without a
// derivative formula. The values would lose their gradients in the level's domain without a word.
void autograd_fallback(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const Site site = inspect(op, stack, /*at_front=*/true);
  if (site.tracked) {
    unsupported_error(
        site.level->transform(), toString(op.operator_name()),
        " has no derivative formula, but was called on a tensor that autograd tracks inside of ",
        site.level->describe(),
        ". Give the operator one (torch.library.register_autograd; in C++ an Autograd kernel), or "
        "pass it x.detach() where no gradient is meant.");
  }
  op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

class BoxedFront final : public c10::OperatorKernel {
 public:
  explicit BoxedFront(BoxedRule rule) : rule_(rule) {}
  void operator()(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    front_boxed(op, rule_, keys, stack);
  }

 private:
  BoxedRule rule_;
};

class BoxedBack final : public c10::OperatorKernel {
 public:
  explicit BoxedBack(BoxedRule rule) : rule_(rule) {}
  void operator()(const OperatorHandle& op, DispatchKeySet /*keys*/, Stack* stack) {
    back_boxed(op, rule_, stack);
  }

 private:
  BoxedRule rule_;
};

void install(const RuleEntry& entry) {
  const OperatorName name(entry.name, entry.overload);
  static auto* given = new std::unordered_set<std::string>();
  if (!given->insert(toString(name)).second) {
    unsupported_error("torchlift", "two rules were given for ", toString(name), ".");
  }
  // Operators of Python are defined when their module is imported, maybe later.
  const bool own = entry.name.rfind("aten::", 0) == 0;
  if (own && !c10::Dispatcher::singleton().findSchema(name).has_value()) {
    unsupported_error("torchlift", "a rule was given for ", toString(name),
                      ", an operator that this libtorch does not have.");
  }
  if (entry.source == RuleEntry::Source::kBoxedRule) {
    register_kernel(name, kFrontKey,
                    KernelFunction::makeFromBoxedFunctor(std::make_unique<BoxedFront>(entry.boxed)),
                    std::nullopt);
    register_kernel(name, kBackKey,
                    KernelFunction::makeFromBoxedFunctor(std::make_unique<BoxedBack>(entry.boxed)),
                    std::nullopt);
    return;
  }
  register_kernel(name, kFrontKey, entry.make_front(), entry.signature);
  if (entry.make_back != nullptr) {
    register_kernel(name, kBackKey, entry.make_back(), entry.signature);
  }
}

// NOTE [a back kernel for every operator]
// libtorch's CompositeExplicitAutograd kernels come before a backend's fallback, and many of them
// allocate a plain buffer and write into it. So every operator that reaches a backend gets a back
// kernel of its own.
void install_back_kernels() {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op.has_value() || !op->hasSchema() || op->hasKernelForDispatchKey(kBackKey) ||
        op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd)) {
      continue;
    }
    register_kernel(name, kBackKey, KernelFunction::makeFromBoxedFunction<&back_fallback>(),
                    std::nullopt);
  }
}

void random_boxed(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  random_rule()(op, keys, stack);
}

// Operators made of others that fill a mask like their input, which all examples would share where
// they share the input: the rule sees to it that they do not.
bool fills_mask(const OperatorName& name) {
  return name.overload_name.empty() &&
         (name.name == "aten::dropout" || name.name == "aten::feature_dropout" ||
          name.name == "aten::alpha_dropout" || name.name == "aten::feature_alpha_dropout");
}

void install_random_kernels() {
  if (random_rule() == nullptr) return;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const OperatorName& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findOp(name);
    if (!op.has_value() || !op->hasSchema() || !op->hasTag(at::Tag::nondeterministic_seeded) ||
        (op->hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) &&
         !fills_mask(name))) {
      continue;
    }
    register_kernel(name, kModeKey, KernelFunction::makeFromBoxedFunction<&random_boxed>(),
                    std::nullopt);
  }
}

}  // namespace

RuleEntry boxed_rule(std::string name, std::string overload, BoxedRule rule) {
  return {.name = std::move(name),
          .overload = std::move(overload),
          .source = RuleEntry::Source::kBoxedRule,
          .signature = std::nullopt,
          .boxed = rule};
}

RuleSet::RuleSet(std::initializer_list<RuleEntry> entries)
    : RuleSet(std::vector<RuleEntry>(entries)) {}

RuleSet::RuleSet(std::vector<RuleEntry> entries) {
  auto& rules = mutable_rules();
  for (RuleEntry& entry : entries) rules.push_back(std::move(entry));
}

const std::vector<RuleEntry>& announced_rules() { return mutable_rules(); }

bool has_rule(const std::string& name, const std::string& overload) {
  static const auto* names = [] {
    auto* set = new std::unordered_set<std::string>();
    for (const RuleEntry& entry : announced_rules()) set->insert(entry.name + "." + entry.overload);
    return set;
  }();
  return names->count(name + "." + overload) > 0;
}

void set_fallback_rule(BoxedRule rule) { fallback_rule() = rule; }

void set_random_rule(RandomRule rule) { random_rule() = rule; }

void install_rules() {
  auto& dispatcher = c10::Dispatcher::singleton();
  handles().push_back(
      dispatcher.registerFallback(kModeKey, KernelFunction::makeFallthrough(), kDebugName));
  handles().push_back(dispatcher.registerFallback(
      kFrontKey, KernelFunction::makeFromBoxedFunction<&front_fallback>(), kDebugName));
  handles().push_back(dispatcher.registerFallback(
      DispatchKey::AutogradPrivateUse3, KernelFunction::makeFromBoxedFunction<&autograd_fallback>(),
      kDebugName));
  for (const RuleEntry& entry : announced_rules()) install(entry);
  install_back_kernels();
  install_random_kernels();
  install_factory_kernels();
}

}  // namespace torchlift
