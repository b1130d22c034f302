#include "autodiff/grad.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/real.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>

#include <atomic>
#include <map>
#include <stdexcept>
#include <thread>

#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;
using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

struct Params {
  at::Tensor w, b;
  std::vector<at::Tensor> more;
  double scale = 2.0;
  std::string name = "p";
};
TORCHLIFT_PYTREE(Params, w, b, more, scale, name);

at::Tensor randn(at::IntArrayRef sizes) { return at::randn(sizes, at::kDouble); }

at::Tensor loss(const Params& p, const at::Tensor& x) {
  at::Tensor h = (p.w * x).sin() * p.scale;
  for (const at::Tensor& m : p.more) h = h * m;
  return h.sum() + p.b;
}

at::Tensor cube(const at::Tensor& x) { return (x * x * x).sum(); }

// The oracle: libtorch's autograd on detached copies.
template <class F>
std::vector<at::Tensor> autograd_of(const F& f, std::vector<at::Tensor> inputs) {
  for (at::Tensor& input : inputs) input = input.detach().clone().requires_grad_();
  return torch::autograd::grad({f(inputs)}, inputs);
}

class GradTest : public ::testing::Test {
 protected:
  void TearDown() override {
    EXPECT_EQ(current_level(), nullptr);
    EXPECT_TRUE(c10::GradMode::is_enabled());
  }
};

TEST_F(GradTest, OfAStructHasItsStructure) {
  const Params p{randn({5}), randn({}), {randn({5}), randn({})}, 3.0, "kept"};
  const at::Tensor x = randn({5});
  const Params g = grad(loss)(p, x);
  const auto expected = autograd_of(
      [&](const std::vector<at::Tensor>& in) {
        return loss({in[0], in[1], {in[2], in[3]}, 3.0}, x);
      },
      {p.w, p.b, p.more[0], p.more[1]});
  EXPECT_CLOSE(g.w, expected[0]);
  EXPECT_CLOSE(g.b, expected[1]);
  EXPECT_CLOSE(g.more[0], expected[2]);
  EXPECT_CLOSE(g.more[1], expected[3]);
  EXPECT_EQ(g.scale, 3.0);
  EXPECT_EQ(g.name, "kept");
  EXPECT_FALSE(g.w.requires_grad());
  EXPECT_FALSE(p.w.requires_grad());
}

TEST_F(GradTest, Argnums) {
  const auto f = [](const at::Tensor& a, const at::Tensor& b, const at::Tensor& c) {
    return (a * b.sin() * c.exp()).sum();
  };
  const at::Tensor a = randn({3}), b = randn({3}), c = randn({3});
  const auto expected = autograd_of(
      [&](const std::vector<at::Tensor>& in) { return f(in[0], in[1], in[2]); }, {a, b, c});
  EXPECT_CLOSE(grad(f)(a, b, c), expected[0]);
  EXPECT_CLOSE(grad<1>(f)(a, b, c), expected[1]);
  const auto [gc, ga] = grad<2, 0>(f)(a, b, c);
  EXPECT_CLOSE(ga, expected[0]);
  EXPECT_CLOSE(gc, expected[2]);
}

TEST_F(GradTest, ValuesAndOrder) {
  const at::Tensor x = randn({3});
  const auto [value, g] = value_and_grad(cube)(x);
  EXPECT_CLOSE(value, cube(x));
  EXPECT_CLOSE(g, 3 * x * x);
  EXPECT_FALSE(value.requires_grad());
  const auto [g2, value2] = grad_and_value(cube)(x);
  EXPECT_CLOSE(value2, cube(x));
  EXPECT_CLOSE(g2, 3 * x * x);
  const auto [value3, both] = value_and_grad<0, 1>(
      [](const at::Tensor& a, const at::Tensor& b) { return (a * b).sum(); })(x, x);
  EXPECT_CLOSE(std::get<0>(both), x);
  EXPECT_CLOSE(value3, (x * x).sum());
}

TEST_F(GradTest, Aux) {
  const auto f = [](const at::Tensor& x) {
    return std::pair(
        cube(x),
        std::tuple(x * 2, std::map<std::string, at::Tensor>{{"n", at::ones({2}, at::kLong)}}, 7));
  };
  const at::Tensor x = randn({3});
  const auto [g, aux] = grad(f, kHasAux)(x);
  EXPECT_CLOSE(g, 3 * x * x);
  EXPECT_CLOSE(std::get<0>(aux), x * 2);
  EXPECT_FALSE(std::get<0>(aux).requires_grad());
  EXPECT_EQ(std::get<2>(aux), 7);
  const auto [value_aux, g2] = value_and_grad(f, kHasAux)(x);
  EXPECT_CLOSE(value_aux.first, cube(x));
  EXPECT_CLOSE(g2, g);
  const auto [g3, value_aux3] = grad_and_value<0>(f, kHasAux)(x);
  EXPECT_CLOSE(g3, g);
  EXPECT_CLOSE(std::get<0>(value_aux3.second), x * 2);
}

TEST_F(GradTest, AuxStaysConnectedToTheOutside) {
  const at::Tensor x = randn({3}).requires_grad_();
  const auto [g, aux] =
      grad([](const at::Tensor& a) { return std::pair(cube(a), a.sin()); }, kHasAux)(x);
  EXPECT_CLOSE(torch::autograd::grad({aux.sum()}, {x})[0], x.detach().cos());
  EXPECT_CLOSE(torch::autograd::grad({g.sum()}, {x})[0], 6 * x.detach());
}

TEST_F(GradTest, UnusedAndUndefined) {
  const Params p{randn({5}), at::Tensor()};
  const at::Tensor x = randn({5});
  const Params g = grad([](const Params&, const at::Tensor& a) { return a.sum(); })(p, x);
  EXPECT_CLOSE(g.w, at::zeros({5}, at::kDouble));
  EXPECT_FALSE(g.b.defined());
}

TEST_F(GradTest, HigherOrders) {
  const at::Tensor x = randn({});
  const auto f = [](const at::Tensor& a) { return a.pow(5); };
  EXPECT_CLOSE(grad(grad(f))(x), 20 * x.pow(3));
  EXPECT_CLOSE(grad(grad(grad(f)))(x), 60 * x.pow(2));
}

TEST_F(GradTest, PerSampleGradients) {
  const Params p{randn({5}), randn({}), {randn({5})}};
  const at::Tensor x = randn({7, 5});
  const Params g = vmap(grad(loss), {.in_dims = in(kNone, 0)})(p, x);
  for (int64_t i = 0; i < 7; ++i) {
    const Params gi = grad(loss)(p, x[i]);
    EXPECT_CLOSE(g.w[i], gi.w);
    EXPECT_CLOSE(g.b[i], gi.b);
    EXPECT_CLOSE(g.more[0][i], gi.more[0]);
  }
  const Params chunked = vmap(grad(loss), {.in_dims = in(kNone, 0), .chunk_size = 3})(p, x);
  EXPECT_CLOSE(chunked.w, g.w);
}

TEST_F(GradTest, GradInVmapInGrad) {
  // d/dw sum_i |d/dx f(w, x_i)|^2 with f = sum(w x^3): the gradient penalty.
  const at::Tensor w = randn({5}), x = randn({7, 5});
  const auto penalty = [&](const at::Tensor& v) {
    const auto f = [](const at::Tensor& u, const at::Tensor& a) { return (u * a * a * a).sum(); };
    return vmap(grad<1>(f), {.in_dims = in(kNone, 0)})(v, x).pow(2).sum();
  };
  EXPECT_CLOSE(grad(penalty)(w), 2 * w * (9 * x.pow(4)).sum(0));
}

TEST_F(GradTest, VmapInGradInVmap) {
  const at::Tensor x = randn({4, 3}), y = randn({6, 3});
  const auto f = [&](const at::Tensor& a) {
    return vmap([&](const at::Tensor& b) { return (a * b).sin().sum(); })(y).sum();
  };
  const at::Tensor expected = ((x.unsqueeze(1) * y).cos() * y).sum(1);
  EXPECT_CLOSE(vmap(grad(f))(x), expected);
}

TEST_F(GradTest, HessianByVmapOverGradOfGrad) {
  const at::Tensor x = randn({3}), e = at::ones({3}, at::kDouble).diag();
  const auto f = [](const at::Tensor& a) { return (a.sum().pow(3)) + cube(a); };
  const auto hvp = [&](const at::Tensor& v) {
    return grad([&](const at::Tensor& a) { return (grad(f)(a) * v).sum(); })(x);
  };
  EXPECT_CLOSE(vmap(hvp)(e), 6 * x.sum() * at::ones({3, 3}, at::kDouble) + (6 * x).diag());
}

TEST_F(GradTest, OuterWeightsKeepTheirGradients) {
  const at::Tensor w = randn({5}).requires_grad_(), x = randn({7, 5});
  const auto f = [&](const at::Tensor& a) { return (w * a * a).sum(); };
  const at::Tensor g = vmap(grad(f))(x);
  EXPECT_CLOSE(g, 2 * w * x);
  EXPECT_CLOSE(torch::autograd::grad({g.pow(2).sum()}, {w})[0], (8 * w * x * x).sum(0).detach());
  // By an argument too.
  const auto f2 = [](const at::Tensor& v, const at::Tensor& a) { return (v * a * a).sum(); };
  const at::Tensor g2 = vmap(grad<1>(f2), {.in_dims = in(kNone, 0)})(w, x);
  EXPECT_CLOSE(torch::autograd::grad({g2.pow(2).sum()}, {w})[0], (8 * w * x * x).sum(0).detach());
}

TEST_F(GradTest, BatchedInputsKeepTheirOuterGradients) {
  // The examples themselves are tracked outside of vmap; within it they are untracked inputs of
  // grad.
  const at::Tensor x = randn({7, 5}).requires_grad_();
  const at::Tensor g = vmap(grad(cube))(x);
  EXPECT_CLOSE(torch::autograd::grad({g.sum()}, {x})[0], (6 * x).detach());
  const auto value_and_slope = vmap(value_and_grad(cube))(x);
  EXPECT_CLOSE(torch::autograd::grad({value_and_slope.first.sum()}, {x})[0], (3 * x * x).detach());
  const auto with_aux = [](const at::Tensor& a) { return std::pair(cube(a), a.sin()); };
  const auto slope_and_aux = vmap(grad(with_aux, kHasAux))(x);
  EXPECT_CLOSE(torch::autograd::grad({slope_and_aux.second.sum()}, {x})[0], x.cos().detach());
  const auto sum_of_slopes = [](const at::Tensor& xs) { return vmap(grad(cube))(xs).sum(); };
  EXPECT_CLOSE(grad(sum_of_slopes)(x.detach()), (6 * x).detach());
  EXPECT_CLOSE(vmap(grad(sum_of_slopes))(x.detach().expand({2, 7, 5})),
               (6 * x).detach().expand({2, 7, 5}));
}

TEST_F(GradTest, NoGradAsInTorchFunc) {
  const at::Tensor x = randn({3}).requires_grad_();
  // Inside f it hides.
  const auto partly = [](const at::Tensor& a) {
    at::Tensor square;
    {
      const c10::NoGradGuard no_grad;
      square = a * a;
    }
    return (a - square).sum();
  };
  EXPECT_CLOSE(grad(partly)(x), at::ones({3}, at::kDouble));
  EXPECT_CLOSE(vmap(grad(partly))(randn({4, 3})), at::ones({4, 3}, at::kDouble));
  // Around the call it does not, but nothing outside is recorded.
  {
    const c10::NoGradGuard no_grad;
    const at::Tensor g = grad(cube)(x);
    EXPECT_FALSE(c10::GradMode::is_enabled());
    EXPECT_CLOSE(g, 3 * x * x);
    EXPECT_FALSE(g.requires_grad());
    const at::Tensor gs = vmap(grad(cube))(x.expand({2, 3}));
    EXPECT_FALSE(gs.requires_grad());
    EXPECT_CLOSE(gs, (3 * x * x).expand({2, 3}));
  }
  EXPECT_TRUE(grad(cube)(x).requires_grad());
}

TEST_F(GradTest, AutogradOfItsOwnInsideTheFunction) {
  const auto f = [](const at::Tensor& x) {
    const at::Tensor leaf = x.detach().requires_grad_();
    const at::Tensor slope =
        torch::autograd::grad({cube(leaf)}, {leaf})[0];  // 3 x^2, a constant to grad
    return (slope * x).sum();
  };
  const at::Tensor x = randn({4, 3});
  EXPECT_CLOSE(grad(f)(x[0]), 3 * x[0] * x[0]);
  EXPECT_CLOSE(vmap(grad(f))(x), 3 * x * x);
  const auto through = [](const at::Tensor& a) {
    return torch::autograd::grad({cube(a)}, {a}, {}, std::nullopt, /*create_graph=*/true)[0].sum();
  };
  EXPECT_CLOSE(grad(through)(x[0]), 6 * x[0]);
  EXPECT_CLOSE(vmap(grad(through))(x), 6 * x);
}

// x^3, with a derivative that is recognisably its own: 3 x^2 + 1.
struct OddCube : torch::autograd::Function<OddCube> {
  static Variable forward(AutogradContext* ctx, const Variable& x) {
    ctx->save_for_backward({x});
    return x * x * x;
  }
  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    const Variable x = ctx->get_saved_variables()[0];
    return {grads[0] * (3 * x * x + 1)};
  }
};

TEST_F(GradTest, CustomAutogradFunctions) {
  const auto f = [](const at::Tensor& x) { return OddCube::apply(x).sum(); };
  const at::Tensor x = randn({4, 3});
  EXPECT_CLOSE(grad(f)(x[0]), 3 * x[0] * x[0] + 1);
  EXPECT_CLOSE(vmap(grad(f))(x), 3 * x * x + 1);
  EXPECT_CLOSE(vmap(f)(x), x.pow(3).sum(1));
  const auto slope = [&](const at::Tensor& a) { return grad(f)(a).sum(); };
  EXPECT_CLOSE(vmap(grad(slope))(x), 6 * x);
}

TEST_F(GradTest, SeveralThreads) {
  std::atomic<int> right = 0;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&right, t] {
      for (int repeat = 0; repeat < 10; ++repeat) {
        const at::Tensor x = randn({2 + t, 3});
        const at::Tensor g = t % 2 == 0 ? vmap(grad(cube))(x) : grad(cube)(x);
        right += at::allclose(g, 3 * x * x);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 40);
}

TEST_F(GradTest, AnExceptionThreeDeepLeavesNothingBehind) {
  const auto thrower = [](const at::Tensor& x) -> at::Tensor {
    if (x.dim() == 1) throw std::runtime_error("from f");
    return x;
  };
  const c10::NoGradGuard no_grad;
  EXPECT_THROW(vmap(grad(vmap(thrower)))(randn({2, 3, 4})), std::runtime_error);
  EXPECT_EQ(current_level(), nullptr);
  EXPECT_FALSE(c10::GradMode::is_enabled());
  const at::Tensor x = randn({2, 3});
  EXPECT_CLOSE(vmap(grad(cube))(x), 3 * x * x);
}

TEST_F(GradTest, Complex) {
  const at::Tensor z = at::randn({3}, at::kComplexDouble);
  const auto f = [](const at::Tensor& a) { return at::real(a * a.conj()).sum(); };
  EXPECT_CLOSE(grad(f)(z), 2 * z);
}

// Errors.

TEST_F(GradTest, ResultIsNotAScalar) {
  const at::Tensor x = randn({2, 3});
  EXPECT_EQ(error_of([&] { grad([](const at::Tensor& a) { return a * 2; })(x); }),
            "[grad] the function must return a scalar, a tensor of shape [], but it returned shape "
            "[2, 3]. "
            "Reduce it, as in loss.sum() or loss.mean(); for the derivatives of a function with "
            "many outputs "
            "use vjp or jacrev.");
  EXPECT_THAT(
      error_of(
          [&] { value_and_grad([](const at::Tensor& a) { return a.sum().reshape({1}); })(x); }),
      HasSubstr(
          "[value_and_grad] the function must return a scalar, a tensor of shape [], but it "
          "returned shape [1]. Reduce it, as in loss.sum() or loss.mean() or loss.squeeze()"));
  EXPECT_THAT(
      error_of([&] { grad_and_value([](const at::Tensor& a) { return a.gt(0).sum(); })(x); }),
      HasSubstr("[grad_and_value] the function must return a real floating-point scalar, but it "
                "returned dtype Long"));
  EXPECT_THAT(error_of([&] {
                grad([](const at::Tensor& a) { return a.sum(); })(x.to(at::kComplexDouble));
              }),
              HasSubstr("returned dtype ComplexDouble. Return a real number of it"));
  EXPECT_THAT(error_of([&] { grad([](const at::Tensor&) { return at::Tensor(); })(x); }),
              HasSubstr("returned an undefined tensor"));
  // Under vmap the shape is that of one example.
  EXPECT_THAT(error_of([&] { vmap(grad([](const at::Tensor& a) { return a * 2; }))(x); }),
              HasSubstr("returned shape [3]"));
}

TEST_F(GradTest, NotDifferentiable) {
  bool ran = false;
  const auto f = [&](const auto& a) {
    ran = true;
    (void)a;
    return at::ones({});
  };
  const at::Tensor labels = at::arange(3);
  EXPECT_THAT(
      error_of([&] { grad(f)(labels); }),
      HasSubstr(
          "[grad] argument 0 is a tensor of dtype Long (shape [3]), but only floating-point and "
          "complex tensors can be differentiated. Convert it"));
  EXPECT_THAT(error_of([&] {
                grad(f)(Params{randn({2}), at::Tensor(), {labels}});
              }),
              HasSubstr("[grad] argument 0.more[0] is a tensor of dtype Long (shape [3])"));
  EXPECT_EQ(error_of([&] { grad(f)(2.0); }),
            "[grad] argument 0 has no tensor to differentiate. Pass numbers as tensors, as in "
            "at::scalar_tensor(2.0), or name the argument that has tensors: grad<1>(f).");
  EXPECT_THAT(error_of([&] { grad(f)(std::vector<at::Tensor>()); }),
              HasSubstr("has no tensor to differentiate"));
  EXPECT_THAT(
      error_of([&] { value_and_grad<0, 1>([](double, int) { return at::ones({}); })(1.0, 2); }),
      HasSubstr("[value_and_grad] arguments 0, 1 have no tensor to differentiate"));
  EXPECT_FALSE(ran);
}

}  // namespace
}  // namespace torchlift
