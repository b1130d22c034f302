#include "autodiff/implicit.h"

#include <ATen/ops/allclose.h>
#include <ATen/ops/diag_embed.h>
#include <ATen/ops/eye.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linalg_inv.h>
#include <ATen/ops/linalg_solve.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <functional>
#include <map>
#include <string>
#include <utility>

#include "autodiff/check_grads.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/stop_gradient.h"
#include "batching/control_flow.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

Tensor scalar(double value) { return at::full({}, value, at::kDouble); }

// A root of a function of one unknown.
const auto newton = [](const std::function<Tensor(const Tensor&)>& g, const Tensor& start) {
  return while_loop([&](const Tensor& y) { return g(y).abs() > 1e-13; },
                    [&](const Tensor& y) { return y - g(y) / grad(g)(y); }, start);
};

Tensor cube_root(const Tensor& a) {
  return custom_root([](const Tensor& y, const Tensor& each) { return y * y * y - each; },
                     scalar(2), newton, std::tuple(a));
}

TEST(CustomRoot, EveryDerivativeOfACubeRoot) {
  const Tensor a = at::linspace(1, 9, 3, at::kDouble);
  const Tensor first = a.pow(-2.0 / 3) / 3;
  EXPECT_CLOSE(vmap(cube_root)(a), a.pow(1.0 / 3));
  EXPECT_CLOSE(vmap(grad(cube_root))(a), first);
  EXPECT_CLOSE(vmap(jacfwd(cube_root))(a), first);
  EXPECT_CLOSE(vmap(jacrev(cube_root))(a), first);
  EXPECT_CLOSE(vmap(hessian(cube_root))(a), -2 * a.pow(-5.0 / 3) / 9);
  EXPECT_CLOSE(vmap(grad(grad(cube_root)))(a), -2 * a.pow(-5.0 / 3) / 9);
  EXPECT_CLOSE(vmap(jacfwd(jacfwd(cube_root)))(a), -2 * a.pow(-5.0 / 3) / 9);
  EXPECT_CLOSE(vmap(grad(grad(grad(cube_root))))(a), 10 * a.pow(-8.0 / 3) / 27);
  const auto along_one = [](const auto& f) {
    return [f](const Tensor& x) { return jvp(f, x, at::ones_like(x)).second; };
  };
  EXPECT_CLOSE(vmap(along_one(along_one(&cube_root)))(a), -2 * a.pow(-5.0 / 3) / 9);
  EXPECT_CLOSE(along_one(along_one(vmap(&cube_root)))(a), -2 * a.pow(-5.0 / 3) / 9);
  EXPECT_CLOSE(vmap(along_one(along_one(along_one(&cube_root))))(a), 10 * a.pow(-8.0 / 3) / 27);
  const auto sum = [](const Tensor& each) { return vmap(cube_root)(each).sum(); };
  EXPECT_CLOSE(grad(sum)(a), first);
  EXPECT_CLOSE(hessian(sum)(a), at::diag_embed(-2 * a.pow(-5.0 / 3) / 9));
  const Tensor leaf = scalar(5).requires_grad_();
  EXPECT_CLOSE(torch::autograd::grad({cube_root(leaf)}, {leaf})[0], scalar(5).pow(-2.0 / 3) / 3);
}

// The minimum of |x w - y|^2 + r |w|^2, where the derivative is zero.
struct Ridge {
  Tensor x = at::randn({6, 3}, at::kDouble), y = at::randn({6}, at::kDouble);

  Tensor exact(const Tensor& x_now, const Tensor& r) const {
    return at::linalg_solve(x_now.t().mm(x_now) + r * at::eye(3, at::kDouble), x_now.t().mv(y));
  }
  template <class Solver>
  Tensor root(const Tensor& x_now, const Tensor& r, const Solver& solver) const {
    const auto slope = [y = y](const Tensor& w, const Tensor& each, const Tensor& penalty) {
      return each.t().mv(each.mv(w) - y) + penalty * w;
    };
    // One step of Newton's method, since the slope is linear in w.
    const auto solve = [](const auto& g, const Tensor& w) {
      return w - at::linalg_solve(jacrev(g)(w), g(w));
    };
    return custom_root(slope, at::zeros({3}, at::kDouble), solve, std::tuple(x_now, r), solver);
  }
};

TEST(CustomRoot, DerivativesByTheLinearSolverGiven) {
  const Ridge ridge;
  const Tensor r = scalar(0.3);
  const auto exact = [&](const Tensor& x, const Tensor& each) { return ridge.exact(x, each); };
  const auto by_cg = [&](const Tensor& x, const Tensor& each) {
    return ridge.root(x, each, CgSolver{{.tol = 1e-13}});
  };
  const auto by_gmres = [&](const Tensor& x, const Tensor& each) {
    return ridge.root(x, each, GmresSolver{{.tol = 1e-13}});
  };
  const auto by_inverse = [&](const Tensor& x, const Tensor& each) {
    return ridge.root(x, each, [](const auto& product, const Tensor& b) {
      return at::linalg_inv(jacrev(product)(b)).mv(b);
    });
  };
  const auto [want_x, want_r] = jacrev<0, 1>(exact)(ridge.x, r);
  const auto compare = [&](const auto& f) {
    const auto [by_x, by_r] = jacrev<0, 1>(f)(ridge.x, r);
    EXPECT_CLOSE(by_x, want_x);
    EXPECT_CLOSE(by_r, want_r);
    const auto [forward_x, forward_r] = jacfwd<0, 1>(f)(ridge.x, r);
    EXPECT_CLOSE(forward_x, want_x);
    EXPECT_CLOSE(forward_r, want_r);
  };
  compare(by_cg);
  compare(by_gmres);
  compare(by_inverse);
  check_grads(by_cg, std::tuple(ridge.x, r), {.order = 2});
}

TEST(CustomRoot, TreesAndConstants) {
  using Unknowns = std::map<std::string, Tensor>;
  struct Shift {
    static Unknowns f(const Unknowns& y, const std::pair<Tensor, Tensor>& params, double scale) {
      const auto& [a, power] = params;  // power: an integer tensor
      return {{"u", y.at("u") * scale - a}, {"v", y.at("v") - y.at("u").pow(power).sum()}};
    }
  };
  const auto solve = [](const auto& g, const Unknowns& start) {  // exact: two linear steps
    Unknowns y = start;
    y.at("u") = y.at("u") - g(y).at("u") / 2;
    y.at("v") = y.at("v") - g(y).at("v");
    return y;
  };
  const Unknowns start{{"u", at::zeros({2}, at::kDouble)}, {"v", scalar(0)}};
  const Tensor a = at::randn({2}, at::kDouble), power = at::full({}, 3, at::kLong);
  const auto v = [&](const Tensor& each) {
    return custom_root(&Shift::f, start, solve, std::tuple(std::pair(each, power), 2.0)).at("v");
  };
  EXPECT_CLOSE(v(a), (a / 2).pow(3).sum());
  EXPECT_CLOSE(grad(v)(a), 3 * (a / 2).pow(2) / 2);
  EXPECT_CLOSE(hessian(v)(a), at::diag_embed(3 * a / 4));
}

TEST(FixedPoint, Cosine) {
  const auto cosine = [](const Tensor& a) {
    return fixed_point([](const Tensor& y, const Tensor& each) { return (each * y).cos(); },
                       scalar(0.5), std::tuple(a), {.tol = 1e-14});
  };
  const Tensor a = at::linspace(0.2, 1.0, 4, at::kDouble);
  const Tensor y = vmap(cosine)(a);
  EXPECT_CLOSE(y, (a * y).cos());
  const Tensor s = (a * y).sin();
  const Tensor first = -y * s / (1 + a * s);
  EXPECT_CLOSE(vmap(grad(cosine))(a), first);
  EXPECT_CLOSE(vmap(jacfwd(cosine))(a), first);
  check_grads(cosine, std::tuple(scalar(0.7)), {.order = 3});
}

TEST(FixedPoint, WhatDoesNotConvergeIsNan) {
  const auto doubled = [](const Tensor& y, const Tensor& a) { return 2 * y + a; };
  const Tensor y = fixed_point(doubled, scalar(1), std::tuple(scalar(1)), {.max_steps = 50});
  EXPECT_TRUE(y.isnan().item<bool>());
}

TEST(FixedPoint, AnEquilibriumOfManyUnknowns) {
  const Tensor w = 0.1 * at::randn({4, 4}, at::kDouble), x = at::randn({4}, at::kDouble);
  const auto equilibrium = [](const Tensor& weight, const Tensor& input) {
    return fixed_point(
        [](const Tensor& y, const Tensor& m, const Tensor& b) { return (m.mv(y) + b).tanh(); },
        at::zeros({4}, at::kDouble), std::tuple(weight, input), {.tol = 1e-14},
        GmresSolver{{.tol = 1e-13}});
  };
  check_grads(equilibrium, std::tuple(w, x), {.order = 2});
  const Tensor xs = at::randn({3, 4}, at::kDouble);
  const Tensor each = vmap(jacrev<1>(equilibrium), {.in_dims = in(kNone, 0)})(w, xs);
  for (int64_t i = 0; i < 3; ++i) EXPECT_CLOSE(each[i], jacrev<1>(equilibrium)(w, xs[i]));
}

TEST(CustomRoot, BadInputs) {
  const auto f = [](const Tensor& y, const Tensor& a) { return y - a; };
  const auto one_step = [](const auto& g, const Tensor& y) { return y - g(y); };
  const Tensor x = at::ones({2}, at::kDouble);
  EXPECT_THAT(error_of([&] { custom_root(f, at::ones({2}, at::kLong), one_step, std::tuple(x)); }),
              HasSubstr("[custom_root] the unknowns must be real tensors, got Long"));
  EXPECT_THAT(
      error_of([&] { custom_root(f, x, one_step, std::tuple(at::ones({2}, at::kComplexDouble))); }),
      HasSubstr("[custom_root] the params must be real tensors, got one of dtype "
                "ComplexDouble (shape [2])"));
  const auto wide = [](const auto&, const Tensor&) { return at::ones({3}, at::kDouble); };
  EXPECT_THAT(error_of([&] { custom_root(f, x, wide, std::tuple(x)); }),
              HasSubstr("[custom_root] what solve returned has shape [3] where the unknown has "
                        "shape [2]"));
  const auto sum = [](const Tensor& y, const Tensor& a) { return (y - a).sum(); };
  const auto start = [](const auto&, const Tensor& y) { return y; };
  EXPECT_THAT(error_of([&] { custom_root(sum, x, start, std::tuple(x)); }),
              HasSubstr("[custom_root] what f returned has shape [] where the unknown has shape "
                        "[2]"));
  const auto closes_over = [&](const Tensor& a) {
    return custom_root([&](const Tensor& y, const Tensor&) { return y - a; }, x, start,
                       std::tuple(x))
        .sum();
  };
  EXPECT_THAT(error_of([&] { grad(closes_over)(x); }),
              HasSubstr("[custom_root] f closes over a tensor that is differentiated"));
  const auto constant = [&](const Tensor& a) {
    const Tensor fixed = stop_gradient(a);
    const auto shifted = [fixed](const Tensor& y, const Tensor& b) { return y - b * fixed; };
    return custom_root(shifted, x, one_step, std::tuple(a)).sum();
  };
  EXPECT_CLOSE(grad(constant)(2 * x), 2 * x);
}

}  // namespace
}  // namespace torchlift
