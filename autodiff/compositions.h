#ifndef TORCHLIFT_AUTODIFF_COMPOSITIONS_H_
#define TORCHLIFT_AUTODIFF_COMPOSITIONS_H_

// File: autodiff/compositions.h
//
// For tests: the transforms as functions of a function, each from tensors to tensors of the same
// shape, so that they compose in any order.

#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/linspace.h>
#include <gtest/gtest.h>

#include <exception>
#include <functional>
#include <map>
#include <string>

#include "autodiff/curvature.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/tensor_operators.h"

namespace torchlift {

using Fn = std::function<at::Tensor(const at::Tensor&)>;
using Transform = std::function<Fn(const Fn&)>;

inline at::Tensor total(const Fn& f, const at::Tensor& x) { return f(x).sum(); }

inline const std::map<std::string, Transform>& transforms() {
  static const auto* all = new std::map<std::string, Transform>{
      {"vmap",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) { return x.dim() == 0 ? f(x) : vmap(f)(x); };
       }},
      {"grad",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) {
           return grad([&](const at::Tensor& y) { return total(f, y); })(x);
         };
       }},
      {"vjp",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) {
           auto [value, pullback] = vjp(f, x);
           return pullback(x.cos()) + value;
         };
       }},
      {"jvp",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) {
           auto [value, tangent] = jvp(f, x, x.cos());
           return tangent + value;
         };
       }},
      {"jacrev",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) {
           return jacrev(f)(x).reshape({x.numel(), x.numel()}).sum(0).reshape(x.sizes());
         };
       }},
      {"jacfwd",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) {
           return jacfwd(f)(x).reshape({x.numel(), x.numel()}).sum(1).reshape(x.sizes());
         };
       }},
      {"hessian",
       [](const Fn& f) -> Fn {
         return [f](const at::Tensor& x) {
           const at::Tensor h = hessian([&](const at::Tensor& y) { return total(f, y); })(x);
           return h.reshape({x.numel(), x.numel()}).sum(0).reshape(x.sizes());
         };
       }},
  };
  return *all;
}

// Numbers from -0.9 to 1.1.
inline at::Tensor points(at::IntArrayRef sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return at::linspace(-0.9, 1.1, count, at::kDouble).reshape(sizes);
}

// Expects that custom(x) is plain(x).
inline void check(const std::string& name, const Fn& custom, const Fn& plain, const at::Tensor& x) {
  at::Tensor got;
  try {
    got = custom(x);
  } catch (const std::exception& error) {
    ADD_FAILURE() << name << ": " << error.what();
    return;
  }
  const at::Tensor expected = plain(x);
  ASSERT_EQ(got.sizes(), expected.sizes()) << name;
  EXPECT_TRUE(at::allclose(got, expected, 1e-8, 1e-10)) << name << "\n" << got << expected;
}

}  // namespace torchlift

#endif  // TORCHLIFT_AUTODIFF_COMPOSITIONS_H_
