#ifndef TORCHLIFT_BINDINGS_C_TENSOR_FACTS_H_
#define TORCHLIFT_BINDINGS_C_TENSOR_FACTS_H_

// File: bindings/_C/tensor_facts.h
//
// What a graph of jit depends on of one of its inputs.

#include <ATen/core/Tensor.h>
#include <c10/util/SmallVector.h>

namespace torchlift::python {

struct TensorFacts {
  using Sizes = c10::SmallVector<int64_t, 5>;

  at::ScalarType dtype = at::kFloat;
  c10::Device device = c10::kCPU;
  Sizes sizes, strides;

  // Whether there are no others to be known.
  static bool are_known(const at::Tensor& t) {
    return t.defined() && t.layout() == c10::kStrided && !t.is_nested();
  }
  static TensorFacts of(const at::Tensor& t) {
    return {t.scalar_type(), t.device(), Sizes(t.sizes().begin(), t.sizes().end()),
            Sizes(t.strides().begin(), t.strides().end())};
  }
  bool holds(const at::Tensor& t) const {
    return are_known(t) && t.scalar_type() == dtype && t.device() == device && t.sizes() == sizes &&
           t.strides() == strides;
  }
};

}  // namespace torchlift::python

#endif  // TORCHLIFT_BINDINGS_C_TENSOR_FACTS_H_
