// Runs a graph that is a part of this program. Neither the function that was traced nor any
// transform is linked into it.

#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>

#include <iostream>

#include "gradients.h"

int main() {
  const at::Tensor xs = at::arange(24, at::kFloat).reshape({8, 3}) / 24;
  const at::Tensor ys = at::ones({8});
  const at::Tensor w = at::ones({3}) * 2;
  const at::Tensor b = at::ones({}) / 2;

  const example::gradients::Outputs gradients =
      example::gradients::run({.params = {.w = w, .b = b}, .xs = xs, .ys = ys});

  // Of (x . w + b - y)^2, by hand.
  const at::Tensor residual = xs.matmul(w) + b - ys;
  if (!at::allclose(gradients.w, residual.unsqueeze(1) * xs * 2)) return 1;
  if (!at::allclose(gradients.b, residual * 2)) return 1;
  std::cout << "the compiled gradients are right\n";
  return 0;
}
