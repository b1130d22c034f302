// The neural tangent kernel of finite networks in C++: its distance from the closed form at
// infinite width (Jacot et al. 2018, arXiv:1806.07572), made in two ways, and what networks
// say after training against regression with their kernels at the start. See ntk.py, which draws
// it.
//
//   ntk [networks]

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/linalg_eigvalsh.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <numbers>
#include <tuple>
#include <vector>

#include "torchlift/torchlift.h"

namespace tl = torchlift;

namespace {

constexpr double kPi = std::numbers::pi;

// Two hidden layers. Leading dims of all three are networks.
struct Params {
  at::Tensor w1, w2, w3;
};
TORCHLIFT_PYTREE(Params, w1, w2, w3);

Params make_params(int64_t networks, int64_t width) {
  return {at::randn({networks, width, 2}, at::kDouble),
          at::randn({networks, width, width}, at::kDouble),
          at::randn({networks, width}, at::kDouble)};
}

// One network at one point, [2] -> []. The factors keep all layers of size 1 at any width.
at::Tensor network(const Params& p, const at::Tensor& point) {
  const double width = static_cast<double>(p.w1.size(0));
  const at::Tensor first = std::sqrt(2.0) * p.w1.matmul(point).relu();
  const at::Tensor second = std::sqrt(2 / width) * p.w2.matmul(first).relu();
  return std::sqrt(1 / width) * p.w3.dot(second);
}

const auto kOverPoints = tl::VmapOptions{.in_dims = tl::in(tl::kNone, 0)};

at::Tensor at_points(const Params& p, const at::Tensor& points) {
  return tl::vmap(network, kOverPoints)(p, points);
}

// The kernel, [N1, N2], from the gradients at all points, one layer after the other.
at::Tensor kernel(const Params& p, const at::Tensor& points1, const at::Tensor& points2) {
  const auto gradients = tl::vmap(tl::grad(network), kOverPoints);
  const Params a = gradients(p, points1), b = gradients(p, points2);
  return a.w1.flatten(1).matmul(b.w1.flatten(1).t()) + a.w2.flatten(1).matmul(b.w2.flatten(1).t()) +
         a.w3.matmul(b.w3.t());
}

// The kernel without the gradients at single points: column j is J (J^T e_j), a pullback and a
// push forward, and vmap does all columns.
at::Tensor kernel_by_products(const Params& p, const at::Tensor& points) {
  const auto f = [&](const Params& q) { return at_points(q, points); };
  const auto [value, pullback] = tl::vjp(f, p);
  const auto column = [&, &pullback = pullback](const at::Tensor& unit) {
    return std::get<1>(tl::jvp(f, p, pullback(unit)));
  };
  const at::Tensor units = at::eye(points.size(0), at::kDouble);
  return tl::vmap(column, {.out_dims = 1})(units);
}

// At infinite width, for points of length 1: the recursion of Jacot et al. (theorem 1), with the
// expectations over a ReLU of Cho and Saul 2009.
at::Tensor closed_form(const at::Tensor& points1, const at::Tensor& points2) {
  at::Tensor cosine = points1.matmul(points2.t()).clamp(-1, 1), found = cosine;
  for (int layer = 0; layer < 2; ++layer) {
    const at::Tensor angle = cosine.acos(), derivative = 1 - angle / kPi;
    cosine = (angle.sin() / kPi + cosine * derivative).clamp(-1, 1);
    found = cosine + found * derivative;
  }
  return found;
}

at::Tensor on_circle(const at::Tensor& angles) {
  return at::stack({angles.cos(), angles.sin()}, -1);
}

Params one_of(const Params& networks, int64_t i) {
  return tl::tree_map(networks, [i](const at::Tensor& t) { return t[i]; });
}

// The mean over the networks of the kernel's distance from the closed form, relative.
double kernel_distance(int64_t networks, int64_t width, const at::Tensor& points) {
  const at::Tensor limit = closed_form(points, points);
  const auto distance = [&](const Params& p) {
    return (kernel(p, points, points) - limit).norm() / limit.norm();
  };
  const int64_t chunk = std::max<int64_t>(1, (1 << 21) / (width * width * points.size(0)));
  return tl::vmap(distance, {.chunk_size = chunk})(make_params(networks, width))
      .mean()
      .item<double>();
}

// Gradient descent with momentum on the sum of squares, to the end.
Params train(Params p, const at::Tensor& points, const at::Tensor& targets) {
  const at::Tensor largest = at::linalg_eigvalsh(kernel(p, points, points))[-1];
  const auto loss = [&](const Params& q) {
    return (at_points(q, points) - targets).square().sum() / (2 * largest);
  };
  const tl::optim::Sgd sgd({.lr = 1.0, .momentum = 0.9});
  tl::optim::State state = sgd.init(p);
  for (int i = 0; i < 300; ++i) std::tie(p, state) = sgd.update(tl::grad(loss)(p), state, p);
  return p;
}

// Root of the mean squared difference, around the circle, of trained networks and regression with
// their kernels before: f0(x) + K(x, X) K(X, X)^-1 (y - f0(X)). Trains all networks at once.
double prediction_difference(int64_t networks, int64_t width) {
  const at::Tensor angles = at::tensor({-2.4, -1.4, -0.3, 0.9, 1.5, 2.6}, at::kDouble);
  const at::Tensor points = on_circle(angles), targets = (2 * angles).sin() + 0.5 * angles.cos();
  const at::Tensor others = on_circle(at::linspace(-kPi, kPi, 121, at::kDouble));
  const auto difference = [&](const Params& p) {
    const at::Tensor rest = targets - at_points(p, points);
    const at::Tensor regression =
        at_points(p, others) +
        kernel(p, others, points).matmul(at::linalg_solve(kernel(p, points, points), rest));
    return (at_points(train(p, points, targets), others) - regression).square().mean();
  };
  return tl::vmap(difference)(make_params(networks, width)).mean().sqrt().item<double>();
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t networks = argc > 1 ? std::atoi(argv[1]) : 10;
  at::set_num_threads(1);
  at::manual_seed(0);
  const at::Tensor points = on_circle(at::linspace(-kPi, kPi, 25, at::kDouble));
  const Params p = one_of(make_params(1, 64), 0);
  const double products =
      (kernel_by_products(p, points) - kernel(p, points, points)).abs().max().item<double>();
  std::printf("the two ways to the kernel differ by %.1e\n", products);
  std::printf("%6s %30s %38s\n", "width", "kernel, from the closed form",
              "trained networks, from their kernels");
  std::vector<double> distances, differences;
  for (const int64_t width : {16, 64, 128}) {
    distances.push_back(kernel_distance(networks, width, points));
    differences.push_back(prediction_difference(4, width));
    std::printf("%6ld %30.3f %38.4f\n", static_cast<long>(width), distances.back(),
                differences.back());
  }
  // Eight times the width, a third of the distance; that of few networks is uncertain.
  const double shrinks = distances.front() / distances.back();
  return products < 1e-10 && shrinks > 1.5 && shrinks < 6 &&
                 differences.back() < differences.front()
             ? 0
             : 1;
}
