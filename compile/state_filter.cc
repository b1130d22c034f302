#include "compile/state_filter.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <utility>

#include "compile/hollow.h"
#include "core/boxed.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

// Of this thread.
StateFilter*& innermost() {
  static thread_local StateFilter* filter = nullptr;
  return filter;
}

class BusyScope {
 public:
  explicit BusyScope(bool& busy) : busy_(busy) { busy_ = true; }
  ~BusyScope() { busy_ = false; }
  BusyScope(const BusyScope&) = delete;
  BusyScope& operator=(const BusyScope&) = delete;

 private:
  bool& busy_;
};

template <size_t N>
bool is_one_of(const OperatorHandle& op, const std::array<std::string_view, N>& names) {
  return std::find(names.begin(), names.end(), op.schema().name()) != names.end();
}

// Of what may_write_silently tells.
bool is_batch_norm(const OperatorHandle& op) {
  constexpr std::array<std::string_view, 6> kNorms = {
      "aten::batch_norm",        "aten::instance_norm",    "aten::_batch_norm_impl_index",
      "aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"};
  return is_one_of(op, kNorms);
}

// What a tensor is changes, and not its numbers.
bool changes_metadata(const OperatorHandle& op) {
  constexpr std::array<std::string_view, 5> kOps = {"aten::requires_grad_", "aten::retain_grad",
                                                    "aten::set_data", "aten::detach_",
                                                    "aten::rename_"};
  return op.hasTag(at::Tag::inplace_view) || is_one_of(op, kOps);
}

bool has_memory(const at::Tensor& plain) {
  return plain.layout() == c10::kStrided && plain.has_storage();
}

// Whether t is all of its storage.
bool fills_storage(const at::Tensor& t) {
  return t.storage_offset() == 0 && t.is_non_overlapping_and_dense() && !t.is_conj() &&
         !t.is_neg() && t.nbytes() == t.storage().nbytes();
}

// All of its storage, as numbers of its dtype. Writes count as writes into t, of which autograd may
// have kept a view.
at::Tensor all_of(const at::Tensor& t) {
  const auto count = static_cast<int64_t>(t.storage().nbytes() / t.element_size());
  at::Tensor whole = at::empty({0}, t.options().requires_grad(false));
  whole.set_(t.storage(), 0, {count}, {1});
  if (!t.is_inference() && !whole.is_inference()) {
    whole.unsafeGetTensorImpl()->set_version_counter(t.unsafeGetTensorImpl()->version_counter());
  }
  return whole;
}

}  // namespace

StateFilter::StateFilter(CapturedState& state, Recording& recording, LevelPtr level)
    : state_(state),
      recording_(recording),
      level_(std::move(level)),
      around_(innermost()),
      shapes_filter_(recording.by_shapes() ? OperatorFilter::current() : nullptr),
      scope_(this) {
  for (const c10::Storage& storage : state_.known_) add_state(storage.unsafeGetStorageImpl());
  if (around_ != nullptr) {
    for (const auto& [storage, stands_for_it] : around_->state_memory_) add_state(storage);
  }
  innermost() = this;
  state_.run_ = {};
  state_.run_.transform = recording.transform();
  recording_.replace_constants([this](const at::Tensor& t) { return in_place_of(t); });
}

StateFilter::~StateFilter() {
  innermost() = around_;
  recording_.replace_constants({});
  if (!finished_) CapturedState::put_back(state_.run_.written);
}

bool StateFilter::call(const OperatorHandle& op, Stack* stack) {
  // What an operator is made of works on memory of its own, or its targets'.
  if (busy_) return shapes_filter_ != nullptr && shapes_filter_->call(op, stack);
  const BusyScope busy(busy_);
  const Facts& facts = facts_of(op);
  prepare(op, facts, stack);
  if (shapes_filter_ == nullptr) {
    call_unfiltered(op, stack);
  } else {
    op.callBoxed(*stack);
  }
  note_made(facts, *stack);
  return true;
}

// --- operators and their arguments ---------------------------------------------------------------

StateFilter::Facts::Facts(const OperatorHandle& op)
    : arguments(op.schema().arguments().size()),
      results(op.schema().returns().size()),
      // Random operators are written down wherever they stand.
      random(op.hasTag(at::Tag::nondeterministic_seeded)),
      asks(op.hasTag(at::Tag::data_dependent_output)),
      changes_shape(op.hasTag(at::Tag::inplace_view)),
      gives_other_memory(op.schema().name() == "aten::set_"),
      may_write_silently(is_batch_norm(op)) {
  const bool metadata = changes_metadata(op);
  for (size_t i = 0; i < arguments; ++i) {
    writes_argument.push_back(!metadata && torchlift::writes_argument(op, i));
  }
}

const StateFilter::Facts& StateFilter::facts_of(const OperatorHandle& op) {
  const c10::FunctionSchema* schema = &op.schema();
  const auto found = facts_.find(schema);
  return found != facts_.end() ? found->second : facts_.try_emplace(schema, op).first->second;
}

at::Tensor StateFilter::Place::tensor() const {
  using Pointer = c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;
  return at::Tensor(Pointer::reclaim_copy(plain));
}

StateFilter::Place StateFilter::place_of(const at::Tensor& t) const {
  const SubstitutionScope* scope = SubstitutionScope::current();
  const at::Tensor* value =
      scope != nullptr && scope->active() ? SubstitutionScope::find_anywhere(t) : nullptr;
  if (value == nullptr) value = &t;
  Place place;
  while (LiftedTensorImpl* impl = as_lifted(*value)) {
    if (&impl->level() == level_.get() && impl->bdim()) return {.recorded = true};
    if (impl->level().depth() < level_->depth()) return {};
    place.holder = impl;
    value = &impl->value();
  }
  if (has_memory(*value)) place.plain = value->unsafeGetTensorImpl();
  return place;
}

StateFilter::Memory StateFilter::state_of(Memory storage) const {
  if (state_memory_.empty()) return nullptr;
  const auto found = state_memory_.find(storage);
  if (found != state_memory_.end()) return found->second;
  const MemoryRange range = memory_range(*storage);
  if (range.empty() || is_lazy_clone(*storage)) return nullptr;
  const auto next = state_ranges_.upper_bound(range.begin);
  if (next == state_ranges_.end()) return nullptr;
  const MemoryRange other = memory_range(*next->second);
  if (other == range) return next->second;
  if (!other.overlaps(range)) return nullptr;
  unsupported_error(recording_.transform(),
                    "the function writes into a captured tensor whose memory overlaps with that of "
                    "another one that it uses, which begins or ends elsewhere (two that "
                    "torch.from_numpy made of parts of one array, say). Make one tensor of all of "
                    "it, and views of that.");
}

void StateFilter::add_state(Memory storage) {
  const Memory known = state_of(storage);
  state_memory_.emplace(storage, known == nullptr ? storage : known);
  const MemoryRange range = memory_range(*storage);
  if (known == nullptr && !range.empty()) state_ranges_.emplace(range.end, storage);
}

// A write into t is one into its tangents too, of all levels.
void StateFilter::keep_tangents(const at::Tensor& t) {
  const SubstitutionScope* scope = SubstitutionScope::current();
  const at::Tensor* value =
      scope != nullptr && scope->active() ? SubstitutionScope::find_anywhere(t) : nullptr;
  if (value == nullptr) value = &t;
  while (true) {
    const at::Tensor& tangent = value->_fw_grad(/*level=*/0);
    if (tangent.defined()) {
      const Place place = place_of(tangent);
      if (place.plain != nullptr && !is_state(place)) recording_.keep_constants(place.memory());
      keep_tangents(tangent);
    }
    const LiftedTensorImpl* impl = as_lifted(*value);
    if (impl == nullptr) return;
    value = &impl->value();
  }
}

void StateFilter::note_argument(size_t i, const at::Tensor& t, Places* places) {
  places->push_back(place_of(t));
  Place& place = places->back();
  place.argument = i;
  if (place.plain != nullptr) arguments_.push_back(place.memory());
}

// Puts tensors of the level in the place of state among the arguments.
void StateFilter::prepare(const OperatorHandle& op, const Facts& facts, Stack* stack) {
  IValue* const args = stack->data() + (stack->size() - facts.arguments);
  arguments_.clear();
  Places places;
  for (size_t i = 0; i < facts.arguments; ++i) {
    if (args[i].isTensor()) {
      if (args[i].toTensor().defined()) note_argument(i, args[i].toTensor(), &places);
    } else if (args[i].isList()) {
      for_each_tensor(args[i], [&](const at::Tensor& t) { note_argument(i, t, &places); });
    }
    if (facts.writes(args, i)) {
      for_each_tensor(args[i], [&](const at::Tensor& t) { keep_tangents(t); });
    }
  }
  if (arguments_.empty()) return;
  const auto shows_state = [this](const Place& place) {
    return place.plain != nullptr && is_state(place);
  };
  bool any_state = std::any_of(places.begin(), places.end(), shows_state);
  if (any_state) check_asked(op, facts, places);
  const bool recorded = facts.random || std::any_of(places.begin(), places.end(),
                                                    [](const Place& p) { return p.recorded; });
  for (const Place& place : places) {
    if (place.plain == nullptr) continue;
    if (facts.changes_shape && place.argument == 0 && made_.count(place.memory()) != 0) {
      recording_.keep_constants(place.memory());
    }
    if (!facts.writes(args, place.argument)) continue;
    any_state = note_write(place.tensor(), recorded || any_state) || any_state;
  }
  if (!any_state) return;
  // What follows may let go of a tensor that a place points to.
  c10::SmallVector<size_t, 6> replaced;
  for (const Place& place : places) {
    const bool noted = !replaced.empty() && replaced.back() == place.argument;
    if (!noted && shows_state(place)) replaced.push_back(place.argument);
  }
  for (const size_t i : replaced) {
    args[i] = map_tensors(args[i], [&](const at::Tensor& t) { return in_place_of(t); });
  }
}

void StateFilter::check_asked(const OperatorHandle& op, const Facts& facts,
                              const Places& places) const {
  if (!facts.asks && !facts.changes_shape) return;
  for (const Place& place : places) {
    if (place.plain == nullptr || !is_state(place)) continue;
    if (facts.asks) {
      unsupported_error(
          recording_.transform(), "a number was asked for (", op.schema().name(),
          "; .item(), float(x), int(x), bool(x), if x:) of a captured tensor that the function "
          "writes into. It would be that of this one run for all later ones. Compute with tensors. "
          "(A BatchNorm with momentum=None asks for the number of its batches: give it a "
          "momentum.)");
    }
    unsupported_error(recording_.transform(), op.schema().name(),
                      ": changes the shape in place of a captured tensor that the function writes "
                      "into. Make a view of it instead.");
  }
}

bool StateFilter::note_write(const at::Tensor& plain, bool recorded) {
  const Memory memory = memory_of(plain);
  if (state_of(memory) != nullptr) return false;
  const bool made = made_.count(memory) != 0;
  // What the graph read of it so far are the numbers that are there now.
  if (made || !recorded) recording_.keep_constants(memory);
  if (made) return false;
  if (recorded) {
    add_state(memory);
    state_.run_.found.push_back(plain.storage());
    state_.run_.found_recorded = true;
    return true;
  }
  if (!written_.insert(memory).second) return false;
  const UnrecordedScope unrecorded;
  at::Tensor bytes;
  if (!plain.is_meta() && plain.storage().nbytes() > 0) {
    bytes = at::empty({0}, plain.options().dtype(at::kByte).requires_grad(false));
    bytes.set_(plain.storage(), 0, {static_cast<int64_t>(plain.storage().nbytes())}, {1});
    bytes = bytes.clone();
  }
  state_.run_.written.push_back({plain.storage().getWeakStorageImpl(), std::move(bytes)});
  return false;
}

// Of the results, in all levels. Values of the trace are never taken for anything else.
void StateFilter::note_made(const Facts& facts, const Stack& stack) {
  if (facts.gives_other_memory) return;
  for (size_t i = stack.size() - facts.results; i < stack.size(); ++i) {
    if (stack[i].isTensor()) {
      if (stack[i].toTensor().defined()) note_made(stack[i].toTensor());
    } else {
      for_each_tensor(stack[i], [this](const at::Tensor& t) { note_made(t); });
    }
  }
}

void StateFilter::note_made(const at::Tensor& t) {
  const Place place = place_of(t);
  if (place.plain == nullptr) return;
  const Memory memory = place.memory();
  if (std::find(arguments_.begin(), arguments_.end(), memory) != arguments_.end()) return;
  made_.try_emplace(memory, place.plain->unsafe_storage().getWeakStorageImpl());
}

at::Tensor StateFilter::in_place_of(const at::Tensor& t) {
  if (!t.defined()) return t;
  const Place place = place_of(t);
  if (place.plain == nullptr || !is_state(place)) return t;
  at::Tensor value = lifted(place.tensor());
  if (place.holder == nullptr) return value;
  const LiftedTensorImpl* own = as_lifted(value);
  if (&place.holder->level() == level_.get()) {
    place.holder->replace_value(own->value(), own->bdim());
  } else {
    place.holder->replace_value(std::move(value), place.holder->bdim());
  }
  return t;
}

at::Tensor StateFilter::lifted(const at::Tensor& plain) {
  if (plain.requires_grad()) {
    unsupported_error(
        recording_.transform(), "the function writes into the memory of a tensor of shape ",
        plain.sizes(),
        " that requires a gradient and comes from outside. Pass it to the function as "
        "an argument, and return the new value.");
  }
  const at::Tensor& base = base_of(plain);
  if (plain.scalar_type() != base.scalar_type() || plain.is_conj() || plain.is_neg()) {
    unsupported_error(recording_.transform(),
                      "the function writes into memory from outside that it uses as ",
                      base.scalar_type(), " and as ",
                      plain.is_conj() || plain.is_neg() ? "a conjugate or negative view"
                                                        : c10::toString(plain.scalar_type()),
                      ". Capture one tensor, and make views of it in the function.");
  }
  // A tensor of the level shows its own copy, which begins where its storage does.
  if (base.sizes() == plain.sizes() && base.strides() == plain.strides() &&
      plain.storage_offset() == 0) {
    return base;
  }
  return at::as_strided(base, plain.sizes(), plain.strides(), plain.storage_offset());
}

const at::Tensor& StateFilter::base_of(const at::Tensor& plain) {
  const Memory memory = state_of(memory_of(plain));
  const auto found = bases_.find(memory);
  if (found != bases_.end()) return found->second;
  const UnrecordedScope unrecorded;
  const at::Tensor whole = fills_storage(plain) ? plain : all_of(plain);
  if (whole.is_meta()) {
    unsupported_error(recording_.transform(),
                      "the function writes into a captured tensor of shape ", whole.sizes(),
                      " on the meta device, which holds no numbers to begin with. Pass it to the "
                      "function as an argument.");
  }
  at::Tensor inner = copied(whole).unsqueeze(0);
  recording_.know_constant(whole, inner);
  for (const c10::Storage& latest : state_.latest_) {
    state_.run_.met_latest |= state_of(latest.unsafeGetStorageImpl()) == memory;
  }
  return bases_.emplace(memory, lift(std::move(inner), 0, level_)).first->second;
}

at::Tensor StateFilter::copied(const at::Tensor& whole) const {
  if (recording_.by_shapes()) {
    return hollow_tensor(whole.sizes(), whole.strides(), whole.scalar_type(), whole.device());
  }
  return whole.detach().clone();
}

bool StateFilter::is_held_by_others(const c10::Storage& storage, const Graph& graph) const {
  std::unordered_set<const c10::TensorImpl*> own;
  for (const Constant& constant : graph.constants) {
    const at::Tensor& t = constant.tensor;
    if (has_memory(t) && memory_of(t) == storage.unsafeGetStorageImpl() && t.use_count() == 1) {
      own.insert(t.unsafeGetTensorImpl());
    }
  }
  return storage.use_count() > own.size() + 1;
}

void StateFilter::finish(const Graph& graph) {
  finished_ = true;
  for (const CapturedState::Written& each : state_.run_.written) {
    auto alive = each.storage.lock();
    if (!alive) continue;
    c10::Storage storage(std::move(alive));
    if (is_held_by_others(storage, graph)) state_.run_.found.push_back(std::move(storage));
  }
}

}  // namespace torchlift::compile
