#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/stack.h>
#include <torch/csrc/autograd/function.h>

#include <algorithm>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "batching/rules/distributions.h"
#include "batching/rules/reproducible.h"
#include "core/boxed.h"
#include "core/error.h"
#include "core/interpreter.h"
#include "core/keys.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/narrow.h"
#include "core/philox.h"
#include "core/promotion.h"
#include "core/random_stream.h"
#include "core/registry.h"

// NOTE [random operators]
// While a vmap level is open, every operator that draws random numbers comes here first. It belongs
// to the innermost level that has not dealt with it yet (random_level()), whose Randomness decides:
//
//   error: throw.
//   same: every example is to see the same numbers. Draw once, for one example. An operator without
//     a batched argument just runs, on behalf of the level around this one.
//   different: every example is to see its own. An operator with a batched argument has a rule
//     (random.cc); one that makes a tensor from a size makes one more dim; another one gets a
//     batched argument.
//   reproducible: as different, but the numbers are made from a key for each row of all levels
//     around (NOTE [reproducible numbers] in core/random_stream.h), so that the levels around are
//     dealt with as well. An operator that cannot do so runs once a row.
//
// When no level is left, the operator runs as always, unless an interpreted level takes it. So the
// levels of nested vmaps each have their say.

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

  std::optional<at::Generator> generator() const {
    const IValue* found = find("generator");
    if (found == nullptr || found->isNone()) return std::nullopt;
    return found->toGenerator();
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
      "random numbers, \"reproducible\" such as a loop would give it, \"same\" gives all the "
      "same) or perform the randomness operation "
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
  const bool reproducible = call.level->randomness() == Randomness::kReproducible;
  unsupported_error(
      "vmap", "cannot ask for ", reproducible ? "reproducible" : "different",
      " in-place randomness on an unbatched tensor: ", call.name(),
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

// Whether the operator is to run once a row, on behalf of this level or of one inside of it.
bool draws_by_row(const Level& level) {
  return level.randomness() == Randomness::kReproducible || RowDraws::current() != nullptr;
}

// randperm: no size to add a dim to.
void draw_one_by_one(const Call& call) {
  std::optional<RowDraws> rows;
  if (draws_by_row(*call.level)) rows.emplace(*call.level, call.generator(), call.name().c_str());
  const std::vector<IValue> args = torch::jit::pop(*call.stack, call.size());
  std::vector<at::Tensor> draws;
  for (int64_t i = 0; i < call.level->size(); ++i) {
    if (rows.has_value()) rows->begin(i);
    Stack one(args);
    call.draw_outside(&one);
    draws.push_back(one.back().toTensor());
  }
  if (draws.empty()) {
    Stack one(args);
    call.draw_outside(&one);
    draws.push_back(one.back().toTensor());
  }
  rows.reset();
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

// x.uniform_() of a tensor that the function made: from now on every example has its own.
void promote_target(const Call& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    if (!writes_argument(call.op, i)) continue;
    for_each_tensor(call.arg(i), [&](const at::Tensor& t) {
      try {
        promote(call.name().c_str(), t, call.level);
      } catch (const UnsupportedError&) {
        throw_in_place(call);  // which knows of better fixes
      }
    });
  }
}

// x.uniform_() of a tensor that is not batched.
void draw_into_promoted(const Call& call, const Args& args) {
  if (!args.lifted) throw_in_place(call);
  promote_target(call);
  call.go_on();
}

void draw_different(const Call& call, const Args& args) {
  if (args.batched) return call.go_on();
  if (args.writes) return draw_into_promoted(call, args);
  if (args.tensors) return draw_from_spread(call);
  IValue* size = call.find("size");
  if (size != nullptr) return draw_with_size(call, size);
  draw_one_by_one(call);
}

// --- randomness "reproducible" -------------------------------------------------------------------

// Numbers that a backward pass draws would not be those of the forward pass again.
void check_not_in_backward(const Call& call) {
  if (torch::autograd::get_current_node() == nullptr) return;
  unsupported_error(
      "vmap", call.name(),
      " was called in a backward pass, with randomness=\"reproducible\". Which numbers it draws "
      "depends on how many random operators the function called before, so a forward pass that is "
      "run again (activation checkpointing) would see others. Use randomness=\"different\", or "
      "leave out the checkpoint.");
}

// The numbers of an operator that takes no tensor but a size; nothing for those not drawn so.
std::optional<Distribution> distribution_of(const Call& call, at::ScalarType dtype) {
  const std::string& name = call.op.schema().name();
  using Kind = Distribution::Kind;
  if (name == "aten::rand") return Distribution{.kind = Kind::kUniform, .a = 0, .b = 1};
  if (name == "aten::randn") return Distribution{.kind = Kind::kNormal, .a = 0, .b = 1};
  if (name == "aten::normal") {
    return Distribution{.kind = Kind::kNormal,
                        .a = call.find("mean")->toDouble(),
                        .b = call.find("std")->toDouble()};
  }
  if (name == "aten::randint") {
    const IValue* low = call.find("low");
    const int64_t from = low == nullptr ? 0 : low->toInt();
    return integers_below(dtype, from, call.find("high")->toInt());
  }
  return std::nullopt;
}

// rand(size): the operator itself checks the arguments and says what tensor it makes, of no
// numbers.
void draw_reproducible_with_size(const Call& call, const IValue& size) {
  const std::vector<int64_t> sizes = size.toIntVector();
  for (const int64_t each : sizes) {
    TORCH_CHECK(each >= 0, "Trying to create tensor with negative dimension ", each, ": ",
                at::IntArrayRef(sizes));
  }
  Stack empty(call.stack->end() - static_cast<int64_t>(call.size()), call.stack->end());
  empty[*call.op.schema().argumentIndexWithName("size")] = std::vector<int64_t>{0};
  {
    const RandomHandledScope outside(*level_stack().front());
    const NoRowDraws none;
    call.op.callBoxed(&empty);
  }
  const at::Tensor like = empty.back().toTensor();
  const Batched drawn =
      reproducible_numbers(*call.level, sizes, like.scalar_type(), like.device(), call.generator(),
                           *distribution_of(call, like.scalar_type()), call.name().c_str());
  torch::jit::drop(*call.stack, call.size());
  call.stack->push_back(lift(drawn.value, drawn.bdim, call.level));
}

void draw_reproducible(const Call& call, const Args& args) {
  check_not_in_backward(call);
  if (args.batched) return call.go_on();
  if (args.writes) return draw_into_promoted(call, args);
  if (args.tensors) return draw_from_spread(call);
  const IValue* size = call.find("size");
  if (size == nullptr || !distribution_of(call, at::kLong)) return draw_one_by_one(call);
  draw_reproducible_with_size(call, *size);
}

// --- one row of a loop over rows -----------------------------------------------------------------

// The levels inside are looping over their rows: so does this one, if its rows differ.
void draw_row_of_inner_level(const Call& call, const Args& args) {
  if (args.batched) return call.go_on();
  if (!has_own_numbers(*call.level, call.name().c_str())) {
    if (args.lifted) return call.go_on();
    return call.draw_outside(call.stack);
  }
  if (args.writes) return draw_into_promoted(call, args);
  if (args.tensors) return draw_from_spread(call);
  draw_one_by_one(call);
}

// --- rows of a loop of the user's ----------------------------------------------------------------

// In a row that the user's own loop is at, as in a batch of that row alone: with the arguments
// lifted the operator comes here again.
void draw_in_row(const Call& call, const Args& args) {
  const std::vector<IValue> given(call.stack->end() - static_cast<int64_t>(call.size()),
                                  call.stack->end());
  if (args.tensors) {
    for (size_t i = 0; i < call.size(); ++i) {
      call.arg(i) = map_tensors(
          given[i], [&](const at::Tensor& t) { return lift_alias(t.unsqueeze(0), 0, call.level); });
    }
    call.op.callBoxed(call.stack);
  } else if (RowDraws::current() != nullptr) {
    draw_row_of_inner_level(call, args);
  } else {
    draw_reproducible(call, args);
  }
  std::vector<IValue> written;
  for (size_t i = 0; i < given.size(); ++i) {
    if (writes_argument(call.op, i)) written.push_back(given[i]);
  }
  const auto& returns = call.op.schema().returns();
  const size_t first = call.stack->size() - returns.size();
  for (size_t r = 0, next = 0; r < returns.size(); ++r) {
    const auto* alias = returns[r].alias_info();
    IValue& result = (*call.stack)[first + r];
    if (alias != nullptr && alias->isWrite() && next < written.size()) {
      result = written[next++];
      continue;
    }
    result = map_tensors(result, [&](const at::Tensor& t) {
      const Lowered row = lower(t, *call.level);
      return row.bdim ? row.value.select(*row.bdim, 0) : row.value;
    });
  }
}

// --- an operator that runs once a row, at last ---------------------------------------------------

// A sequential generator for a key: the whole state of it is made from Philox's words.
at::Generator generator_for(uint64_t key, c10::Device device) {
  if (!device.is_cpu()) {
    at::Generator generator = at::globalContext().defaultGenerator(device).clone();
    generator.set_current_seed(key);
    return generator;
  }
  at::mt19937 engine(key);
  at::mt19937_data_pod state = engine.data();
  for (size_t i = 0; i < state.state_.size(); i += 4) {
    const PhiloxWords words = philox(key, i / 4, static_cast<uint64_t>(PhiloxUse::kState));
    std::copy(words.begin(), words.end(), state.state_.begin() + static_cast<int64_t>(i));
  }
  engine.set_data(state);
  at::Generator generator = at::detail::createCPUGenerator();
  at::check_generator<at::CPUGeneratorImpl>(generator)->set_engine(engine);
  return generator;
}

c10::Device device_of(const Call& call) {
  for (size_t i = 0; i < call.size(); ++i) {
    std::optional<c10::Device> device;
    for_each_tensor(call.arg(i), [&](const at::Tensor& t) {
      if (!device.has_value()) device = t.device();
    });
    if (device.has_value()) return *device;
  }
  const IValue* device = call.find("device");
  return device == nullptr || device->isNone() ? c10::Device(c10::kCPU) : device->toDevice();
}

// The overload of a factory that takes a generator, randperm.generator for randperm; none if there
// is none.
std::optional<OperatorHandle> overload_with_generator(const OperatorHandle& op) {
  const auto& [name, overload] = op.operator_name();
  std::string with = overload;
  for (const char* last : {"out", "dtype"}) {
    if (with.ends_with(last)) {
      with.insert(with.size() - std::strlen(last), "generator_");
      return c10::Dispatcher::singleton().findSchema({name, with});
    }
  }
  with += with.empty() ? "generator" : "_generator";
  return c10::Dispatcher::singleton().findSchema({name, with});
}

// Where the other overload takes the arguments of the operator, which both name alike; none where
// it takes others.
std::optional<std::vector<size_t>> places_of_arguments(const OperatorHandle& op,
                                                       const OperatorHandle& other) {
  std::vector<size_t> places;
  for (const c10::Argument& argument : op.schema().arguments()) {
    const auto place = other.schema().argumentIndexWithName(argument.name());
    if (!place.has_value()) return std::nullopt;
    places.push_back(static_cast<size_t>(*place));
  }
  if (other.schema().arguments().size() != places.size() + 1) return std::nullopt;
  return places;
}

// Draws by the overload with a generator. False, with nothing done, where there is none.
bool draw_by_overload(const Call& call, uint64_t key, c10::Device device) {
  const std::optional<OperatorHandle> other = overload_with_generator(call.op);
  if (!other.has_value()) return false;
  const auto places = places_of_arguments(call.op, *other);
  const auto generator = other->schema().argumentIndexWithName("generator");
  if (!places.has_value() || !generator.has_value()) return false;
  std::vector<IValue> args(call.size() + 1);
  for (size_t i = 0; i < call.size(); ++i) args[(*places)[i]] = call.arg(i);
  args[static_cast<size_t>(*generator)] = generator_for(key, device);
  torch::jit::drop(*call.stack, call.size());
  for (IValue& arg : args) call.stack->push_back(std::move(arg));
  other->redispatchBoxed(call.keys, call.stack);
  return true;
}

// Lends the default generator to one row, and puts its state back. Rows of other threads wait: with
// the state of another row they would draw its numbers, or put that state back at last. Operators
// that other threads run outside of rows do not know of it, and may disturb the numbers.
class DefaultGeneratorScope {
 public:
  DefaultGeneratorScope(c10::Device device, uint64_t key)
      : alone_(mutex()),
        generator_(device.is_cpu() ? at::detail::getDefaultCPUGenerator()
                                   : at::globalContext().defaultGenerator(device)) {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    saved_ = generator_.get_state();
    generator_.set_state(generator_for(key, device).get_state());
  }
  ~DefaultGeneratorScope() {
    const std::lock_guard<std::mutex> lock(generator_.mutex());
    generator_.set_state(saved_);
  }
  DefaultGeneratorScope(const DefaultGeneratorScope&) = delete;
  DefaultGeneratorScope& operator=(const DefaultGeneratorScope&) = delete;

 private:
  static std::recursive_mutex& mutex() {
    static auto* const mutex = new std::recursive_mutex;
    return *mutex;
  }

  const std::lock_guard<std::recursive_mutex> alone_;
  at::Generator generator_;
  at::Tensor saved_;
};

// The operator on plain tensors, for one row of every level.
void draw_seeded(const Call& call, RowDraws& rows) {
  const uint64_t key = rows.next_key();
  const NoRowDraws none;
  const c10::Device device = device_of(call);
  const auto place = call.op.schema().argumentIndexWithName("generator");
  if (place.has_value()) {
    call.arg(*place) = generator_for(key, device);
    call.op.redispatchBoxed(call.keys, call.stack);
    return;
  }
  if (draw_by_overload(call, key, device)) return;
  const DefaultGeneratorScope seeded(device, key);
  call.op.redispatchBoxed(call.keys, call.stack);
}

// --- dropout, made of other operators ------------------------------------------------------------

bool is_composite(const Call& call) {
  return call.op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

// Its parts come here one by one. They fill a mask like the input, so the input must be batched
// where the examples are to have masks of their own.
void draw_parts(const Call& call) {
  const Randomness mode = call.level->randomness();
  const bool own = mode == Randomness::kDifferent || mode == Randomness::kReproducible;
  if (own && call.level->kind() == LevelKind::kVmap && !inspect(call).batched) {
    return draw_from_spread(call);
  }
  call.op.redispatchBoxed(call.keys, call.stack);
}

// --- narrowed levels -----------------------------------------------------------------------------

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

// --- interpreted levels --------------------------------------------------------------------------

// Whether an argument is a tensor of the level with a batch dim.
bool has_batched(const Call& call, const Level& level) {
  bool found = false;
  for (size_t i = 0; i < call.size(); ++i) {
    for_each_tensor(call.arg(i), [&](const at::Tensor& t) {
      const LiftedTensorImpl* impl = as_lifted(t);
      found = found || (impl != nullptr && &impl->level() == &level && impl->bdim().has_value());
    });
  }
  return found;
}

// To those that a user's function is at work in, from the innermost, so that a trace writes down
// what is drawn on plain tensors, and on what the function made of no input, too; interpreters that
// have no use for it leave it alone. From other tensors of the level an operator gets there by the
// front.
bool offer_to_interpreters(const Call& call) {
  const std::vector<LevelPtr>& levels = level_stack();
  const int64_t depth = deepest_argument(call);
  for (auto it = levels.rbegin(); it != levels.rend() && depth <= (*it)->depth(); ++it) {
    const LevelPtr& level = *it;
    if (level->depth() >= rule_depth() || level->interpreter() == nullptr) continue;
    if (has_batched(call, *level)) return false;
    if (level->interpreter()->run(call.op, level, call.stack)) return true;
  }
  return false;
}

// --- the kernel ----------------------------------------------------------------------------------

void random_rule(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  const DispatchKeySet below = keys & DispatchKeySet(DispatchKeySet::FULL_AFTER, kModeKey);
  Level* level = random_level();
  RowDraws* rows = RowDraws::current();
  const Call call{op, below, stack, level == nullptr ? LevelPtr() : LevelPtr::reclaim_copy(level)};
  if (level == nullptr) {
    if (rows != nullptr && !draws_nothing(call)) return draw_seeded(call, *rows);
    if (offer_to_interpreters(call)) return;
    return op.redispatchBoxed(below, stack);
  }
  if (C10_UNLIKELY(!level->usual())) bring_arguments(call);
  // An argument of a jvp level inside: that level's turn comes first.
  if (deepest_argument(call) > level->depth()) return op.redispatchBoxed(below, stack);
  if (draws_nothing(call)) return call.go_on();
  if (is_composite(call)) return draw_parts(call);
  const Args args = inspect(call);
  if (level->kind() == LevelKind::kRow && !args.lifted) return draw_in_row(call, args);
  if (rows != nullptr) return draw_row_of_inner_level(call, args);
  switch (level->randomness()) {
    case Randomness::kError:
      throw_random(call);
    case Randomness::kSame:
      return draw_same(call, args);
    case Randomness::kDifferent:
      return draw_different(call, args);
    case Randomness::kReproducible:
      return draw_reproducible(call, args);
  }
}

// Installed when the library is loaded.
[[maybe_unused]] const bool kInstalled = [] {
  set_random_rule(&random_rule);
  return true;
}();

}  // namespace
}  // namespace torchlift
