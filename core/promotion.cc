#include "core/promotion.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/_conj.h>
#include <ATen/ops/_neg_view.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/view_as_real.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/dispatch.h"
#include "core/error.h"
#include "core/interpreter.h"

namespace torchlift {
namespace {

LiftedTensorImpl* shared_impl(const at::Tensor& t) {
  LiftedTensorImpl* impl = as_lifted(t);
  return impl != nullptr && !impl->bdim() ? impl : nullptr;
}

// --- who holds a memory --------------------------------------------------------------------------

// The references to its base that autograd gives a view: for reverse mode and for forward mode,
// unless these have the same to say. A view that as_strided cannot make (view_as_real, conj) also
// has a function to undo it, which holds what it was taken of. That may be another view: then the
// count goes wrong, on the safe side, as that other one has a reference too many.
c10::SmallVector<at::TensorBase, 2> bases_of(const at::TensorBase& value) {
  const auto* meta = torch::autograd::impl::get_view_autograd_meta(value);
  if (meta == nullptr) return {};
  c10::SmallVector<at::TensorBase, 2> bases;
  const auto add = [&](const torch::autograd::ViewInfo& view) {
    bases.append(view.has_view_fn() ? 2 : 1, view.base_);
  };
  if (meta->has_bw_view()) add(meta->get_backward_view());
  if (meta->has_fw_view() && !meta->shared_view_info()) add(meta->get_forward_view());
  return bases;
}

// Counts references that are accounted for: to values, to the bases of views among them, and to
// storages.
class Holdings {
 public:
  void add(const at::TensorBase& value) {
    c10::TensorImpl* impl = value.unsafeGetTensorImpl();
    if (++tensors_[impl] > 1) return;
    for (const at::TensorBase& base : bases_of(value)) add(base);
    add_contents(value);
  }

  // What the tensor itself holds.
  void add_contents(const at::TensorBase& t) {
    if (const LiftedTensorImpl* lifted = as_lifted(t)) {
      add(lifted->value());
      if (!lifted->has_data()) return;
    }
    if (t.has_storage()) {
      ++storages_[t.storage().unsafeGetStorageImpl()];
    } else {
      foreign_ = true;
    }
  }

  // Whether nobody else holds any of it.
  bool complete() const {
    if (foreign_ || storages_.size() != 1) return false;
    for (const auto& [impl, count] : tensors_) {
      if (c10::raw::intrusive_ptr::use_count(impl) != count) return false;
    }
    const auto& [storage, count] = *storages_.begin();
    return c10::raw::intrusive_ptr::use_count(storage) == count;
  }

 private:
  std::unordered_map<c10::TensorImpl*, size_t> tensors_;
  std::unordered_map<c10::StorageImpl*, size_t> storages_;
  bool foreign_ = false;
};

// --- the members of a group ----------------------------------------------------------------------

// Those that share memory with the target, and itself.
std::vector<at::Tensor> members_of(const at::Tensor& target) {
  const auto& group = as_lifted(target)->group();
  if (!group) return {target};
  std::vector<at::Tensor> members;
  for (const at::Tensor& member : group->alive()) {
    const LiftedTensorImpl* impl = shared_impl(member);
    if (impl != nullptr && impl->group() == group) members.push_back(member);
  }
  return members;
}

at::Tensor base_of(const at::Tensor& value) {
  return value.is_view() ? at::Tensor(value._base()) : value;
}

// The value in all levels.
at::Tensor innermost(at::Tensor t) {
  while (const LiftedTensorImpl* impl = as_lifted(t)) t = at::Tensor(impl->value());
  return t;
}

// A tensor whose elements are those in memory. conj() and imag() may give others.
bool shows_memory(const at::Tensor& t) {
  const at::Tensor value = innermost(t);
  return !value.is_conj() && !value.is_neg();
}

// The value that all others are views of. Where there are several, as after detach(), any that
// shows the memory will do, as long as autograd has no part in it. Undefined if there is none.
at::Tensor root_of(const std::vector<at::Tensor>& members) {
  at::Tensor root;
  for (const at::Tensor& member : members) {
    const at::Tensor base = base_of(as_lifted(member)->value());
    if (!root.defined() && shows_memory(base)) root = base;
    const bool tracked = base.requires_grad() || (root.defined() && root.requires_grad());
    if (tracked && !base.is_same(root)) return {};
  }
  return root;
}

// One past the last byte that t has.
int64_t end_of(const at::Tensor& t) {
  int64_t end = t.storage_offset() + 1;
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    if (t.size(dim) == 0) return 0;
    end += (t.size(dim) - 1) * t.stride(dim);
  }
  return end * static_cast<int64_t>(t.element_size());
}

// --- the new memory ------------------------------------------------------------------------------

bool fills(const at::Tensor& t, int64_t numel) {
  return t.is_contiguous() && t.storage_offset() == 0 && t.numel() == numel;
}

// A copy of the root's memory, of numel elements, for each example (or what the level's interpreter
// makes of it): [B, ...the root's sizes], or [B, numel] if the root is only a part of it, or if
// `flat`.
at::Tensor copies_of(const at::Tensor& root, int64_t numel, const Level& level, bool flat) {
  at::Tensor whole = root;
  if (!fills(root, numel)) {
    whole = at::as_strided(root, {numel}, {1}, 0);
  } else if (flat) {
    whole = root.view({numel});
  }
  if (level.interpreter() != nullptr) return level.interpreter()->spread(whole, level.size());
  c10::SmallVector<int64_t, 6> sizes{level.size()};
  sizes.append(whole.sizes().begin(), whole.sizes().end());
  return whole.expand(sizes).clone(at::MemoryFormat::Contiguous);
}

// The memory as elements of another type: view_as_real(), view(dtype).
at::Tensor as_type(const at::Tensor& memory, at::ScalarType type) {
  if (memory.scalar_type() == type) return memory;
  const bool parts = memory.is_complex() && c10::toRealValueType(memory.scalar_type()) == type;
  return parts ? at::view_as_real(memory).flatten(1) : memory.view(type);
}

// The part of the new memory that `value` was of the old.
at::Tensor part_of(const at::Tensor& memory, const at::Tensor& value) {
  c10::SmallVector<int64_t, 6> sizes{memory.size(0)};
  sizes.append(value.sizes().begin(), value.sizes().end());
  const int64_t numel = c10::multiply_integers(memory.sizes().slice(1));
  if (fills(value, numel)) return memory.view(sizes);
  c10::SmallVector<int64_t, 6> strides{numel};
  strides.append(value.strides().begin(), value.strides().end());
  return at::as_strided(memory, sizes, strides, value.storage_offset());
}

// Whether a view is of another type than the root, or makes something of it lazily.
bool is_function_of(const at::Tensor& value, const at::Tensor& root) {
  return value.scalar_type() != root.scalar_type() || !shows_memory(value);
}

// The same with what `value` makes of it lazily: done to the memory first, which is flat then, so
// that autograd takes note of the memory only, and the references can be counted in the level
// around too.
at::Tensor counterpart(const at::Tensor& memory, const at::Tensor& value) {
  // What others are views of stays no view itself.
  if (base_of(value).is_same(value) && memory.sizes().slice(1) == value.sizes() &&
      memory.scalar_type() == value.scalar_type()) {
    return memory;
  }
  const at::Tensor shown = innermost(value);
  at::Tensor elements = as_type(memory, value.scalar_type());
  if (shown.is_conj()) elements = at::_conj(elements);
  if (shown.is_neg()) elements = at::_neg_view(elements);
  return part_of(elements, value);
}

void give_batch_dim(const std::vector<at::Tensor>& members, const at::Tensor& root,
                    const Level& level) {
  // What is done here is no operator of the function's, so its no_grad() does not mean this.
  const at::AutoGradMode recorded(true);
  int64_t end = end_of(root);
  for (const at::Tensor& member : members) end = std::max(end, end_of(as_lifted(member)->value()));
  const auto size = static_cast<int64_t>(root.element_size());
  const bool flat = std::any_of(members.begin(), members.end(), [&](const at::Tensor& member) {
    return is_function_of(as_lifted(member)->value(), root);
  });
  const at::Tensor memory = copies_of(root, (end + size - 1) / size, level, flat);
  // For each value that others are views of: the new memory. Autograd knows of no connection
  // between two of them (one is the other's detach()), so there must be none here.
  std::unordered_map<c10::TensorImpl*, at::Tensor> memories;
  for (const at::Tensor& member : members) {
    LiftedTensorImpl* impl = as_lifted(member);
    at::Tensor& own = memories[base_of(impl->value()).unsafeGetTensorImpl()];
    if (!own.defined()) own = memories.size() == 1 ? memory : memory.detach();
    if (!impl->group()) impl->join(c10::make_intrusive<ViewGroup>());
    impl->group()->keep(member.storage());
    impl->replace_value(counterpart(own, impl->value()), 0);
  }
}

}  // namespace

void note_view(const at::Tensor& view, const at::Tensor& base) {
  LiftedTensorImpl* of_view = shared_impl(view);
  LiftedTensorImpl* of_base = shared_impl(base);
  if (of_view == nullptr || of_base == nullptr || &of_view->level() != &of_base->level()) return;
  if (!of_base->group()) {
    // A value that somebody outside holds too, such as a model's weight, will never be promoted.
    const auto holders = c10::raw::intrusive_ptr::use_count(of_base->value().unsafeGetTensorImpl());
    if (holders > 1 + bases_of(of_view->value()).size()) return;
    of_base->join(c10::make_intrusive<ViewGroup>());
  }
  of_view->join(of_base->group());
}

void note_views(const std::vector<at::Tensor>& views, const at::Tensor& base) {
  LiftedTensorImpl* of_base = shared_impl(base);
  if (of_base == nullptr) return;
  // All of them hold the base, so the count above tells nothing.
  if (!of_base->group()) of_base->join(c10::make_intrusive<ViewGroup>());
  for (const at::Tensor& view : views) note_view(view, base);
}

void promote(const char* op, const at::Tensor& target, const LevelPtr& level) {
  const LiftedTensorImpl* impl = as_lifted(target);
  if (impl == nullptr || &impl->level() != level.get()) {
    throw_write_to_unbatched(op, target, *level);
  }
  if (impl->bdim()) return;
  const std::vector<at::Tensor> members = members_of(target);
  Holdings holdings;
  for (const at::Tensor& member : members) holdings.add_contents(member);
  if (!holdings.complete()) throw_write_to_unbatched(op, target, *level);
  const at::Tensor root = root_of(members);
  if (!root.defined()) throw_write_to_unbatched(op, target, *level);
  give_batch_dim(members, root, *level);
}

// --- factories -----------------------------------------------------------------------------------

at::Tensor made_inside(at::Tensor made) {
  if (!made.defined() || is_tracked(made) || !kPlainKeys.has_all(made.key_set())) return made;
  for (const LevelPtr& level : level_stack()) {
    if (level->depth() >= rule_depth()) break;
    const bool promotes =
        level->kind() == LevelKind::kVmap || level->kind() == LevelKind::kInterpreted;
    if (!promotes || !is_domain(*level)) continue;
    if (depth_of(made) >= level->depth()) continue;
    made = lift_shared(std::move(made), level);
  }
  return made;
}

}  // namespace torchlift
