#include "autodiff/curvature.h"

#include <ATen/core/Generator.h>
#include <ATen/ops/diagonal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <string>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

class CurvatureTest : public ::testing::Test {
 protected:
  void TearDown() override {
    EXPECT_TRUE(level_stack().empty());
    EXPECT_FALSE(forward_mode_open());
  }

  const at::Tensor w_ = randn({4, 5}), x_ = randn({5}), v_ = randn({5});
  // A function of [5] with a full Hessian, written with plain autograd's help only.
  at::Tensor energy(const at::Tensor& x) const {
    return (w_.mv(x).tanh() * w_.mv(x * x)).sum() + x.prod();
  }
  // Its Hessian by autograd, twice.
  at::Tensor hessian_by_hand() const {
    const at::Tensor x = x_.clone().set_requires_grad(true);
    const at::Tensor g = torch::autograd::grad({energy(x)}, {x}, {}, true, true)[0];
    std::vector<at::Tensor> rows;
    for (int64_t i = 0; i < 5; ++i) {
      rows.push_back(torch::autograd::grad({g[i]}, {x}, {}, true)[0]);
    }
    return at::stack(rows);
  }
};

TEST_F(CurvatureTest, HessianVectorProducts) {
  const auto f = [this](const at::Tensor& x) { return energy(x); };
  const at::Tensor h = hessian_by_hand();
  EXPECT_CLOSE(hessian(f)(x_), h);
  const auto [value, product] = hvp(f, x_, v_);
  EXPECT_CLOSE(value, energy(x_));
  EXPECT_CLOSE(product, h.mv(v_));
  EXPECT_FALSE(value.requires_grad());
  EXPECT_FALSE(product.requires_grad());
  EXPECT_CLOSE(vhp(f, x_, v_).second, h.mv(v_));
}

TEST_F(CurvatureTest, ProductsOfTrees) {
  const Params p{randn({5}), randn({})}, v{randn({5}), randn({})};
  const auto loss = [&](const Params& q, const at::Tensor& x) {
    return ((q.w * x).sin() * q.b).sum();
  };
  const auto [value, product] = hvp(loss, std::tuple(p, x_), std::tuple(v, v_));
  const auto g = [&](const Params& q, const at::Tensor& x) { return grad<0, 1>(loss)(q, x); };
  const auto expected = jvp(g, std::tuple(p, x_), std::tuple(v, v_)).second;
  EXPECT_CLOSE(std::get<0>(product).w, std::get<0>(expected).w);
  EXPECT_CLOSE(std::get<0>(product).b, std::get<0>(expected).b);
  EXPECT_CLOSE(std::get<1>(product), std::get<1>(expected));
  const auto [other, row] = vhp(loss, std::tuple(p, x_), std::tuple(v, v_));
  EXPECT_CLOSE(std::get<0>(row).w, std::get<0>(expected).w);
  EXPECT_CLOSE(std::get<1>(row), std::get<1>(expected));
}

TEST_F(CurvatureTest, GaussNewton) {
  const auto f = [this](const at::Tensor& x) { return w_.mv(x).tanh(); };
  const auto loss = [](const at::Tensor& y) { return (y * y * y).sum(); };
  const at::Tensor j = jacrev(f)(x_), h = hessian(loss)(f(x_));
  const auto [value, product] = ggn_vp(f, loss, x_, v_);
  EXPECT_CLOSE(value, f(x_));
  EXPECT_CLOSE(product, j.t().mv(h.mv(j.mv(v_))));
  // Inside a jvp too.
  const auto of_x = [&](const at::Tensor& x) { return ggn_vp(f, loss, x, v_).second; };
  EXPECT_CLOSE(jvp(of_x, x_, v_).second, jacrev(of_x)(x_).mv(v_));
}

TEST_F(CurvatureTest, LaplacianAndDiagonal) {
  const auto f = [this](const at::Tensor& x) { return energy(x); };
  const at::Tensor h = hessian_by_hand();
  EXPECT_CLOSE(laplacian(f)(x_), h.diagonal().sum());
  EXPECT_CLOSE(hessian_diag(f)(x_), h.diagonal());
  EXPECT_CLOSE(laplacian(f, {.chunk_size = 2})(x_), h.diagonal().sum());
  EXPECT_CLOSE(hessian_diag(f, {.chunk_size = 3})(x_), h.diagonal());
  const auto many = [this](const at::Tensor& x) { return w_.mv(x).tanh(); };
  const at::Tensor all = hessian(many)(x_);  // [4, 5, 5]
  EXPECT_CLOSE(laplacian(many)(x_), all.diagonal(0, 1, 2).sum(1));
  EXPECT_CLOSE(hessian_diag(many)(x_), all.diagonal(0, 1, 2));
  const at::Tensor xs = randn({3, 5});
  const at::Tensor batch = vmap(laplacian(f))(xs);
  for (int64_t i = 0; i < 3; ++i) EXPECT_CLOSE(batch[i], laplacian(f)(xs[i]));
  EXPECT_CLOSE(grad(laplacian(f))(x_),
               grad([&](const at::Tensor& x) { return hessian(f)(x).diagonal().sum(); })(x_));
  EXPECT_CLOSE(jvp(laplacian(f), x_, v_).second, grad(laplacian(f))(x_).dot(v_));
}

TEST_F(CurvatureTest, HutchinsonsEstimate) {
  // Exact for a diagonal Hessian; close on average for any.
  const auto separable = [](const at::Tensor& x) { return (x * x * x).sum(); };
  EXPECT_CLOSE(laplacian(separable, {.samples = 3})(x_), x_.sum() * 6);
  const auto f = [this](const at::Tensor& x) { return energy(x); };
  const double exact = laplacian(f)(x_).item<double>();
  const double estimate = laplacian(f, {.samples = 20000})(x_).item<double>();
  EXPECT_NEAR(estimate, exact, 0.2 * std::max(1.0, hessian_by_hand().norm().item<double>()));
}

TEST_F(CurvatureTest, Linearize) {
  const auto f = [this](const at::Tensor& a, const at::Tensor& b) {
    return std::tuple(w_.mv(a) * b, a.sin());
  };
  const at::Tensor b = randn({4}), tb = randn({4});
  const auto [value, push] = linearize(f, std::tuple(x_, b));
  EXPECT_CLOSE(std::get<0>(value), w_.mv(x_) * b);
  for (int i = 0; i < 2; ++i) {
    const at::Tensor ta = randn({5});
    const auto tangent = push(std::tuple(ta, tb));
    EXPECT_CLOSE(std::get<0>(tangent), w_.mv(ta) * b + w_.mv(x_) * tb);
    EXPECT_CLOSE(std::get<1>(tangent), x_.cos() * ta);
  }
}

TEST_F(CurvatureTest, BadInputs) {
  const auto f = [this](const at::Tensor& x) { return w_.mv(x); };
  EXPECT_THAT(
      error_of([&] { hvp(f, x_, v_); }),
      HasSubstr("[hvp] the function must return one real number, a floating-point tensor of "
                "shape [], but it returned 1 tensors, of shape [4] and dtype Double"));
  EXPECT_THAT(
      error_of([&] { hvp(f, x_, w_); }),
      HasSubstr("[hvp] the tangent of argument 0 has shape [4, 5], but the primal has shape"));
  EXPECT_THAT(error_of([&] { laplacian(f, {.samples = 0})(x_); }), HasSubstr("samples is 0"));
  EXPECT_THAT(error_of([&] { laplacian([](const at::Tensor& x) { return x > 0; })(x_); }),
              HasSubstr("[laplacian] output 0 of the function must be a tensor of a real"));
}

}  // namespace
}  // namespace torchlift
