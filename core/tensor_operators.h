#ifndef TORCHLIFT_CORE_TENSOR_OPERATORS_H_
#define TORCHLIFT_CORE_TENSOR_OPERATORS_H_

// File: core/tensor_operators.h
//
// a + b, a * 2, -a... on at::Tensor. libtorch's own header for them, but without the declarations
// of all operators there are (ATen/Functions.h), which it drags in by default and which take
// seconds to compile.

#include <ATen/core/Tensor.h>

#pragma push_macro("AT_PER_OPERATOR_HEADERS")
#ifndef AT_PER_OPERATOR_HEADERS
#define AT_PER_OPERATOR_HEADERS
#endif
#include <ATen/TensorOperators.h>
#pragma pop_macro("AT_PER_OPERATOR_HEADERS")

#endif  // TORCHLIFT_CORE_TENSOR_OPERATORS_H_
