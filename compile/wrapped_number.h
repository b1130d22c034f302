#ifndef TORCHLIFT_COMPILE_WRAPPED_NUMBER_H_
#define TORCHLIFT_COMPILE_WRAPPED_NUMBER_H_

// File: compile/wrapped_number.h
//
// A number where a schema says Tensor (x + 2.0): as libtorch passes it, a tensor without dims on
// the CPU that has no say in the dtype of the result.

#include <ATen/ScalarOps.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/jit_type.h>
#include <c10/core/Scalar.h>

namespace torchlift::compile {

inline at::Tensor wrapped_number(const at::Scalar& number) {
  at::Tensor t = c10::scalar_to_tensor(number);
  t.unsafeGetTensorImpl()->set_wrapped_number(true);
  return t;
}

// The number as an argument of this type.
inline c10::IValue number_as(const c10::Type& type, const c10::IValue& number) {
  return type.kind() == c10::TypeKind::TensorType ? wrapped_number(number.toScalar()) : number;
}

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_WRAPPED_NUMBER_H_
