#include "compile/hollow.h"

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/core/ivalue.h>
#include <ATen/ops/zeros.h>
#include <c10/core/Allocator.h>
#include <c10/core/Storage.h>
#include <c10/core/StorageImpl.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/TensorOptions.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <exception>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "compile/hollow_rules.h"
#include "compile/seed_scope.h"
#include "core/boxed.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/random_state.h"

namespace torchlift::compile {
namespace {

using c10::IValue;
using torch::jit::Stack;

constexpr const char* kNoMemory =
    "[trace] the memory of a tensor was asked for that has none: the function is traced by shapes "
    "alone (its arguments are on the meta device, or a torchlift.ShapeDtype). Trace it with "
    "arguments "
    "that have values.";

// Of nothing. Tells hollow storages from others.
void delete_nothing(void* /*memory*/) {}

c10::Storage hollow_storage(size_t bytes, c10::Device device) {
  c10::Storage storage(c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes),
                       c10::DataPtr(nullptr, nullptr, &delete_nothing, device),
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
  try {
    return c10::impl::VirtualGuardImpl(device.type()).getDevice();
  } catch (const std::exception&) {
    unsupported_error("trace", "the device ", device,
                      " is not to be had in this process, and only it can tell what libtorch does "
                      "there. Trace the function where it is.");
  }
}

// Operators that take tensors of several devices: those that copy, and indices on the CPU.
bool mixes_devices(const std::string& op) {
  constexpr std::array<const char*, 6> kStarts = {"aten::copy",          "aten::_copy",
                                                  "aten::_foreach_copy", "aten::index",
                                                  "aten::_index_put",    "aten::_unsafe_index"};
  for (const char* start : kStarts) {
    if (op.rfind(start, 0) == 0) return true;
  }
  return false;
}

// One call, on meta tensors, or on zeros.
class ShapeCall {
 public:
  ShapeCall(const c10::OperatorHandle& op, const std::string& transform, bool on_zeros)
      : op_(op), transform_(transform), on_zeros_(on_zeros) {}

  // The results; `arguments` are as the operator's schema has them.
  Stack run(Stack arguments) {
    const auto& formals = op_.schema().arguments();
    for (size_t i = 0; i < formals.size(); ++i) {
      if (formals[i].name() == "device") {
        take_device(arguments[i]);
      } else if (formals[i].name() == "pin_memory") {
        arguments[i] = IValue();  // which there is none of
      } else {
        arguments[i] = map_tensors(arguments[i], [&](const at::Tensor& t) { return taken(t); });
      }
    }
    op_.callBoxed(arguments);
    for (const auto& [impl, each] : taken_) note_resize(each.substitute, each.original);
    for (IValue& result : arguments) {
      result = map_tensors(result, [&](const at::Tensor& t) { return hollowed(t); });
    }
    return arguments;
  }

 private:
  std::string name() const { return toString(op_.operator_name()); }

  // --- arguments ---------------------------------------------------------------------------------

  void take_device(IValue& value) {
    // A factory makes its tensor on the CPU, if it is not told otherwise.
    if (!value.isNone()) given_device_ = with_index(value.toDevice());
    if (!on_zeros_ && (!value.isNone() || taken_.empty())) value = c10::Device(c10::kMeta);
  }

  at::Tensor taken(const at::Tensor& t) {
    // x + 2.0: kernels in Python are given the number.
    if (t.unsafeGetTensorImpl()->is_wrapped_number()) return t;
    check(t);
    note_device(t);
    const auto [found, added] = taken_.try_emplace(t.unsafeGetTensorImpl());
    if (!added) return found->second.substitute;
    found->second = {t, shown(substitute_storage(t), t, on_zeros_ ? t.device() : c10::kMeta)};
    return found->second.substitute;
  }

  void check(const at::Tensor& t) const {
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
  }

  // What shares memory shares it here.
  c10::Storage substitute_storage(const at::Tensor& t) {
    for (const auto& [substitute, storage] : storages_) {
      if (storage.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) return substitute;
    }
    storages_.emplace_back(
        on_zeros_ ? zeros(t.storage().nbytes(), t.device()) : meta_storage(t.storage().nbytes()),
        t.storage());
    return storages_.back().first;
  }

  static c10::Storage meta_storage(size_t bytes) {
    return {c10::Storage::use_byte_size_t(), static_cast<int64_t>(bytes),
            c10::GetAllocator(c10::kMeta), /*resizable=*/true};
  }

  c10::Storage zeros(size_t bytes, c10::Device device) {
    bytes_ += bytes;
    if (bytes_ > kMostBytes) throw_no_kernel();
    return at::zeros({static_cast<int64_t>(bytes)}, at::device(device).dtype(at::kByte)).storage();
  }

  [[noreturn]] void throw_no_kernel() const {
    unsupported_error(transform_, name(),
                      ": libtorch cannot tell the shape of its result without computing it (it has "
                      "no kernel for the meta device here; Python's torch brings some), and the "
                      "arguments are too large to try it on zeros. Trace the function with smaller "
                      "ones, or with arguments that have values.");
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
  static void note_resize(const at::Tensor& substitute, const at::Tensor& original) {
    if (substitute.sizes() == original.sizes() && substitute.strides() == original.strides())
      return;
    original.unsafeGetTensorImpl()->set_sizes_and_strides(substitute.sizes(), substitute.strides(),
                                                          substitute.storage_offset());
  }

  at::Tensor hollowed(const at::Tensor& t) {
    for (const auto& [impl, each] : taken_) {
      if (t.is_same(each.substitute)) return each.original;
    }
    if (t.layout() != c10::kStrided || !t.has_storage()) return t;
    const c10::Device device =
        t.is_meta() ? given_device_.value_or(device_.value_or(c10::kCPU)) : t.device();
    return shown(storage_of(t, device), t, device);
  }

  c10::Storage storage_of(const at::Tensor& t, c10::Device device) {
    for (const auto& [substitute, storage] : storages_) {
      if (substitute.unsafeGetStorageImpl() == t.storage().unsafeGetStorageImpl()) return storage;
    }
    storages_.emplace_back(t.storage(), hollow_storage(t.storage().nbytes(), device));
    return storages_.back().second;
  }

  struct Taken {
    at::Tensor original;
    at::Tensor substitute;
  };

  // Of arguments that an operator is tried on.
  static constexpr size_t kMostBytes = size_t{64} << 20;

  const c10::OperatorHandle& op_;
  const std::string& transform_;
  const bool on_zeros_;
  std::unordered_map<const c10::TensorImpl*, Taken> taken_;      // by the original
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;  // a substitute's; the original's
  size_t bytes_ = 0;                                             // of zeros
  std::optional<c10::Device> given_device_, device_;
  bool device_of_number_ = false;
};

std::vector<at::Tensor> tensors_in(const Stack& arguments) {
  std::vector<at::Tensor> tensors;
  for (const IValue& each : arguments) {
    for_each_tensor(each, [&](const at::Tensor& t) { tensors.push_back(t); });
  }
  return tensors;
}

// Where libtorch has no meta kernel, small arguments are tried as zeros.
Stack results_of(const c10::OperatorHandle& op, const std::string& transform,
                 const Stack& arguments) {
  try {
    // Asked first, as an exception takes milliseconds.
    if (op.hasComputedKernelForDispatchKey(c10::DispatchKey::Meta)) {
      return ShapeCall(op, transform, /*on_zeros=*/false).run(arguments);
    }
  } catch (const c10::NotImplementedError&) {
    // One of the operators that it is made of has none.
  }
  // The numbers that it draws are nobody's.
  std::optional<SeedScope> seeded;
  if (op.hasTag(at::Tag::nondeterministic_seeded))
    seeded.emplace(0, devices_of(tensors_in(arguments)));
  return ShapeCall(op, transform, /*on_zeros=*/true).run(arguments);
}

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

bool is_hollow(const at::Tensor& t) {
  if (!t.defined()) return false;
  if (const LiftedTensorImpl* impl = as_lifted(t)) return is_hollow(impl->value());
  if (!t.has_storage()) return false;
  const at::DataPtr& data = t.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
  return data.get_deleter() == &delete_nothing;
}

void call_on_shapes(const c10::OperatorHandle& op, const std::string& transform, Stack* stack) {
  const auto count = static_cast<int64_t>(op.schema().arguments().size());
  const Stack arguments(stack->end() - count, stack->end());
  torch::jit::drop(*stack, static_cast<size_t>(count));
  const HollowRule* rule = find_hollow_rule(op);
  Stack results;
  if (rule == nullptr || !rule->complete) results = results_of(op, transform, arguments);
  if (rule != nullptr) results = rule->apply(arguments, std::move(results));
  stack->insert(stack->end(), results.begin(), results.end());
}

}  // namespace torchlift::compile
