#ifndef TORCHLIFT_COMPILE_UNIFORM_CONSTANTS_H_
#define TORCHLIFT_COMPILE_UNIFORM_CONSTANTS_H_

// File: compile/uniform_constants.h
//
// NOTE [uniform constants]
// A gradient begins with the number 1, and what formulas make of it before it meets a value of the
// trace is a constant: of a mean over a matrix, the number 1/n, expanded to the matrix's shape, and
// divided. By shapes alone the matrix may be larger than memory, and so would that constant be. So
// while such a trace is on, an operator that works on each element alone, whose tensors are each
// one number expanded, and whose result would be large, is computed on these numbers, and its
// result expanded. It has the same elements, and strides of 0.
//
// Small ones are computed as always, so that they are what they are in a trace with values.

#include "nn_functional/substitution.h"

namespace torchlift::compile {

// On this thread while it lives.
class UniformConstantsScope {
 public:
  UniformConstantsScope() : scope_(&filter_) {}

 private:
  class Filter final : public OperatorFilter {
   public:
    bool call(const c10::OperatorHandle& op, torch::jit::Stack* stack) override;
  };

  Filter filter_;
  FilterScope scope_;
};

}  // namespace torchlift::compile

#endif  // TORCHLIFT_COMPILE_UNIFORM_CONSTANTS_H_
