#include "nn_functional/meta.h"

#include <ATen/ops/stack.h>
#include <ATen/ops/zeros_like.h>

#include <limits>

#include "core/error.h"
#include "core/tensor_operators.h"

namespace torchlift::meta_internal {
namespace {

at::Tensor dot(const Leaves& a, const Leaves& b) {
  Leaves products;
  for (size_t i = 0; i < a.size(); ++i) products.push_back(a[i].mul(b[i]).sum());
  return at::stack(products).sum();
}

// a + factor * b
Leaves plus(const Leaves& a, const at::Tensor& factor, const Leaves& b) {
  Leaves sums;
  for (size_t i = 0; i < a.size(); ++i) sums.push_back(a[i] + factor * b[i]);
  return sums;
}

// a / b, and 0 where both are.
at::Tensor ratio(const at::Tensor& a, const at::Tensor& b) {
  const double tiny = b.scalar_type() == at::kDouble ? std::numeric_limits<double>::min()
                                                     : std::numeric_limits<float>::min();
  return a / b.clamp_min(tiny);
}

}  // namespace

void check_steps(const char* transform, int64_t steps) {
  if (steps < 0) transform_error(transform, "steps must be at least 0, got ", steps, ".");
}

void check_regularization(double regularization) {
  if (regularization > 0) return;
  transform_error("implicit_maml_grad", "regularization must be above 0, got ", regularization,
                  ".");
}

at::Tensor squared_distance(const Leaves& a, const Leaves& b) {
  Leaves squares;
  for (size_t i = 0; i < a.size(); ++i) squares.push_back((a[i] - b[i]).square().sum());
  return at::stack(squares).sum();
}

Leaves add_scaled(const Leaves& a, const Leaves& b, double divisor) {
  Leaves sums;
  for (size_t i = 0; i < a.size(); ++i) sums.push_back(a[i].add(b[i], 1.0 / divisor));
  return sums;
}

Leaves conjugate_gradients(const std::function<Leaves(const Leaves&)>& apply, const Leaves& rhs,
                           int64_t steps) {
  Leaves x;
  for (const at::Tensor& b : rhs) x.push_back(at::zeros_like(b));
  Leaves residual = rhs, direction = rhs;
  at::Tensor square = dot(residual, residual);
  for (int64_t step = 0; step < steps; ++step) {
    const Leaves product = apply(direction);
    const at::Tensor alpha = ratio(square, dot(direction, product));
    x = plus(x, alpha, direction);
    residual = plus(residual, alpha.neg(), product);
    const at::Tensor next = dot(residual, residual);
    direction = plus(residual, ratio(next, square), direction);
    square = next;
  }
  return x;
}

}  // namespace torchlift::meta_internal
