#ifndef TORCHLIFT_AUTODIFF_STOP_GRADIENT_H_
#define TORCHLIFT_AUTODIFF_STOP_GRADIENT_H_

// File: autodiff/stop_gradient.h
//
// stop_gradient: the tensors of a tree as constants, which no transform around differentiates, in
// either mode. They share memory with the originals.
//
//   at::Tensor g = tl::grad([](const at::Tensor& x) { return x * tl::stop_gradient(x); })(x);   //
//   x

#include <ATen/core/Tensor.h>

#include <utility>

#include "core/tree.h"

namespace torchlift {

template <class T>
T stop_gradient(T tree) {
  return tree_map(std::move(tree),
                  [](const at::Tensor& t) { return t.defined() ? t.detach() : t; });
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_STOP_GRADIENT_H_
