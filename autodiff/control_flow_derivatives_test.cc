// Derivatives of branches and loops, inside and outside of vmap, against plain autograd on one row
// at a time.

#include <ATen/ops/diag.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/stack.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "autodiff/curvature.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/control_flow.h"
#include "batching/padded.h"
#include "batching/vmap.h"
#include "core/level.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;

// A branch in a loop, with x captured by both.
Tensor f(const Tensor& x) {
  return while_loop([](const Tensor& c) { return c.gt(1); },
                    [&](const Tensor& c) {
                      return cond(
                          c.gt(4), [&](const Tensor& d) { return (d - 4).sqrt() + x * 0.3; },
                          [&](const Tensor& d) { return d * 0.6 - x.sin() * 0.1; }, c);
                    },
                    x * x);
}

Tensor alone(const Tensor& x) {
  Tensor c = x * x;
  while (c.item<double>() > 1) {
    c = c.item<double>() > 4 ? (c - 4).sqrt() + x * 0.3 : c * 0.6 - x.sin() * 0.1;
  }
  return c;
}

Tensor rows() { return at::linspace(0.3, 5, 7, at::kDouble); }

// The derivatives of `alone` at each row.
Tensor expected(int order) {
  std::vector<Tensor> results;
  for (const Tensor& row : rows().unbind(0)) {
    const Tensor x = row.clone().set_requires_grad(true);
    Tensor y = alone(x);
    for (int i = 0; i < order; ++i) {
      y = y.requires_grad() ? torch::autograd::grad({y}, {x}, {}, /*retain_graph=*/true,
                                                    /*create_graph=*/true)[0]
                            : y * 0;
    }
    results.push_back(y.detach());
  }
  return at::stack(results);
}

Tensor total(const Tensor& x) { return vmap(f)(x).sum(); }

class ControlFlowDerivatives : public ::testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(current_level(), nullptr);
    EXPECT_TRUE(level_stack().empty());
  }
};

TEST_F(ControlFlowDerivatives, Inside) {
  EXPECT_CLOSE(vmap(f)(rows()), expected(0));
  EXPECT_CLOSE(vmap(grad(f))(rows()), expected(1));
  EXPECT_CLOSE(vmap(jacfwd(f))(rows()), expected(1));
  EXPECT_CLOSE(vmap(jacrev(f))(rows()), expected(1));
  EXPECT_CLOSE(vmap(grad(grad(f)))(rows()), expected(2));
  EXPECT_CLOSE(vmap(hessian(f))(rows()), expected(2));
  EXPECT_CLOSE(vmap(grad(grad(grad(f))))(rows()), expected(3));
}

TEST_F(ControlFlowDerivatives, Outside) {
  EXPECT_CLOSE(grad(total)(rows()), expected(1));
  EXPECT_CLOSE(jacfwd(total)(rows()), expected(1));
  EXPECT_CLOSE(jacrev(vmap(f))(rows()), at::diag(expected(1)));
  EXPECT_CLOSE(jacfwd(vmap(f))(rows()), at::diag(expected(1)));
  EXPECT_CLOSE(hessian(total)(rows()), at::diag(expected(2)));
}

TEST_F(ControlFlowDerivatives, Between) {
  const Tensor grid = rows().narrow(0, 0, 6).view({2, 3});
  const Tensor first = expected(1).narrow(0, 0, 6).view({2, 3});
  EXPECT_CLOSE(vmap(vmap(grad(f)))(grid), first);
  EXPECT_CLOSE(vmap(grad(total))(grid), first);
  EXPECT_CLOSE(vmap(jacfwd(total))(grid), first);
  const auto all = [](const Tensor& x) { return vmap(total)(x).sum(); };
  EXPECT_CLOSE(grad(all)(grid), first);
  const auto nested = [](const Tensor& x) { return vmap(grad(total))(x).sum(); };
  EXPECT_CLOSE(grad(nested)(grid), expected(2).narrow(0, 0, 6).view({2, 3}));
}

TEST_F(ControlFlowDerivatives, OfPaddedOperators) {
  const auto g = [](const Tensor& x) {
    return masked_select(x, x.gt(1), {.size = 3}).values.square().sum();
  };
  const Tensor grid = rows().narrow(0, 0, 6).view({2, 3});
  EXPECT_CLOSE(vmap(grad(g))(grid), grid * 2 * grid.gt(1));
  EXPECT_CLOSE(vmap(jacfwd(g))(grid), grid * 2 * grid.gt(1));
}

}  // namespace
}  // namespace torchlift
