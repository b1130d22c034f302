#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <vector>

#include "core/boxed.h"
#include "core/error.h"
#include "core/keys.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/narrow.h"
#include "core/registry.h"

// NOTE [random operators]
// While a vmap level is open, every operator that draws random numbers comes here first. It belongs
// to the innermost level that has not dealt with it yet (random_level()), whose Randomness decides:
//
//   error      throw
//   same       every example is to see the same numbers: draw once, for one example. An operator
//   without a
//              batched argument just runs, on behalf of the level around this one.
//   different  every example is to see its own: an operator with a batched argument has a rule
//   (random.cc);
//              one that makes a tensor from a size makes one more dim; another one gets a batched
//              argument.
//
// When no level is left, the operator runs as always. So the levels of nested vmaps each have their
// say.

namespace torchlift {
namespace {

using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// The random operator being dispatched.
struct Call {
  const OperatorHandle& op;
  DispatchKeySet keys;  // below the mode key
  Stack* stack;
  LevelPtr level;

  size_t size() const { return op.schema().arguments().size(); }
  IValue& arg(size_t i) const { return (*stack)[stack->size() - size() + i]; }
  std::string name() const { return toString(op.operator_name()); }

  IValue* find(const char* argument) const {
    const auto index = op.schema().argumentIndexWithName(argument);
    return index.has_value() ? &arg(*index) : nullptr;
  }

  // On to the front, or to autograd and the backend, on behalf of the level around.
  void go_on() const {
    const RandomHandledScope handled(*level);
    op.redispatchBoxed(keys, stack);
  }

  // Once more from the start, on behalf of the level around.
  void draw_outside(Stack* arguments) const {
    const RandomHandledScope handled(*level);
    op.callBoxed(arguments);
  }
};

// --- what there is to know of a call -------------------------------------------------------------

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

// Dropout that is switched off, and derivatives, which reuse the numbers of the forward pass.
bool draws_nothing(const Call& call) {
  const std::string& name = call.op.schema().name();
  if (ends_with(name, "_backward")) return true;
  if (const IValue* p = call.find("dropout_p")) return p->toDouble() == 0.0;
  if (const IValue* train = call.find("train")) {
    const bool training = train->isNone() || train->toBool();
    return !training || call.find("p")->toDouble() == 0.0;
  }
  if (const IValue* training = call.find("training")) return !training->toBool();
  return false;
}

struct Args {
  bool tensors = false;
  bool lifted = false;   // a tensor of the level
  bool batched = false;  // one with a batch dim
  bool writes = false;
};

Args inspect(const Call& call) {
  Args found;
  for (size_t i = 0; i < call.size(); ++i) {
    found.writes = found.writes || writes_argument(call.op, i);
    for_each_tensor(call.arg(i), [&](const at::Tensor& t) {
      found.tensors = true;
      const LiftedTensorImpl* impl = as_lifted(t);
      if (impl == nullptr || &impl->level() != call.level.get()) return;
      found.lifted = true;
      found.batched = found.batched || impl->bdim().has_value();
    });
  }
  return found;
}

int64_t deepest_argument(const Call& call) {
  int64_t depth = 0;
  for (size_t i = 0; i < call.size(); ++i) {
    for_each_tensor(call.arg(i),
                    [&](const at::Tensor& t) { depth = std::max(depth, depth_of(t)); });
  }
  return depth;
}

// --- errors --------------------------------------------------------------------------------------

[[noreturn]] void throw_random(const Call& call) {
  unsupported_error(
      "vmap", "called random operation ", call.name(),
      " while in randomness error mode. Please either use the 'same' or 'different' "
      "randomness flags on vmap (randomness=\"different\" gives every example its own "
      "random numbers, \"same\" gives all the same) or perform the randomness operation "
      "out of vmap.");
}

[[noreturn]] void throw_same(const Call& call) {
  unsupported_error(
      "vmap", call.name(),
      " draws numbers that depend on a batched tensor, and cannot do so "
      "with randomness=\"same\". Use randomness=\"different\", or draw numbers from a tensor "
      "that is not batched and compute with them.");
}

[[noreturn]] void throw_in_place(const Call& call) {
  unsupported_error(
      "vmap", "cannot ask for different in-place randomness on an unbatched tensor: ", call.name(),
      " writes random numbers into a tensor of which all examples share one "
      "copy. Use the out-of-place operator (torch.rand_like(x) for x.uniform_(), "
      "torch.bernoulli(x) ...), or write into a batched tensor (torch.empty_like(x) of a "
      "batched x).");
}

// --- randomness "same" ---------------------------------------------------------------------------

// Operators whose rules can share one draw among examples with different arguments.
bool can_share(const Call& call) {
  static const auto* names = new std::unordered_set<std::string>{
      "aten::bernoulli",    "aten::bernoulli_",        "aten::cauchy",
      "aten::cauchy_",      "aten::exponential",       "aten::exponential_",
      "aten::geometric",    "aten::geometric_",        "aten::log_normal",
      "aten::log_normal_",  "aten::native_dropout",    "aten::normal",
      "aten::normal_",      "aten::normal_functional", "aten::rand_like",
      "aten::randint_like", "aten::randn_like",        "aten::random",
      "aten::random_",      "aten::rrelu_with_noise",  "aten::uniform",
      "aten::uniform_",     "aten::rrelu_with_noise_"};
  return names->count(call.op.schema().name()) > 0 &&
         has_rule(call.op.schema().name(), call.op.schema().overload_name());
}

void draw_same(const Call& call, const Args& args) {
  if (args.batched && !can_share(call)) throw_same(call);
  // The level around this one comes next: through the front, which takes the values out of our
  // tensors, or directly.
  if (args.lifted) return call.go_on();
  call.draw_outside(call.stack);
}

// --- randomness "different" ----------------------------------------------------------------------

IValue lifted(const IValue& results, const LevelPtr& level) {
  return map_tensors(results, [&](const at::Tensor& t) { return lift(t, 0, level); });
}

// rand(size): [B, size].
void draw_with_size(const Call& call, IValue* size) {
  std::vector<c10::SymInt> sizes{call.level->size()};
  for (const c10::SymInt& each : size->toSymIntVector()) sizes.push_back(each);
  *size = IValue(sizes);
  call.draw_outside(call.stack);
  call.stack->back() = lifted(call.stack->back(), call.level);
}

// randperm: no size to add a dim to.
void draw_one_by_one(const Call& call) {
  const std::vector<IValue> args = torch::jit::pop(*call.stack, call.size());
  std::vector<at::Tensor> draws;
  for (int64_t i = 0; i < call.level->size(); ++i) {
    Stack one(args);
    call.draw_outside(&one);
    draws.push_back(one.back().toTensor());
  }
  if (draws.empty()) {
    Stack one(args);
    call.draw_outside(&one);
    draws.push_back(one.back().toTensor());
  }
  const at::Tensor all = at::stack(draws).narrow(0, 0, call.level->size());
  call.stack->push_back(lift(all, 0, call.level));
}

// The tensor with a batch dim at the level, its values those of t for every example.
at::Tensor spread(const at::Tensor& t, const LevelPtr& level) {
  const LiftedTensorImpl* impl = as_lifted(t);
  if (impl != nullptr && &impl->level() == level.get()) {
    // t may be tracked in this level's domain, so it is multiplied rather than taken apart.
    return at::mul(t, lift(at::ones({level->size()}, t.options()), 0, level));
  }
  std::vector<int64_t> sizes{level->size()};
  sizes.insert(sizes.end(), t.sizes().begin(), t.sizes().end());
  return lift(t.expand(sizes), 0, level);
}

// normal(mean, std) of tensors that are not batched: the first one becomes batched, and the
// operator comes here again.
void draw_from_spread(const Call& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    if (!call.arg(i).isTensor() || !call.arg(i).toTensor().defined()) continue;
    call.arg(i) = spread(call.arg(i).toTensor(), call.level);
    return call.op.callBoxed(call.stack);
  }
}

void draw_different(const Call& call, const Args& args) {
  if (args.batched) return call.go_on();
  if (args.writes) throw_in_place(call);
  if (args.tensors) return draw_from_spread(call);
  IValue* size = call.find("size");
  if (size != nullptr) return draw_with_size(call, size);
  draw_one_by_one(call);
}

// Arguments of a level that this one narrows become some of its examples.
void bring_arguments(const Call& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    bool found = false;
    for_each_tensor(call.arg(i), [&](const at::Tensor& t) {
      if (!narrows_level_of(*call.level, t)) return;
      if (writes_argument(call.op, i)) throw_write_outside(call.name().c_str(), t, *call.level);
      found = true;
    });
    if (!found) continue;
    call.arg(i) = map_tensors(call.arg(i), [&](const at::Tensor& t) {
      return narrows_level_of(*call.level, t) ? narrow(t, call.level) : t;
    });
  }
}

// --- the kernel ----------------------------------------------------------------------------------

void random_rule(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const DispatchKeySet below = keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, kModeKey);
  Level* level = random_level();
  if (level == nullptr) return op.redispatchBoxed(below, stack);
  const Call call{op, below, stack, LevelPtr::reclaim_copy(level)};
  if (C10_UNLIKELY(!level->usual())) bring_arguments(call);
  // An argument of a jvp level inside: that level's turn comes first.
  if (deepest_argument(call) > level->depth()) return op.redispatchBoxed(below, stack);
  if (draws_nothing(call)) return call.go_on();
  const Args args = inspect(call);
  switch (level->randomness()) {
    case Randomness::kError:
      throw_random(call);
    case Randomness::kSame:
      return draw_same(call, args);
    case Randomness::kDifferent:
      return draw_different(call, args);
  }
}

// Installed when the library is loaded.
[[maybe_unused]] const bool kInstalled = [] {
  set_random_rule(&random_rule);
  return true;
}();

}  // namespace
}  // namespace torchlift
