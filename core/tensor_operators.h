#ifndef TORCHLIFT_CORE_TENSOR_OPERATORS_H_
#define TORCHLIFT_CORE_TENSOR_OPERATORS_H_

// File: core/tensor_operators.h
//
// a + b, a * 2, 1 - a, a < b... on at::Tensor, with the meaning of ATen/TensorOperators.h, which
// takes three times as long to compile. Both may be included: these are templates, so that the
// compiler prefers libtorch's where it sees them.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty_like_ops.h>

#include <concepts>

namespace torchlift::internal {

// A tensor like `other` (its dtype too) full of `value`: what `value - other` computes with.
inline at::Tensor full_like(const at::Tensor& other, const at::Scalar& value) {
  at::Tensor full = at::_ops::empty_like::call(other, /*dtype=*/{}, /*layout=*/{}, /*device=*/{},
                                               /*pin_memory=*/{}, at::MemoryFormat::Preserve);
  return full.fill_(value);
}

}  // namespace torchlift::internal

// Argument-dependent lookup finds the operators of a class in its namespace only.
namespace at {

// Defines x op y for two tensors, for a tensor and a number, and for a number and a tensor.
#define TORCHLIFT_TENSOR_OPERATOR(op, forward, from_number) \
  template <std::same_as<Tensor> T>                         \
  T operator op(const T& x, const T& y) {                   \
    return forward;                                         \
  }                                                         \
  template <std::same_as<Tensor> T>                         \
  T operator op(const T& x, const Scalar& y) {              \
    return forward;                                         \
  }                                                         \
  template <std::same_as<Tensor> T>                         \
  T operator op(const Scalar& x, const T& y) {              \
    return from_number;                                     \
  }

TORCHLIFT_TENSOR_OPERATOR(+, x.add(y), y.add(x))
TORCHLIFT_TENSOR_OPERATOR(*, x.mul(y), y.mul(x))
TORCHLIFT_TENSOR_OPERATOR(-, x.sub(y), ::torchlift::internal::full_like(y, x).sub_(y))
TORCHLIFT_TENSOR_OPERATOR(/, x.div(y), ::torchlift::internal::full_like(y, x).div_(y))
TORCHLIFT_TENSOR_OPERATOR(%, x.remainder(y), ::torchlift::internal::full_like(y, x).remainder_(y))
TORCHLIFT_TENSOR_OPERATOR(&, x.bitwise_and(y), y.bitwise_and(x))
TORCHLIFT_TENSOR_OPERATOR(|, x.bitwise_or(y), y.bitwise_or(x))
TORCHLIFT_TENSOR_OPERATOR(^, x.bitwise_xor(y), y.bitwise_xor(x))
TORCHLIFT_TENSOR_OPERATOR(<, x.lt(y), y.gt(x))
TORCHLIFT_TENSOR_OPERATOR(<=, x.le(y), y.ge(x))
TORCHLIFT_TENSOR_OPERATOR(>, x.gt(y), y.lt(x))
TORCHLIFT_TENSOR_OPERATOR(>=, x.ge(y), y.le(x))
TORCHLIFT_TENSOR_OPERATOR(==, x.eq(y), y.eq(x))
TORCHLIFT_TENSOR_OPERATOR(!=, x.ne(y), y.ne(x))

#undef TORCHLIFT_TENSOR_OPERATOR

}  // namespace at

#endif  // TORCHLIFT_CORE_TENSOR_OPERATORS_H_
