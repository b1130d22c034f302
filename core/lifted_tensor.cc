#include "core/lifted_tensor.h"

#include <c10/core/StorageImpl.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/narrow.h"

namespace torchlift {
namespace {

constexpr const char* kNoData =
    "[vmap] This tensor stands for a whole batch of values, so it has no data pointer: "
    ".data_ptr(), "
    ".numpy(), .tolist() and printing single elements are not possible inside vmap. Return the "
    "tensor "
    "from the function and look at the result, or use torchlift.dump_tensor(x) to see what it "
    "holds.";

// One storage for all tensors with a batch dim: it has no bytes, and whoever asks for its data gets
// kNoData.
const c10::Storage& no_data_storage() {
  static const c10::Storage storage = [] {
    c10::Storage s(c10::Storage::use_byte_size_t(), 0, c10::DataPtr(nullptr, c10::kCPU),
                   /*allocator=*/nullptr, /*resizable=*/false);
    s.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(kNoData);
    return s;
  }();
  return storage;
}

// What may be asked of that storage without reading it.
const c10::Storage& comparable_storage() {
  static const c10::Storage storage(c10::Storage::use_byte_size_t(), 0,
                                    c10::DataPtr(nullptr, c10::kCPU), /*allocator=*/nullptr,
                                    /*resizable=*/false);
  return storage;
}

// A tensor without a batch dim has the data of its value, in the same place: .numpy(), .tolist()
// and code that writes through a pointer work as without a level. Not where the value belongs to an
// outer level, which may give it a batch dim unnoticed here.
const c10::Storage& storage_for(const at::Tensor& value, bool batched) {
  if (batched || is_lifted(value) || !value.has_storage()) return no_data_storage();
  return value.storage();
}

// What is_conj() and is_neg() tell: the value has yet to be conjugated, or negated. The keys never
// take part in dispatch here, since the front key comes before them and masks them; but composite
// operators ask, and so does autograd, which wants a tangent to answer as its primal does.
constexpr c10::DispatchKeySet kLazyKeys({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative});

// Our keys, and the autocast key of the value's device: autocast decides on the operator the user
// wrote.
c10::DispatchKeySet lifted_keys(const at::Tensor& value) {
  constexpr c10::DispatchKeySet kOwn({kFrontKey, kBackKey, kMarkerKey});
  return kOwn | (value.key_set() & c10::autocast_dispatch_keyset);
}

// What TensorImpl would add for autograd.
c10::DispatchKeySet autograd_keys() {
  static const c10::DispatchKeySet keys =
      c10::getAutogradRelatedKeySetFromBackend(c10::toBackendComponent(kBackKey));
  return keys;
}

[[noreturn]] void escaped(const Level& level) {
  unsupported_error(level.transform(), "A tensor of ", level.describe(),
                    " was used after that level had ended, or on a thread that never entered it: "
                    "it escaped from the "
                    "function, through a global, a closure, an attribute or an exception. Return "
                    "it from the function "
                    "instead; what ",
                    level.transform(), " returns can be used anywhere.");
}

}  // namespace

void ViewGroup::add(c10::TensorImpl* member) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (members_.size() >= limit_) {
    members_.erase(
        std::remove_if(members_.begin(), members_.end(), [](const auto& m) { return m.expired(); }),
        members_.end());
    limit_ = 2 * members_.size() + 8;
  }
  members_.emplace_back(
      c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(member));
}

std::vector<at::Tensor> ViewGroup::alive() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<at::Tensor> found;
  for (const Member& member : members_) {
    auto strong = member.lock();
    if (strong) found.emplace_back(std::move(strong));
  }
  return found;
}

namespace {

// The group of a tensor that is being copied, a new one if it has none. Null where others hold the
// value as well, as they do a model's weight: nothing will be promoted then. The engine's threads
// may copy a tensor that was saved at the same time.
c10::intrusive_ptr<ViewGroup> group_to_copy(LiftedTensorImpl& t) {
  if (t.bdim()) return {};
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!t.group() && t.value().use_count() == 1) t.join(c10::make_intrusive<ViewGroup>());
  return t.group();
}

}  // namespace

// One is made for every operator, so the constructor takes the short way: TensorImpl starts as a
// view, for which it works out no keys, and without autograd keys, for which it makes no version
// counter.
//
// The counter is not the value's unless the caller says so: rules of operators like batch_norm,
// which write statistics unseen by autograd, write values in place.
LiftedTensorImpl::LiftedTensorImpl(at::Tensor value, std::optional<int64_t> bdim, LevelPtr level)
    : TensorImpl(TensorImpl::VIEW, c10::Storage(storage_for(value, bdim.has_value())),
                 lifted_keys(value), value.dtype()),
      value_(std::move(value)),
      bdim_(bdim.value_or(-1)),
      level_(std::move(level)) {
  device_opt_ = value_.device();
  if (C10_LIKELY(!c10::InferenceMode::is_enabled())) {
    key_set_ = key_set_ | autograd_keys();
    set_version_counter(c10::VariableVersion(/*version=*/0));
  }
  refresh_metadata();
}

void LiftedTensorImpl::refresh_metadata() {
  if (C10_UNLIKELY(value_.layout() != c10::kStrided)) {
    // It has no strides: those of a contiguous tensor stand in.
    std::vector<int64_t> shown = value_.sizes().vec();
    if (bdim_ >= 0) shown.erase(shown.begin() + bdim_);
    set_sizes_contiguous(shown);
    return;
  }
  const auto sizes = value_.sizes();
  const auto strides = value_.strides();
  const auto rank = static_cast<int64_t>(sizes.size());
  const int64_t shown = bdim_ < 0 ? rank : rank - 1;
  sizes_and_strides_.resize(shown);
  int64_t* const shown_sizes = sizes_and_strides_.sizes_data();
  int64_t* const shown_strides = sizes_and_strides_.strides_data();
  int64_t numel = 1;
  for (int64_t dim = 0, out = 0; dim < rank; ++dim) {
    if (dim == bdim_) continue;
    shown_sizes[out] = sizes[dim];
    shown_strides[out] = strides[dim];
    numel *= sizes[dim];
    ++out;
  }
  numel_ = numel;
  storage_offset_ = value_.storage_offset();
  key_set_ = (key_set_ - kLazyKeys) | (value_.key_set() & kLazyKeys);
  if (bdim_ < 0) storage_ = storage_for(value_, /*batched=*/false);  // set_() changes it
  if (C10_LIKELY(bdim_ <= 0 && shown < 4 && value_.is_contiguous() && value_.numel() > 0)) {
    is_contiguous_ = is_non_overlapping_and_dense_ = true;
    is_channels_last_ = is_channels_last_contiguous_ = false;
    is_channels_last_3d_ = is_channels_last_3d_contiguous_ = false;
  } else {
    refresh_contiguous();
  }
}

void LiftedTensorImpl::replace_value(at::Tensor value, std::optional<int64_t> bdim) {
  value_ = std::move(value);
  bdim_ = bdim.value_or(-1);
  if (bdim_ >= 0) storage_ = no_data_storage();
  refresh_metadata();
}

namespace {

// Whether they are one: a VariableVersion is a pointer to it, and has no comparison.
bool same_counter(const c10::VariableVersion& a, const c10::VariableVersion& b) {
  static_assert(sizeof(c10::VariableVersion) == sizeof(void*));
  return std::memcmp(&a, &b, sizeof(a)) == 0;
}

}  // namespace

c10::intrusive_ptr<c10::TensorImpl> LiftedTensorImpl::shallow_copy_and_detach(
    const c10::VariableVersion& version_counter, bool allow_tensor_metadata_change) const {
  if (!level_) {
    return TensorImpl::shallow_copy_and_detach(version_counter, allow_tensor_metadata_change);
  }
  const auto group = group_to_copy(const_cast<LiftedTensorImpl&>(*this));
  // Autograd makes copies of what it saves, which share the version counter, and of those when it
  // reads them, which may change their metadata. Else it is x.data, a constant in all domains.
  const bool saved =
      allow_tensor_metadata_change || same_counter(version_counter, this->version_counter());
  auto copy =
      c10::make_intrusive<LiftedTensorImpl>(saved ? value_ : value_.detach(), bdim(), level_);
  copy->set_version_counter(version_counter);
  copy->set_allow_tensor_metadata_change(allow_tensor_metadata_change);
  if (group) {
    copy->join(group);
    level_->note_shared(copy.get());
  }
  return copy;
}

c10::intrusive_ptr<c10::TensorImpl> LiftedTensorImpl::shallow_copy_and_detach(
    c10::VariableVersion&& version_counter, bool allow_tensor_metadata_change) const {
  const c10::VariableVersion& version = version_counter;
  return shallow_copy_and_detach(version, allow_tensor_metadata_change);
}

void LiftedTensorImpl::shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& impl) {
  if (!level_) return TensorImpl::shallow_copy_from(impl);
  const auto* from =
      impl->key_set().has(kFrontKey) ? static_cast<const LiftedTensorImpl*>(impl.get()) : nullptr;
  if (from == nullptr || from->level_ != level_) {
    unsupported_error(
        "vmap",
        "`x.data = y` cannot make a tensor of a level hold one from outside of it. Use "
        "x.copy_(y), or make a new tensor.");
  }
  // The two share y's memory from now on, and no gradient, in any domain.
  group_.reset();
  replace_value(from->value_.detach(), from->bdim());
  if (from->group_) join(from->group_);
}

void LiftedTensorImpl::join(const c10::intrusive_ptr<ViewGroup>& group) {
  if (group_ == group) return;
  group_ = group;
  group_->add(this);
}

bool LiftedTensorImpl::has_data() const {
  return storage_.unsafeGetStorageImpl() != no_data_storage().unsafeGetStorageImpl();
}

#ifndef C10_DISABLE_TENSORIMPL_EXTENSIBILITY
const c10::Storage& LiftedTensorImpl::storage() const {
  return has_data() ? storage_ : comparable_storage();
}
#endif

const char* LiftedTensorImpl::tensorimpl_type_name() const { return "torchlift lifted tensor"; }

void LiftedTensorImpl::release_resources() {
  TensorImpl::release_resources();
  value_.reset();
  group_.reset();
}

namespace {

// NOTE [nested and quantized tensors]
// The sizes of a nested tensor differ from example to example, so it has none that a tensor of a
// level could show. Few operators take quantized tensors, and each its own: a batched one would get
// no further than the operator that dequantizes it. Either is refused where it would become a
// tensor of a level; a quantized one that all examples share may.
[[noreturn]] void throw_cannot_lift(const at::Tensor& value, const Level& level) {
  if (value.is_nested()) {
    unsupported_error(level.transform(), "a nested tensor meets or becomes a tensor of ",
                      level.describe(),
                      ", but its examples differ in shape and it has no sizes to show. Use "
                      "to_padded_tensor() on it before ",
                      level.transform(), ", or loop over its unbind().");
  }
  unsupported_error(level.transform(), "a quantized tensor (", value.scalar_type(),
                    ") would differ between the examples of ", level.describe(),
                    ", but operators on quantized tensors have no batching rules. Compute with "
                    "dequantize() of it; fake_quantize_per_tensor_affine rounds as quantization "
                    "does, and returns an ordinary tensor.");
}

}  // namespace

at::Tensor lift(at::Tensor value, std::optional<int64_t> bdim, const LevelPtr& level) {
  constexpr c10::DispatchKeySet kSpecial(
      {c10::DispatchKey::NestedTensor, c10::DispatchKey::Quantized});
  if (C10_UNLIKELY(value.key_set().has_any(kSpecial)) && (value.is_nested() || bdim.has_value())) {
    throw_cannot_lift(value, *level);
  }
  return at::detail::make_tensor<LiftedTensorImpl>(std::move(value), bdim, level);
}

namespace {

void share_version_counter(const at::Tensor& lifted, const at::Tensor& value) {
  if (value.is_inference() || lifted.is_inference()) return;
  lifted.unsafeGetTensorImpl()->set_version_counter(value.unsafeGetTensorImpl()->version_counter());
}

}  // namespace

at::Tensor lift_shared(at::Tensor value, const LevelPtr& level) {
  // A lifted tensor shows no sparse layout, and no nested sizes. Unless autograd is to record it in
  // the level's domain, the value itself will do, as for tensors from outside.
  const auto excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  if ((value.layout() != c10::kStrided || value.is_nested()) &&
      !excluded.has(c10::DispatchKey::AutogradFunctionality)) {
    // Autograd may be about to make a view of it in the level's domain, which one of its own has no
    // room for.
    const bool is_view = value.unsafeGetTensorImpl()->autograd_meta() != nullptr;
    return is_view && !value.requires_grad() ? value.detach() : value;
  }
  at::Tensor lifted = lift(std::move(value), std::nullopt, level);
  // It may become the value, and must be as old as it then.
  share_version_counter(lifted, as_lifted(lifted)->value());
  level->note_shared(lifted.unsafeGetTensorImpl());
  return lifted;
}

at::Tensor lift_alias(const at::Tensor& value, std::optional<int64_t> bdim, const LevelPtr& level) {
  if (C10_UNLIKELY(!level->usual()) && !bdim && narrows_level_of(*level, value)) {
    return narrow(value, level);
  }
  at::Tensor lifted = lift(value, bdim, level);
  share_version_counter(lifted, value);
  return lifted;
}

Lowered lower(const at::Tensor& t, const Level& level) {
  const LiftedTensorImpl* impl = t.defined() ? as_lifted(t) : nullptr;
  if (impl == nullptr) return {t, std::nullopt};
  if (&impl->level() == &level) return {impl->value(), impl->bdim()};
  if (C10_UNLIKELY(!level.usual()) && narrows_level_of(level, t)) {
    const at::Tensor narrowed = narrow(t, LevelPtr::reclaim_copy(const_cast<Level*>(&level)));
    return {as_lifted(narrowed)->value(), as_lifted(narrowed)->bdim()};
  }
  if (!impl->level().alive() || impl->level().depth() >= level.depth()) escaped(impl->level());
  return {t, std::nullopt};
}

void check_alive(const at::TensorBase& t) {
  for (const LiftedTensorImpl* impl = as_lifted(t); impl != nullptr;
       impl = as_lifted(impl->value())) {
    if (C10_UNLIKELY(!impl->level().alive())) escaped(impl->level());
  }
}

}  // namespace torchlift
