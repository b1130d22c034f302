#include "batching/rules/pointwise.h"


namespace torchlift {
namespace {

// bool < integral < floating < complex: libtorch's kinds for the promotion of 0-d tensors.
int kind_of(at::ScalarType dtype) {
  if (at::isComplexType(dtype)) return 3;
  if (at::isFloatingType(dtype)) return 2;
  return dtype == at::kBool ? 0 : 1;
}

}  // namespace

at::Tensor with_promoted_dtype(const BatchedArg& arg, at::ScalarType dtype) {
  const at::ScalarType own = arg.value.scalar_type();
  if (own == dtype || kind_of(own) > kind_of(dtype)) return arg.value;
  return arg.value.to(dtype);
}

void DtypeOfDimmed::add(const BatchedArg& arg) {
  if (!arg.value.defined()) return;
  if (arg.logical_dim() == 0) {
    scalars_ = true;
    return;
  }
  const at::ScalarType own = arg.value.scalar_type();
  dtype_ = dtype_ == at::ScalarType::Undefined ? own : at::promoteTypes(dtype_, own);
}

}  // namespace torchlift
