#ifndef TORCHLIFT_AUTODIFF_LEAF_PULLBACK_H_
#define TORCHLIFT_AUTODIFF_LEAF_PULLBACK_H_

// File: autodiff/leaf_pullback.h
//
// vjp of a function of a list of tensors, some of which are constants. Not for users, who have vjp.

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <utility>
#include <vector>

#include "autodiff/reverse.h"
#include "autodiff/stages.h"

namespace torchlift {

class LeafPullback {
 public:
  // Runs f(arguments) -> TensorList.
  template <class F>
  LeafPullback(const TensorList& arguments, const F& f) {
    ReverseScope scope;
    TensorList primals = arguments;
    for (at::Tensor& t : primals) {
      differentiable_.push_back(is_differentiable(t));
      if (differentiable_.back()) t = scope.primal(t);
    }
    pullback_ = scope.finish(f(primals));
  }

  // The gradient of each argument; undefined for those that have none (an integer tensor). An
  // undefined cotangent stands for zero. As often as you like.
  TensorList operator()(const TensorList& cotangents) const {
    TensorList found = pullback_(cotangents);
    TensorList gradients;
    size_t next = 0;
    for (const bool has_gradient : differentiable_) {
      gradients.push_back(has_gradient ? std::move(found[next++]) : at::Tensor());
    }
    return gradients;
  }

 private:
  std::vector<bool> differentiable_;
  Pullback pullback_;
};

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_LEAF_PULLBACK_H_
