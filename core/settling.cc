// settle(): see NOTE [what outlives a level] in core/lifted_tensor.h.

#include <torch/csrc/autograd/variable.h>

#include "core/lifted_tensor.h"

namespace torchlift {
namespace {

using torch::autograd::AutogradMeta;
using torch::autograd::DifferentiableViewMeta;

const AutogradMeta* meta_of(const c10::TensorImpl& t) {
  return static_cast<const AutogradMeta*>(t.autograd_meta());
}

bool has_tangent(const AutogradMeta& meta) { return meta.fw_grad_ && !meta.fw_grad_->empty(); }

const DifferentiableViewMeta* view_meta(const AutogradMeta& meta) {
  return meta.is_view_ ? static_cast<const DifferentiableViewMeta*>(&meta) : nullptr;
}

// The tensor that autograd knows t to be a view of; undefined if t is none.
at::Tensor base_of(const AutogradMeta& meta) {
  const DifferentiableViewMeta* view = view_meta(meta);
  if (view == nullptr) return {};
  if (view->has_bw_view()) return view->get_backward_view().base_;
  return view->has_fw_view() ? view->get_forward_view().base_ : at::Tensor();
}

// Whether the outer domain has nothing to say of the value, or no more than that it is an output of
// a node.
bool value_allows(const c10::TensorImpl& value, bool recorded) {
  const AutogradMeta* meta = meta_of(value);
  if (meta == nullptr) return true;
  // As a tangent's, which must have none in turn, it would be taken for one of another order.
  if (has_tangent(*meta)) return false;
  if (!meta->requires_grad()) return true;
  return meta->grad_fn_ != nullptr && !meta->is_view_ && !recorded;
}

// Whether a TensorImpl of our class can stand for it.
bool is_ordinary(const at::Tensor& value) {
  const c10::DispatchKeySet lazy({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});
  return value.has_storage() && !value.is_inference() && kPlainKeys.has_all(value.key_set() - lazy);
}

bool can_settle(LiftedTensorImpl& shared) {
  if (shared.bdim() || shared.is_inference() || !is_ordinary(shared.value())) return false;
  const AutogradMeta* meta = meta_of(shared);
  if (!value_allows(*shared.value().unsafeGetTensorImpl(), meta != nullptr)) return false;
  if (meta == nullptr) return true;
  if (meta->grad_fn_ || has_tangent(*meta)) return false;
  const at::Tensor base = base_of(*meta);
  if (!base.defined()) return !meta->is_view_;
  if (base.requires_grad()) return false;
  LiftedTensorImpl* of_base = as_lifted(base);
  // A base of no level, or of one around, has settled before.
  return of_base == nullptr || &of_base->level() != &shared.level() || can_settle(*of_base);
}

}  // namespace

void settle(LiftedTensorImpl& shared) {
  if (!shared.level_ || !can_settle(shared)) return;
  const at::Tensor value = std::move(shared.value_);
  const auto* value_meta = meta_of(*value.unsafeGetTensorImpl());
  shared.set_version_counter(value.unsafeGetTensorImpl()->version_counter());
  shared.group_.reset();
  if (const LiftedTensorImpl* outer = as_lifted(value)) {
    shared.level_ = outer->level_;
    shared.replace_value(outer->value_, outer->bdim());
    if (outer->group_) shared.join(outer->group_);
    if (!outer->bdim()) shared.level_->note_shared(&shared);
  } else {
    shared.level_.reset();
    shared.key_set_ = value.key_set();
  }
  const AutogradMeta* meta = meta_of(shared);
  const at::Tensor self(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(&shared));
  if (meta == nullptr && value_meta != nullptr && value_meta->grad_fn_) {
    torch::autograd::impl::set_gradient_edge(self, {value_meta->grad_fn_, value_meta->output_nr_});
  }
  if (meta == nullptr) return;
  const at::Tensor base = base_of(*meta);
  if (!base.defined()) return;
  if (auto* view = torch::autograd::impl::get_view_autograd_meta(self); view->has_bw_view()) {
    view->set_attr_version(shared.version_counter().current_version());
  }
  if (LiftedTensorImpl* of_base = as_lifted(base)) {
    if (of_base->level_ != shared.level_) settle(*of_base);
  }
}

}  // namespace torchlift
