#include "core/narrow.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/movedim.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include <string>
#include <utility>

#include "core/autograd_node.h"
#include "core/derivative_code.h"
#include "core/dispatch.h"
#include "core/error.h"
#include "core/interpreter.h"
#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using MapPtr = std::shared_ptr<const RowMap>;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::variable_list;

bool belongs_to(const Tensor& t, const Level& level) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  return impl != nullptr && &impl->level() == &level;
}

// The deepest level among the tensors, if it is inside of `level`; else null.
LevelPtr level_inside(const Tensors& tensors, const Level& level) {
  const LiftedTensorImpl* deepest = nullptr;
  int64_t depth = level.depth();
  for (const Tensor& t : tensors) {
    if (!t.defined() || depth_of(t) <= depth) continue;
    deepest = as_lifted(t);
    depth = depth_of(t);
  }
  return deepest == nullptr ? LevelPtr() : deepest->level_ptr();
}

// The value of t at the level with the examples in dim 0, of which there are `size`; or the parts
// that an interpreter works on (core/interpreter.h).
Tensor all_rows(const Tensor& t, const Level& level) {
  const Lowered lowered = lower(t, level);
  if (lowered.bdim) {
    return *lowered.bdim == 0 ? lowered.value : lowered.value.movedim(*lowered.bdim, 0);
  }
  if (level.interpreter() != nullptr) {
    return level.interpreter()->spread(lowered.value, level.size());
  }
  std::vector<int64_t> sizes{level.size()};
  sizes.insert(sizes.end(), lowered.value.sizes().begin(), lowered.value.sizes().end());
  return lowered.value.expand(sizes);
}

// `rows` as a value of a level, which takes them for examples unless it has none (jvp).
Tensor lift_rows(const Tensor& rows, const LevelPtr& level) {
  if (level->kind() == LevelKind::kJvp) return lift(rows.select(0, 0), std::nullopt, level);
  return lift(rows, 0, level);
}

Tensor index_for(const RowMap& map, const Tensor& value) {
  return map.index.device() == value.device() ? map.index : map.index.to(value.device());
}

// Tensors of one level inside, without it: batched all or none.
struct Stripped {
  Tensors values;
  std::optional<int64_t> bdim;
};

Stripped strip(const Tensors& tensors, const Level& level) {
  bool batched = false;
  for (const Tensor& t : tensors) {
    batched = batched || (belongs_to(t, level) && as_lifted(t)->bdim().has_value());
  }
  Stripped result;
  if (batched) result.bdim = 0;
  for (const Tensor& t : tensors) {
    result.values.push_back(batched ? all_rows(t, level) : lower(t, level).value);
  }
  return result;
}

// --- autograd ------------------------------------------------------------------------------------

Tensors scatter_rows(const Tensor& result, const MapPtr& map);

// A tensor, shared by all examples, of zeros for each that is undefined; false if all are.
bool fill_zeros(variable_list& tensors) {
  const Tensor* defined = nullptr;
  for (const Tensor& t : tensors) {
    if (t.defined()) defined = &t;
  }
  if (defined == nullptr) return false;
  for (Tensor& t : tensors) {
    if (!t.defined()) t = at::zeros(defined->sizes(), defined->options());
  }
  return true;
}

struct GatherRowsBackward final : public Node {
  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(map->from.size());
    const RuleDepthScope values_only(1);
    return scatter_rows(grads[0], map);
  }
  std::string name() const override { return "GatherRowsBackward"; }

  MapPtr map;
};

struct ScatterRowsBackward final : public Node {
  variable_list apply(variable_list&& grads) override {
    const RuleDepthScope values_only(1);
    if (!fill_zeros(grads)) return {Tensor()};
    return {gather_rows(grads, map)};
  }
  std::string name() const override { return "ScatterRowsBackward"; }

  MapPtr map;
};

// Makes `results` the outcome of a linear function of `inputs`, which is recorded for those that
// belong to the level beside them: Backward is the node whose formula is the transpose, and
// `forward` the function itself.
template <class Backward, class F>
void connect(const Tensors& results, const Tensors& inputs, const std::vector<LevelPtr>& levels,
             const MapPtr& map, F&& forward) {
  bool tracked = false;
  bool dual = false;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (!belongs_to(inputs[i], *levels[i])) continue;
    tracked = tracked || (c10::GradMode::is_enabled() && inputs[i].requires_grad());
    dual = dual || inputs[i]._fw_grad(kDual).defined();
  }
  if (tracked) {
    auto node = make_node<Backward>();
    node->map = map;
    for (size_t i = 0; i < inputs.size(); ++i) {
      const bool edge = belongs_to(inputs[i], *levels[i]) && inputs[i].requires_grad();
      node->add_next_edge(edge ? torch::autograd::impl::gradient_edge(inputs[i]) : Edge());
    }
    for (const Tensor& result : results) torch::autograd::set_history(result, node);
    note_nodes();
  }
  if (!dual || forward_mode_cut()) return;
  Tensors tangents;
  for (size_t i = 0; i < inputs.size(); ++i) {
    const Tensor& t = inputs[i];
    const bool own = belongs_to(t, *levels[i]) && t._fw_grad(kDual).defined();
    tangents.push_back(own ? t._fw_grad(kDual) : at::zeros(t.sizes(), t.options()));
  }
  const Tensors moved = forward(tangents);
  for (size_t i = 0; i < results.size(); ++i) {
    results[i]._set_fw_grad(moved[i], kDual, /*is_inplace_op=*/false);
  }
}

// --- the functions, each other's transpose -----------------------------------------------------

Tensor gathered_values(const Tensors& sources, const RowMap& map) {
  const OuterGradScope outer_grad(*map.to);
  if (sources.size() == 1) {
    // All examples have it.
    if (depth_of(sources[0]) < map.to->depth()) return sources[0];
    const Lowered source = lower(sources[0], *map.from[0]);
    if (!source.bdim || !map.index.defined()) return lift(source.value, source.bdim, map.to);
    const Tensor index = index_for(map, source.value);
    return lift(source.value.index_select(*source.bdim, index), source.bdim, map.to);
  }
  Tensors rows;
  for (size_t i = 0; i < sources.size(); ++i) rows.push_back(all_rows(sources[i], *map.from[i]));
  const Tensor all = at::cat(rows);
  return lift_rows(all.index_select(0, index_for(map, all)), map.to);
}

// Row i of the result goes to row index[i] of the rows of map->from; where several go to one, their
// sum.
Tensors scattered_values(const Tensor& result, const RowMap& map) {
  const OuterGradScope outer_grad(*map.to);
  if (!map.index.defined()) {
    const Lowered lowered = lower(result, *map.to);
    return {lift(lowered.value, lowered.bdim, map.from[0])};
  }
  const Tensor rows = all_rows(result, *map.to);
  std::vector<int64_t> sizes = rows.sizes().vec();
  sizes[0] = 0;
  for (const LevelPtr& level : map.from) sizes[0] += level->size();
  const Tensor all = rows.new_zeros(sizes).index_add(0, index_for(map, rows), rows);
  Tensors sources;
  int64_t start = 0;
  for (const LevelPtr& level : map.from) {
    sources.push_back(lift_rows(all.narrow(0, start, level->size()), level));
    start += level->size();
  }
  return sources;
}

Tensors scatter_rows(const Tensor& result, const MapPtr& map) {
  const LevelPtr inside = level_inside({result}, *map->to);
  Tensors sources;
  if (inside) {
    const OuterGradScope outer_grad(*inside);
    const Stripped stripped = strip({result}, *inside);
    for (Tensor& value : scatter_rows(stripped.values[0], map)) {
      sources.push_back(lift(std::move(value), stripped.bdim, inside));
    }
  } else {
    sources = scattered_values(result, *map);
  }
  connect<ScatterRowsBackward>(sources, {result}, {inside ? inside : map->to}, map,
                               [&](const Tensors& t) { return scatter_rows(t[0], map); });
  return sources;
}

}  // namespace

Tensor gather_rows(const Tensors& sources, const MapPtr& map) {
  const RuleDepthScope values_only(1);
  const LevelPtr inside = level_inside(sources, *map->to);
  Tensor result;
  if (inside) {
    const OuterGradScope outer_grad(*inside);
    const Stripped stripped = strip(sources, *inside);
    result = lift(gather_rows(stripped.values, map), stripped.bdim, inside);
  } else {
    result = gathered_values(sources, *map);
  }
  connect<GatherRowsBackward>({result}, sources,
                              inside ? std::vector<LevelPtr>(sources.size(), inside) : map->from,
                              map, [&](const Tensors& t) { return Tensors{gather_rows(t, map)}; });
  return result;
}

// --- levels --------------------------------------------------------------------------------------

// A tensor of the base, and the same at the narrowed level.
struct NarrowedLevel::Brought {
  c10::weak_intrusive_ptr<c10::TensorImpl> source;
  uint32_t source_version;
  // Who recorded it: this domain, those around.
  std::pair<bool, bool> grad_modes;
  Tensor copy;
  uint32_t copy_version;
};

namespace {

uint32_t version_of(const Tensor& t) {
  return t.is_inference() ? 0 : static_cast<uint32_t>(t._version());
}

}  // namespace

NarrowedLevel::NarrowedLevel(LevelPtr base, int64_t size, Tensor rows)
    : Level(base, size), base_ptr_(std::move(base)), rows_(std::move(rows)) {}

NarrowScope::NarrowScope(NarrowedLevelPtr level)
    : level_(std::move(level)), replaced_(exchange_level(level_)) {
  level_->brought_ = std::make_shared<std::vector<NarrowedLevel::Brought>>();
  level_->evaluating_ = torch::autograd::get_current_node().get();
  level_->root_->unusual_.fetch_add(1, std::memory_order_relaxed);
}

NarrowScope::~NarrowScope() {
  level_->settle_shared();
  level_->root_->unusual_.fetch_sub(1, std::memory_order_relaxed);
  level_->brought_.reset();
  exchange_level(std::move(replaced_));
}

void NarrowScope::check_writes(const char* transform) const {
  for (const auto& brought : *level_->brought_) {
    if (version_of(brought.copy) == brought.copy_version) continue;
    unsupported_error(
        transform, "the function wrote in place into a tensor of shape ", brought.copy.sizes(),
        " that it closes over, through a view of it; it works on some of the examples only, and on "
        "copies of their rows. Pass the tensor as an operand and return the new one.");
  }
}

bool narrows_level_of(const Level& level, const Tensor& t) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  return impl != nullptr && impl->level().depth() == level.depth() && level.narrows(impl->level());
}

namespace {

// The level of this depth that t, or a value in it, belongs to, or null.
LevelPtr level_at(const Tensor& t, int64_t depth) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  while (impl != nullptr && impl->level().depth() > depth) impl = as_lifted(impl->value());
  return impl != nullptr && impl->level().depth() == depth ? impl->level_ptr() : LevelPtr();
}

}  // namespace

Tensor narrow_at(const Tensor& t, const LevelPtr& level) {
  const LevelPtr own = level_at(t, level->depth());
  if (!own || !level->narrows(*own)) return t;
  const auto& narrowed = static_cast<const NarrowedLevel&>(*level);
  const LevelPtr& base = narrowed.base_ptr();
  if (own != base) return narrow_at(narrow_at(t, base), level);
  const auto brought = narrowed.brought_;
  const std::pair<bool, bool> grad_modes(c10::GradMode::is_enabled(), outer_grad_enabled(*level));
  const bool dual = t._fw_grad(kDual).defined();
  if (brought != nullptr && !dual) {
    for (const NarrowedLevel::Brought& each : *brought) {
      if (each.source._unsafe_get_target() == t.unsafeGetTensorImpl() &&
          each.source_version == version_of(t) && each.grad_modes == grad_modes) {
        return each.copy;
      }
    }
  }
  const Tensor copy =
      gather_rows({t}, std::make_shared<RowMap>(RowMap{{base}, level, narrowed.rows()}));
  if (brought != nullptr) {
    brought->push_back({c10::weak_intrusive_ptr<c10::TensorImpl>(t.getIntrusivePtr()),
                        version_of(t), grad_modes, copy, version_of(copy)});
  }
  return copy;
}

Tensor narrow(const Tensor& t, const LevelPtr& level) {
  // Outer levels first: the rows that a level chooses are those for what the levels around chose.
  std::vector<LevelPtr> around;
  for (const LiftedTensorImpl* impl = as_lifted(as_lifted(t)->value()); impl != nullptr;
       impl = as_lifted(impl->value())) {
    around.push_back(narrowed_now(impl->level_ptr()));
  }
  Tensor result = t;
  for (auto outer = around.rbegin(); outer != around.rend(); ++outer) {
    if ((*outer)->base() != nullptr) result = narrow_at(result, *outer);
  }
  return narrow_at(result, level);
}

LevelPtr narrowed_now(const LevelPtr& level) {
  const auto& stack = level_stack();
  if (level->depth() > static_cast<int64_t>(stack.size())) return level;
  const LevelPtr& open = stack[level->depth() - 1];
  if (open == level || !open->narrows(*level)) return level;
  // In a backward pass that began inside.
  const auto node = torch::autograd::get_current_node();
  const auto& narrowed = static_cast<const NarrowedLevel&>(*open);
  return node != nullptr && !narrowed.opened_under(node.get()) ? level : open;
}

void throw_write_outside(const char* op, const Tensor& target, const Level& level) {
  unsupported_error("vmap", op, " writes in place into a tensor of shape ", target.sizes(),
                    " from outside of the branch or loop body at work, which runs for ",
                    level.describe(),
                    " and has copies of their rows. Pass the tensor as an operand, or make it part "
                    "of what the loop carries, and return the new one.");
}

}  // namespace torchlift
