#ifndef TORCHLIFT_CORE_REGISTRY_H_
#define TORCHLIFT_CORE_REGISTRY_H_

// File: core/registry.h
//
// The table of rules. Every rule file holds one RuleSet, a static table of what each operator does:
//
//   const RuleSet kRules{
//       rule<at::_ops::sin, &unary<at::_ops::sin>>(),
//       rule<at::_ops::t, &t_rule, OpKind::kView>(),
//       composite<at::_ops::linear, &at::compositeimplicitautograd::linear>(),
//       boxed_rule("aten::_foreach_add", "List", &foreach_rule),
//   };
//
// The sets are handed to libtorch's dispatcher once, by initialize_runtime().

#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/dispatch/CppSignature.h>
#include <ATen/core/dispatch/OperatorOptions.h>
#include <ATen/core/stack.h>
#include <c10/util/FunctionRef.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <vector>

#include "core/level.h"
#include "core/plumbing.h"

namespace c10 {
class OperatorHandle;
}

namespace torchlift {

// A rule on the dispatcher's stack, for many operators at once or one known only by name. The
// arguments are on the stack as the level sees them; the rule lowers them (core/boxed.h), replaces
// them by the results, lifted. `level` is the deepest among the arguments, at least one of which
// has a batch dim there.
using BoxedRule = void (*)(const c10::OperatorHandle& op, const LevelPtr& level,
                           torch::jit::Stack* stack);

// One row of a rule table.
struct RuleEntry {
  enum class Source : uint8_t { kRule, kBoxedRule, kComposite };

  std::string name;      // "aten::mul"
  std::string overload;  // "Tensor"
  Source source;
  // Made when the row is installed. A typed row carries its C++ signature, so that the dispatcher
  // checks it.
  c10::KernelFunction (*make_front)() = nullptr;
  c10::KernelFunction (*make_back)() = nullptr;
  std::optional<c10::impl::CppSignature> signature;
  BoxedRule boxed = nullptr;
};

// A typed rule. See core/plumbing.h for what a rule takes and returns.
template <class Op, auto Rule, OpKind Kind = kDefaultKind<typename Op::schema>>
RuleEntry rule() {
  using K = Kernel<Op, Rule, Kind>;
  return {
      .name = Op::name,
      .overload = Op::overload_name,
      .source = RuleEntry::Source::kRule,
      .make_front = [] { return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(K::front)); },
      .make_back = [] { return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(K::back)); },
      .signature = c10::impl::CppSignature::make<typename Op::schema>()};
}

// The front kernel of an operator made of others.
template <class Op, auto Function, class Schema = typename Op::schema>
struct CompositeKernel;
template <class Op, auto Function, class R, class... A>
struct CompositeKernel<Op, Function, R(A...)> {
  static R front(c10::DispatchKeySet keys, A... args) {
    // Autocast decides on the operator the user wrote, and calls it again.
    if (C10_UNLIKELY(keys.has_any(c10::autocast_dispatch_keyset))) {
      return Op::redispatch(keys & kRecordKeys, args...);
    }
    return Function(args...);
  }
};

// An operator made of others (CompositeImplicitAutograd): `Function` runs instead of the front
// kernel, with no boxing on the way. Operators without a row are decomposed too, only more slowly.
template <class Op, auto Function>
RuleEntry composite() {
  using K = CompositeKernel<Op, Function>;
  return {
      .name = Op::name,
      .overload = Op::overload_name,
      .source = RuleEntry::Source::kComposite,
      .make_front = [] { return c10::KernelFunction::makeFromUnboxedFunction(TORCH_FN(K::front)); },
      .signature = c10::impl::CppSignature::make<typename Op::schema>()};
}

// A boxed rule.
RuleEntry boxed_rule(std::string name, std::string overload, BoxedRule rule);

// A table of rules; constructing one (as a static object, in a target with alwayslink) announces
// it.
class RuleSet {
 public:
  RuleSet(std::initializer_list<RuleEntry> entries);
  explicit RuleSet(std::vector<RuleEntry> entries);
};

// All rows announced so far.
const std::vector<RuleEntry>& announced_rules();

// Whether the operator has a row of its own.
bool has_rule(const std::string& name, const std::string& overload);

// What is done for an operator that has no rule and no decomposition: batching/ installs its loop.
void set_fallback_rule(BoxedRule rule);

// What an operator that draws random numbers does while a vmap level is open, whatever its
// arguments: see NOTE [mode key] in core/keys.h. Called for the operators that libtorch tags
// nondeterministic_seeded and does not decompose, with the keys they were dispatched on.
using RandomRule = void (*)(const c10::OperatorHandle& op, c10::DispatchKeySet keys,
                            torch::jit::Stack* stack);
void set_random_rule(RandomRule rule);

// Gives all rules to the dispatcher. Called once, by initialize_runtime().
void install_rules();

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_REGISTRY_H_
