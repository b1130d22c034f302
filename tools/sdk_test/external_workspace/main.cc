// A user's program that needs one layer only.
#include <ATen/TensorOperators.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/dot.h>

#include <iostream>

#include "batching/vmap.h"

int main() {
  const at::Tensor xs = at::arange(12, at::kDouble).reshape({4, 3});
  const auto dots = torchlift::vmap([](const at::Tensor& x) { return at::dot(x, x); });
  if (!at::allclose(dots(xs), (xs * xs).sum(1))) return 1;
  std::cout << "batched dot products are right\n";
  return 0;
}
