#include "compile/hollow.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/TensorOptions.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "core/boxed.h"
#include "core/error.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using torch::jit::Stack;

constexpr const char* kNoMemory =
    "[trace] the memory of a tensor was asked for that has none: the function is traced by shapes "
    "alone (its arguments are on the meta device, or a torchlift.ShapeDtype). Trace it with "
    "arguments "
    "that have values.";

c10::Storage hollow_storage(size_t bytes, c10::Device device) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), bytes, c10::DataPtr(nullptr, device),
                       /*allocator=*/nullptr, /*resizable=*/false);
  storage.unsafeGetStorageImpl()->release_data_and_set_meta_custom_data_ptr_error_msg_(kNoMemory);
  return storage;
}

// A tensor that shows part of a storage as `like` shows its own.
at::Tensor shown(c10::Storage storage, const at::Tensor& like, c10::Device device) {
  const c10::DispatchKey key = c10::computeDispatchKey(like.scalar_type(), c10::kStrided, device);
  at::Tensor t = at::detail::make_tensor<c10::TensorImpl>(std::move(storage),
                                                          c10::DispatchKeySet(key), like.dtype());
  t.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(),
                                                 like.storage_offset());
  if (like.is_conj()) t._set_conj(true);
  if (like.is_neg()) t._set_neg(true);
  return t;
}

// "cuda" -> "cuda:0"
c10::Device with_index(c10::Device device) {
  if (device.has_index() || device.is_cpu()) return device;
  return c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

bool starts_with(const std::string& name, const char* start) { return name.rfind(start, 0) == 0; }

// Operators that take tensors of several devices: those that copy, and indices on the CPU.
bool mixes_devices(const std::string& op) {
  constexpr std::array<const char*, 6> kStarts = {"aten::copy",       "aten::_copy",
                                                  "aten::_foreach_copy", "aten::index",
                                                  "aten::_index_put", "aten::_unsafe_index"};
  for (const char* start : kStarts) {
    if (starts_with(op, start)) return true;
  }
  return false;
}

// One call, on meta tensors.
class MetaCall {
 public:
  MetaCall(const c10::OperatorHandle& op, const std::string& transform)
      : op_(op), transform_(transform) {}

  void run(Stack* stack) {
    const auto& arguments = op_.schema().arguments();
    const size_t first = stack->size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); ++i) {
      IValue& value = (*stack)[first + i];
      if (arguments[i].name() == "device") {
        take_device(value);
      } else if (arguments[i].name() == "pin_memory") {
        value = IValue();  // which there is none of
      } else {
        value = map_tensors(value, [&](const at::Tensor& t) { return on_meta(t); });
      }
    }
    call(stack);
    for (const auto& [meta, taken] : taken_) note_resize(taken.meta, taken.original);
    for (size_t i = stack->size() - op_.schema().returns().size(); i < stack->size(); ++i) {
      (*stack)[i] = map_tensors((*stack)[i], [&](const at::Tensor& t) { return hollowed(t); });
    }
  }

 private:
  std::string name() const { return toString(op_.operator_name()); }

  void call(Stack* stack) const {
    try {
      op_.callBoxed(*stack);
    } catch (const c10::NotImplementedError&) {
      unsupported_error(transform_, name(),
                        ": libtorch cannot tell the shape of its result without computing it (it has "
                        "no kernel for the meta device here; Python's torch brings some). Trace the "
                        "function with arguments that have values.");
    }
  }

  // --- arguments ---------------------------------------------------------------------------------

  void take_device(IValue& value) {
    // A factory makes its tensor on the CPU, if it is not told otherwise.
    if (!value.isNone()) given_device_ = with_index(value.toDevice());
    if (!value.isNone() || taken_.empty()) value = c10::Device(c10::kMeta);
  }

  at::Tensor on_meta(const at::Tensor& t) {
    // x + 2.0: kernels in Python are given the number.
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) return t;
    if (t.layout() != c10::kStrided || t.is_quantized() || !t.has_storage()) {
      unsupported_error(transform_, name(),
                        ": one of its arguments is sparse, quantized or has no strides, and the "
                        "function is traced by shapes alone. Trace it with arguments that have "
                        "values.");
    }
    if (t.is_meta()) {
      unsupported_error(transform_, name(), ": it met a tensor on the meta device (", t.sizes(),
                        ") that is not computed from the arguments, and would be a constant of the "
                        "graph without values. Pass it to the function as an argument (a module's "
                        "parameters by torchlift.functional_call).");
    }
    note_device(t);
    const auto [found, added] = taken_.try_emplace(t.unsafeGetTensorImpl());
    if (!added) return found->second.meta;
    at::Tensor meta = shown(meta_storage(t), t, c10::kMeta);
    found->second = {t, meta};
    return meta;
  }

  // What shares memory shares it here.
  c10::Storage meta_storage(const at::Tensor& t) {
    for (const auto& [meta, storage] : storages_) {
      if (storage.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) return meta;
    }
    c10::Storage meta(c10::Storage::use_byte_size_t(), t.storage().nbytes(),
                      c10::GetAllocator(c10::kMeta), /*resizable=*/true);
    storages_.emplace_back(meta, t.storage());
    return meta;
  }

  // The device of the first tensor; numbers follow the others.
  void note_device(const at::Tensor& t) {
    if (!device_.has_value() || (device_of_number_ && t.dim() > 0)) {
      device_ = t.device();
      device_of_number_ = t.dim() == 0;
      return;
    }
    if (t.dim() == 0 || t.device() == *device_ || mixes_devices(op_.schema().name())) return;
    unsupported_error(transform_, name(), ": its arguments are on ", *device_, " and on ",
                      t.device(), ". Move one of them by .to(device).");
  }

  // --- results -----------------------------------------------------------------------------------

  // set_() and resize_() are refused before.
  static void note_resize(const at::Tensor& meta, const at::Tensor& original) {
    if (meta.sizes() == original.sizes() && meta.strides() == original.strides()) return;
    original.unsafeGetTensorImpl()->set_sizes_and_strides(meta.sizes(), meta.strides(),
                                                          meta.storage_offset());
  }

  at::Tensor hollowed(const at::Tensor& t) {
    for (const auto& [impl, taken] : taken_) {
      if (t.is_same(taken.meta)) return taken.original;
    }
    if (t.layout() != c10::kStrided || !t.has_storage()) return t;
    const c10::Device device =
        t.is_meta() ? given_device_.value_or(device_.value_or(c10::kCPU)) : t.device();
    return shown(storage_of(t, device), t, device);
  }

  c10::Storage storage_of(const at::Tensor& t, c10::Device device) {
    for (const auto& [meta, storage] : storages_) {
      if (meta.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) return storage;
    }
    storages_.emplace_back(t.storage(), hollow_storage(t.storage().nbytes(), device));
    return storages_.back().second;
  }

  struct Taken {
    at::Tensor original;
    at::Tensor meta;
  };

  const c10::OperatorHandle& op_;
  const std::string& transform_;
  std::unordered_map<const c10::TensorImpl*, Taken> taken_;        // by the original
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // on meta; what it stands for
  std::optional<c10::Device> given_device_, device_;
  bool device_of_number_ = false;
};

}  // namespace

at::Tensor hollow_tensor(at::IntArrayRef sizes, at::IntArrayRef strides, at::ScalarType dtype,
                         c10::Device device) {
  return hollow_like(at::detail::empty_strided_meta(sizes, strides, dtype), device);
}

at::Tensor hollow_like(const at::Tensor& t, c10::Device device) {
  const size_t bytes = at::detail::computeStorageNbytes(t.sizes(), t.strides(), t.element_size(),
                                                        t.storage_offset());
  const c10::Device full = with_index(device);
  return shown(hollow_storage(bytes, full), t, full);
}

void call_on_shapes(const c10::OperatorHandle& op, const std::string& transform, Stack* stack) {
  MetaCall(op, transform).run(stack);
}

}  // namespace torchlift::compile
