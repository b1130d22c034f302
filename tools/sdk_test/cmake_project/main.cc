// A user's program: per-sample gradients of (w . x)^2, whose answer is 2 (w . x) x.
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>

#include <iostream>

#include "torchlift/torchlift.h"

namespace tl = torchlift;

at::Tensor loss(const at::Tensor& w, const at::Tensor& x) { return w.dot(x).square(); }

int main() {
  const at::Tensor w = at::ones({3}, at::kDouble);
  const at::Tensor xs = at::arange(12, at::kDouble).reshape({4, 3});
  const auto per_sample = tl::vmap(tl::grad(loss), {.in_dims = tl::in(tl::kNone, 0)});
  const at::Tensor got = per_sample(w, xs);
  const at::Tensor expected = xs.matmul(w).unsqueeze(1) * xs * 2;
  if (!at::allclose(got, expected)) {
    std::cout << "got\n" << got << "\nexpected\n" << expected << "\n";
    return 1;
  }
  std::cout << "per-sample gradients are right\n";
  return 0;
}
