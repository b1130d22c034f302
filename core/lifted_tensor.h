#ifndef TORCHLIFT_CORE_LIFTED_TENSOR_H_
#define TORCHLIFT_CORE_LIFTED_TENSOR_H_

// File: core/lifted_tensor.h
//
// LiftedTensor: a value that belongs to a level. For a vmap level the value has one dimension more
// than the tensor shows, its batch dim, or none when every example has the same value.
//
//   value [8, 3, 5], bdim 0, level of size 8   ->   a tensor of shape [3, 5]
//
// The value may itself be lifted at an outer level, or be tracked by autograd there. What autograd
// records on the LiftedTensor itself is this level's domain (NOTE [levels] in core/level.h).

#include <ATen/core/Tensor.h>
#include <c10/core/TensorImpl.h>

#include <cstdint>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "core/keys.h"
#include "core/level.h"

namespace torchlift {

// Lifted tensors without a batch dim that share memory: a tensor and its views. See NOTE
// [promotion] in core/promotion.h.
class ViewGroup final : public c10::intrusive_ptr_target {
 public:
  void add(c10::TensorImpl* member);
  // Those that have not been destroyed since.
  std::vector<at::Tensor> alive() const;

  // Keeps memory that the members have left, as long as one of them lives: a pointer into it may be
  // about (an array of .numpy() holds the tensor, and nothing else).
  void keep(c10::Storage left) { left_ = std::move(left); }

 private:
  using Member = c10::weak_intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>;

  mutable std::mutex mutex_;
  std::vector<Member> members_;
  size_t limit_ = 8;  // when to look for dead ones among them
  c10::Storage left_;
};

class LiftedTensorImpl final : public c10::TensorImpl {
 public:
  LiftedTensorImpl(at::Tensor value, std::optional<int64_t> bdim, LevelPtr level);

  const at::Tensor& value() const { return value_; }
  std::optional<int64_t> bdim() const {
    return bdim_ < 0 ? std::nullopt : std::optional<int64_t>(bdim_);
  }
  Level& level() const { return *level_; }
  const LevelPtr& level_ptr() const { return level_; }

  // For in-place operators that change the metadata (squeeze_, t_, resize_...): the tensor keeps
  // its identity and shows another value.
  void replace_value(at::Tensor value, std::optional<int64_t> bdim);

  // The tensors that share its memory, as far as they are known; null if there are none.
  const c10::intrusive_ptr<ViewGroup>& group() const { return group_; }
  void join(const c10::intrusive_ptr<ViewGroup>& group);

  // Whether its data is that of a plain tensor, in the same place.
  bool has_data() const;

  // Re-reads sizes and strides after the value was changed in place.
  void refresh_metadata();

  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      const c10::VariableVersion& version_counter,
      bool allow_tensor_metadata_change) const override;
  c10::intrusive_ptr<TensorImpl> shallow_copy_and_detach(
      c10::VariableVersion&& version_counter, bool allow_tensor_metadata_change) const override;
  void shallow_copy_from(const c10::intrusive_ptr<TensorImpl>& impl) override;

  void release_resources() override;

  // Of a tensor without data, a storage that may be compared with others (Tensor::is_alias_of,
  // which indexed assignment asks): the one that complains when it is read throws at that, too.
#ifndef C10_DISABLE_TENSORIMPL_EXTENSIBILITY
  const c10::Storage& storage() const override;
#endif

 private:
  friend void settle(LiftedTensorImpl& shared);

  const char* tensorimpl_type_name() const override;

  at::Tensor value_;
  int64_t bdim_;    // -1: no batch dim
  LevelPtr level_;  // null once settled as a plain tensor
  c10::intrusive_ptr<ViewGroup> group_;
};

// NOTE [what outlives a level]
// A tensor of a level that has ended means nothing any more, unless all examples share its value:
// then it is that value. A module that keeps a mask or a table it made in its forward pass would
// else keep a dead tensor. So when a level ends, what it made or computed for all examples, and is
// still alive, becomes the value: a plain tensor takes over its storage and keys, a tensor of an
// outer level the value in that. Views remain views of their base, which settles with them; leaves
// remain leaves; what an outer domain tracks remains an output of the same node there. Tensors that
// the level's own domain tracks stay as they are, and say that they escaped.

// Makes `shared` outlive its level, which is ending, if it can.
void settle(LiftedTensorImpl& shared);

// Held while an in-place operator works on the value of a LiftedTensor. Afterwards the tensor's
// version has gone up, so that autograd notices the write wherever the tensor was saved. A tensor
// that shares the value's version counter (lift_alias) has it raised by the value's own operator,
// and not once more.
class WriteScope {
 public:
  explicit WriteScope(LiftedTensorImpl* impl) : impl_(impl), before_(version()) {}
  ~WriteScope() {
    if (!impl_->is_inference() && version() == before_) impl_->bump_version();
  }
  WriteScope(const WriteScope&) = delete;
  WriteScope& operator=(const WriteScope&) = delete;

 private:
  uint32_t version() const {
    return impl_->is_inference() ? 0 : impl_->version_counter().current_version();
  }

  LiftedTensorImpl* impl_;
  uint32_t before_;
};

inline bool is_lifted(const at::TensorBase& t) {
  return t.unsafeGetTensorImpl()->key_set().has(kFrontKey);
}

// The LiftedTensorImpl behind t, or null. (libtorch's torchdistX could put the same key on another
// class: core/runtime.cc refuses to start beside it.)
inline LiftedTensorImpl* as_lifted(const at::TensorBase& t) {
  c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  return impl->key_set().has(kFrontKey) ? static_cast<LiftedTensorImpl*>(impl) : nullptr;
}

// 0 for a plain tensor, else the depth of the level it belongs to.
inline int64_t depth_of(const at::TensorBase& t) {
  const LiftedTensorImpl* impl = as_lifted(t);
  return impl == nullptr ? 0 : impl->level().depth();
}

// A value and the dim of it that holds the examples, if any.
struct Lowered {
  at::Tensor value;
  std::optional<int64_t> bdim;
};

// Makes `value` a tensor of `level`. bdim is a dim of value, 0 <= bdim < value.dim(), whose size is
// level->size(); nullopt when all examples share the value. `value` belongs to lower levels only.
at::Tensor lift(at::Tensor value, std::optional<int64_t> bdim, const LevelPtr& level);

// lift for a tensor that the caller goes on using: an in-place write to either is noticed by
// autograd wherever the other was saved (they share a version counter).
at::Tensor lift_alias(const at::Tensor& value, std::optional<int64_t> bdim, const LevelPtr& level);

// lift without a batch dim, for a tensor that the user's function sees and may keep.
at::Tensor lift_shared(at::Tensor value, const LevelPtr& level);

// The value of t at `level`; t itself, with no batch dim, when t belongs to a lower level or to
// none. Throws UnsupportedError when t belongs to a level that has ended.
Lowered lower(const at::Tensor& t, const Level& level);

// Throws UnsupportedError naming the level when t (or the value in it) belongs to a level that has
// ended: the tensor escaped from its transform.
void check_alive(const at::TensorBase& t);

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_LIFTED_TENSOR_H_
