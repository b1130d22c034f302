#include "batching/row_set.h"

#include <ATen/ops/empty.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <utility>

#include "core/error.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using at::Tensor;

// Indices for the slots of `outer` levels and `width` slots of one inside of them: [width], with a
// batch dim in each of the outer levels.
Tensor index_tensor(const std::vector<int64_t>& values, at::ArrayRef<LevelPtr> outer, int64_t width,
                    c10::Device device) {
  const RuleDepthScope values_only(1);
  std::vector<int64_t> sizes;
  for (const LevelPtr& level : outer) sizes.push_back(level->size());
  sizes.push_back(width);
  Tensor index = at::empty(sizes, at::TensorOptions().dtype(at::kLong));
  std::copy(values.begin(), values.end(), index.data_ptr<int64_t>());
  index = index.to(device);
  for (const LevelPtr& level : outer) {
    // A jvp has no examples, and its tensors no batch dim.
    const bool batched = level->kind() == LevelKind::kVmap;
    index = batched ? lift(index, 0, level) : index.select(0, 0);
  }
  return index;
}

// Whether every slot of level k holds the example of its own number.
bool is_everything(const std::vector<int64_t>& examples, int64_t width, int64_t size) {
  if (width != size) return false;
  for (const auto i : c10::irange(examples.size())) {
    if (examples[i] != static_cast<int64_t>(i) % width) return false;
  }
  return true;
}

// Which examples of one level the slots before it choose: [prefixes, width].
struct Choice {
  int64_t width = 0;
  std::vector<int64_t> examples;
};

// prefixes: rows of the levels before; any: for each row of these levels and this one, whether it
// leads to a row of the set.
Choice choose(const std::vector<int64_t>& prefixes, const std::vector<bool>& any, int64_t size) {
  std::vector<std::vector<int64_t>> lists;
  Choice choice;
  for (const int64_t prefix : prefixes) {
    std::vector<int64_t> list;
    for (const auto i : c10::irange(size)) {
      if (any[prefix * size + i]) list.push_back(i);
    }
    choice.width = std::max(choice.width, static_cast<int64_t>(list.size()));
    lists.push_back(std::move(list));
  }
  for (std::vector<int64_t>& list : lists) {
    list.resize(choice.width, list.front());
    choice.examples.insert(choice.examples.end(), list.begin(), list.end());
  }
  return choice;
}

}  // namespace

RowSet::RowSet(std::vector<LevelPtr> levels, c10::Device device)
    : base_(std::move(levels)), levels_(base_), device_(device) {
  int64_t rows = 1;
  for (const LevelPtr& level : base_) {
    rows *= level->size();
    std::vector<int64_t> slots(rows), positions(rows);
    for (const auto i : c10::irange(rows)) {
      slots[i] = i;
      positions[i] = i % level->size();
    }
    slots_.push_back(std::move(slots));
    positions_.push_back(std::move(positions));
  }
}

RowSet RowSet::where(const std::vector<bool>& mask) const {
  // any[k]: for each row of the first k + 1 levels, whether it leads to a row of the set.
  std::vector<std::vector<bool>> any(base_.size());
  any.back() = mask;
  for (size_t k = base_.size() - 1; k > 0; --k) {
    const int64_t size = base_[k]->size();
    any[k - 1].assign(any[k].size() / size, false);
    for (const auto i : c10::irange(any[k].size())) {
      if (any[k][i]) any[k - 1][i / size] = true;
    }
  }
  RowSet result;
  result.base_ = base_;
  result.device_ = device_;
  std::vector<int64_t> prefixes{0};
  for (const auto k : c10::irange(base_.size())) {
    const int64_t size = base_[k]->size();
    const Choice choice = choose(prefixes, any[k], size);
    std::vector<int64_t> slots;
    std::vector<int64_t> positions(any[k].size(), -1);
    for (const auto i : c10::irange(choice.examples.size())) {
      const int64_t place = static_cast<int64_t>(i) % choice.width;
      const int64_t row = prefixes[i / choice.width] * size + choice.examples[i];
      slots.push_back(row);
      if (positions[row] < 0) positions[row] = place;
    }
    // See NOTE [narrowed levels] in core/narrow.h.
    const bool everything = is_everything(choice.examples, choice.width, size);
    const bool inside = k > 0 && result.levels_[k - 1] != base_[k - 1];
    LevelPtr level = base_[k];
    if (inside || !everything) {
      const Tensor index =
          everything ? Tensor()
                     : index_tensor(choice.examples, result.levels_, choice.width, device_);
      level = c10::make_intrusive<NarrowedLevel>(level, choice.width, index);
    }
    result.levels_.push_back(std::move(level));
    result.slots_.push_back(slots);
    result.positions_.push_back(std::move(positions));
    prefixes = std::move(slots);
  }
  return result;
}

std::vector<bool> RowSet::read(const Tensor& t) const {
  const RuleDepthScope values_only(1);
  // Level by level, innermost first: [] -> [w_k] -> [w_(k-1), w_k] ...
  Tensor value = t;
  for (size_t k = levels_.size(); k > 0; --k) {
    const Level& level = *levels_[k - 1];
    while (depth_of(value) > level.depth()) value = Tensor(as_lifted(value)->value());
    const Lowered lowered = lower(value, level);
    if (lowered.bdim) {
      value = lowered.value.movedim(*lowered.bdim, 0);
    } else {
      std::vector<int64_t> sizes{level.size()};
      sizes.insert(sizes.end(), lowered.value.sizes().begin(), lowered.value.sizes().end());
      value = lowered.value.expand(sizes);
    }
  }
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = Tensor(impl->value());
  const Tensor host = value.detach().to(c10::kCPU).contiguous();
  const bool* data = host.const_data_ptr<bool>();
  return std::vector<bool>(data, data + host.numel());
}

RowScope::RowScope(const RowSet& set) {
  for (const auto k : c10::irange(set.levels_.size())) {
    if (set.levels_[k] == set.base_[k]) continue;
    scopes_.emplace_back(
        NarrowedLevelPtr::reclaim_copy(static_cast<NarrowedLevel*>(set.levels_[k].get())));
  }
}

RowScope::~RowScope() {
  while (!scopes_.empty()) scopes_.pop_back();
}

void RowScope::check_writes(const char* transform) const {
  for (const NarrowScope& scope : scopes_) scope.check_writes(transform);
}

RowMover::RowMover(std::vector<const RowSet*> from, const RowSet& to) {
  for (const RowSet* set : from) levels_.push_back(set->levels_);
  const size_t last = to.levels_.size() - 1;
  for (const RowSet* set : from) {
    std::vector<MapPtr> maps;
    for (const auto k : c10::irange(last)) {
      maps.push_back(set->levels_[k] == to.levels_[k] ? nullptr : map_to(to, {set}, k));
    }
    alone_.push_back(std::move(maps));
  }
  if (from.size() == 1 && from[0]->levels_[last] == to.levels_[last]) return;
  together_ = map_to(to, std::move(from), last);
}

// The rows of `to` along one level, in what the sets hold there one after the other. A row of the
// levels so far that a set lacks leads to no row of it: any will do.
RowMover::MapPtr RowMover::map_to(const RowSet& to, std::vector<const RowSet*> from,
                                  size_t level) const {
  std::vector<int64_t> index;
  for (const int64_t row : to.slots_[level]) {
    int64_t start = 0;
    int64_t found = 0;
    for (const RowSet* set : from) {
      const int64_t place = set->positions_[level][row];
      if (place >= 0) {
        found = start + place;
        break;
      }
      start += set->width(level);
    }
    index.push_back(found);
  }
  auto map = std::make_shared<RowMap>();
  for (const RowSet* set : from) map->from.push_back(set->levels_[level]);
  map->to = to.levels_[level];
  const bool same =
      from.size() == 1 && is_everything(index, to.width(level), from[0]->width(level));
  if (same) return map;
  map->index = index_tensor(index, at::ArrayRef<LevelPtr>(to.levels_).slice(0, level),
                            to.width(level), to.device_);
  return map;
}

Tensor RowMover::operator()(std::vector<Tensor> sources) const {
  for (const auto i : c10::irange(sources.size())) {
    if (!sources[i].defined()) return {};
    // Something that the function closed over and handed back as it is.
    for (const LevelPtr& level : levels_[i]) sources[i] = narrow_at(sources[i], level);
    for (const MapPtr& map : alone_[i]) {
      if (map != nullptr) sources[i] = gather_rows({sources[i]}, map);
    }
  }
  return together_ == nullptr ? sources[0] : gather_rows(sources, together_);
}

std::vector<LevelPtr> levels_of(const std::vector<LevelPtr>& condition) {
  std::vector<LevelPtr> levels;
  for (const LevelPtr& level : level_stack()) {
    if (level->depth() < condition.front()->depth()) continue;
    // Where the code works for a domain outside of a level (DomainScope), none of its tensors
    // belongs to that level, and none of its results may.
    const bool at_work = is_domain(*level) || level->kind() == LevelKind::kRow;
    const bool decides = std::find(condition.begin(), condition.end(), level) != condition.end();
    if (at_work || decides) levels.push_back(level);
  }
  return levels;
}

std::vector<LevelPtr> batched_levels(const Tensor& t) {
  check_alive(t);
  std::vector<LevelPtr> levels;
  for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (!impl->bdim()) continue;
    if (impl->level().kind() != LevelKind::kVmap) {
      unsupported_error("control flow", "the condition depends on a tangent of ",
                        impl->level().describe(),
                        ": the function took a tangent apart. Decide by the primal.");
    }
    levels.push_back(narrowed_now(impl->level_ptr()));
  }
  std::reverse(levels.begin(), levels.end());
  return levels;
}

bool read_shared(const Tensor& t) {
  Tensor value = t;
  while (const LiftedTensorImpl* impl = as_lifted(value)) value = Tensor(impl->value());
  return value.item<bool>();
}

}  // namespace torchlift
