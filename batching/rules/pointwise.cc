#include "batching/rules/pointwise.h"

#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include "core/error.h"
#include "core/keys.h"

namespace torchlift {
namespace pointwise_internal {

namespace {

// See NOTE [nested and quantized tensors] in core/lifted_tensor.cc. Only an operand that all
// examples share can be one.
void check_ordinary(c10::DispatchKeySet keys) {
  const bool nested = keys.has(c10::DispatchKey::NestedTensor);
  if (C10_LIKELY(!nested && !keys.has(c10::DispatchKey::Quantized))) return;
  unsupported_error("vmap", "an operand is a ", nested ? "nested" : "quantized",
                    " tensor, and another differs between the examples of a batch. Use ",
                    nested ? "to_padded_tensor(), or work on its unbind()." : "its dequantize().");
}

}  // namespace

c10::DispatchKeySet DirectKeys::get() const {
  constexpr c10::DispatchKeySet kBackend =
      c10::DispatchKeySet(c10::DispatchKey::Dense) |
      c10::DispatchKeySet({c10::BackendComponent::CPUBit, c10::BackendComponent::CUDABit});
  // BackendSelect and the mode key are about random operators and factories.
  constexpr c10::DispatchKeySet kPlain =
      kBackend | c10::DispatchKeySet({c10::DispatchKey::AutogradFunctionality,
                                      c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::BackendSelect, kModeKey});
  check_ordinary(keys_);
  if (!constant_) return {};
  const auto tls = c10::impl::tls_local_dispatch_key_set();
  const c10::DispatchKeySet keys = (keys_ | tls.included_) - tls.excluded_;
  if ((keys.raw_repr() & ~kPlain.raw_repr()) != 0) return {};
  if (at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION)) return {};
  return keys & kBackend;
}

namespace {

// bool < integral < floating < complex: libtorch's kinds for the promotion of 0-d tensors.
int kind_of(at::ScalarType dtype) {
  if (at::isComplexType(dtype)) return 3;
  if (at::isFloatingType(dtype)) return 2;
  return dtype == at::kBool ? 0 : 1;
}

at::Tensor with_promoted_dtype(const at::Tensor& value, at::ScalarType dtype) {
  const at::ScalarType own = value.scalar_type();
  if (own == dtype || kind_of(own) > kind_of(dtype)) return value;
  return value.to(dtype);
}

}  // namespace

at::Tensor align(const BatchedArg& arg, const Common& common) {
  if (arg.logical_dim() > 0) return aligned(arg, common.rank);
  const bool all_are_0d = common.dtype == at::ScalarType::Undefined;
  if (!arg.bdim) {
    const bool wrapped = arg.value.unsafeGetTensorImpl()->is_wrapped_number();
    return all_are_0d && !wrapped ? arg.value.unsqueeze(0) : arg.value;
  }
  if (all_are_0d) return aligned(arg, common.rank);
  const at::Tensor cast = with_promoted_dtype(arg.value, common.dtype);
  return aligned(BatchedArg{cast, arg.bdim}, common.rank);
}

void check_target_rank(const char* op, const BatchedArg& target, int64_t rank) {
  if (rank <= target.logical_dim()) return;
  TORCH_CHECK(false, op, " under vmap: output with shape ", at::IntArrayRef(logical_sizes(target)),
              " doesn't match the broadcast shape: an operand has ", rank,
              " dimensions, the tensor written in place has ", target.logical_dim(),
              ". Use the out-of-place operator.");
}

}  // namespace pointwise_internal
}  // namespace torchlift
