// A physics-informed network for the Monge-Ampere equation in C++: det D^2 u = f on the unit
// square, with the solution exp((x^2 + y^2) / 2). The residual needs the whole Hessian at every
// point, and a Gauss-Newton step the gradient of every point's residual by the parameters:
// vmap(grad(residual)), with hessian(u) inside. See pinn.py, which explains and draws.
//
//   pinn [steps]

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cartesian_prod.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/cholesky_solve.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_cholesky.h>
#include <ATen/ops/rand.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

// A network of two hidden layers: [2] -> [1].
struct Net {
  at::Tensor w1, b1, w2, b2, w3, b3;

  at::Tensor operator()(const at::Tensor& x) const {
    return w3.matmul((w2.matmul((w1.matmul(x) + b1).tanh()) + b2).tanh()) + b3;
  }
};
TORCHLIFT_PYTREE(Net, w1, b1, w2, b2, w3, b3);

at::Tensor uniform(at::IntArrayRef sizes, int64_t inputs) {
  return (2 * at::rand(sizes, at::kDouble) - 1) / std::sqrt(static_cast<double>(inputs));
}

Net make_net(int64_t width) {
  return {.w1 = uniform({width, 2}, 2),
          .b1 = uniform({width}, 2),
          .w2 = uniform({width, width}, width),
          .b2 = uniform({width}, width),
          .w3 = uniform({1, width}, width),
          .b3 = uniform({1}, width)};
}

// --- the problem, at one point [2] ---------------------------------------------------------------

at::Tensor exact(const at::Tensor& point) { return (point.square().sum(-1) / 2).exp(); }

at::Tensor right_side(const at::Tensor& point) {
  const at::Tensor square = point.square().sum(-1);
  return (1 + square) * square.exp();
}

// The boundary values, interpolated into the square (a Coons patch).
at::Tensor from_boundary(const at::Tensor& point) {
  const at::Tensor x = point[0], y = point[1];
  // The solution is a product: exp(a^2 / 2) exp(b^2 / 2).
  const at::Tensor at_x = (x.square() / 2).exp(), at_y = (y.square() / 2).exp();
  const double corner = std::exp(0.5);
  const at::Tensor from_x = 1 - x + corner * x, from_y = 1 - y + corner * y;
  return from_x * at_y + from_y * at_x - from_x * from_y;
}

// The boundary values hold whatever the network says.
at::Tensor u(const Net& net, const at::Tensor& point) {
  const at::Tensor x = point[0], y = point[1];
  return from_boundary(point) + x * (1 - x) * y * (1 - y) * net(point)[0];
}

at::Tensor residual(const Net& net, const at::Tensor& point) {
  const at::Tensor h = tl::hessian([&](const at::Tensor& p) { return u(net, p); })(point);
  return h[0][0] * h[1][1] - h[0][1].square() - right_side(point);
}

// --- training ------------------------------------------------------------------------------------

// The middles of the cells: [count * count, 2].
at::Tensor grid(int64_t count) {
  const at::Tensor axis = (at::arange(count, at::kDouble) + 0.5) / static_cast<double>(count);
  return at::cartesian_prod({axis, axis});
}

const auto kOverPoints = tl::VmapOptions{.in_dims = tl::in(tl::kNone, 0)};

double mean_square(const at::Tensor& residuals) { return residuals.square().mean().item<double>(); }

double largest_error(const Net& net, const at::Tensor& points) {
  return (tl::vmap(u, kOverPoints)(net, points) - exact(points)).abs().max().item<double>();
}

// net less the step, one long vector.
Net less(const Net& net, const at::Tensor& step) {
  int64_t start = 0;
  return tl::tree_map(net, [&](const at::Tensor& t) {
    start += t.numel();
    return t - step.slice(0, start - t.numel(), start).view(t.sizes());
  });
}

// Levenberg-Marquardt: the step is J^T (J J^T + damping)^-1 residual, with J [points, parameters].
// Returns the mean squared residual before the step.
double gauss_newton_step(Net& net, const at::Tensor& points, double& damping) {
  const auto [rows, residuals] = tl::vmap(tl::grad_and_value(residual), kOverPoints)(net, points);
  std::vector<at::Tensor> flat;
  for (const at::Tensor& row : tl::tree_flatten(rows)) flat.push_back(row.flatten(1));
  const at::Tensor jacobian = at::cat(flat, 1);
  const at::Tensor gram = jacobian.matmul(jacobian.t());
  const at::Tensor shift = gram.diagonal().mean() * at::eye(gram.size(0), at::kDouble);
  const double before = mean_square(residuals);
  for (int i = 0; i < 8; ++i) {  // until the residual gets smaller
    const at::Tensor factor = at::linalg_cholesky(gram + damping * shift);
    const at::Tensor solved = at::cholesky_solve(residuals.unsqueeze(1), factor).squeeze(1);
    const Net tried = less(net, jacobian.t().matmul(solved));
    if (mean_square(tl::vmap(residual, kOverPoints)(tried, points)) < before) {
      net = tried;
      damping = std::max(damping / 3, 1e-13);
      break;
    }
    damping *= 4;
  }
  return before;
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 40;
  at::set_num_threads(1);
  at::manual_seed(0);
  Net net = make_net(24);
  const at::Tensor points = grid(14), others = grid(33);
  double damping = 1e-2;
  std::printf("%6s %24s %20s\n", "step", "mean squared residual", "largest error of u");
  for (int i = 0; i < steps; ++i) {
    const double error = largest_error(net, others);
    const double before = gauss_newton_step(net, points, damping);
    if (i % 5 == 0) std::printf("%6d %24.3e %20.3e\n", i, before, error);
  }
  const double loss = mean_square(tl::vmap(residual, kOverPoints)(net, points));
  const double error = largest_error(net, others);
  std::printf("%6d %24.3e %20.3e\n", steps, loss, error);
  return error < 1e-4 || steps < 10 ? 0 : 1;
}
