#include "nn_functional/linearized.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn.h>
#include <torch/torch.h>

#include <string>
#include <vector>

#include "autodiff/jacobian.h"
#include "core/error.h"
#include "core/testing.h"
#include "nn_functional/functional_call.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

torch::nn::Sequential make_net() {
  torch::manual_seed(1);
  torch::nn::Sequential net(torch::nn::Linear(3, 4), torch::nn::Tanh(), torch::nn::Linear(4, 2));
  net->to(torch::kDouble);
  return net;
}

// The Jacobian [K, P] over all parameters, by libtorch, one output at a time.
at::Tensor jacobian_of(torch::nn::Sequential& net, const at::Tensor& x) {
  const at::Tensor out = net->forward(x);
  std::vector<at::Tensor> rows;
  for (int64_t k = 0; k < out.numel(); ++k) {
    std::vector<at::Tensor> parts;
    for (const auto& [name, p] : extract_state(*net)) {
      parts.push_back(torch::autograd::grad({out[k]}, {p}, {}, true)[0].reshape(-1));
    }
    rows.push_back(torch::cat(parts));
  }
  return torch::stack(rows);
}

at::Tensor flat(const ModuleState& state) {
  std::vector<at::Tensor> parts;
  for (const auto& [name, t] : state) parts.push_back(t.reshape(-1));
  return torch::cat(parts);
}

ModuleState params_of(torch::nn::Sequential& net) {
  return tree_map(extract_state(*net), [](const at::Tensor& t) { return t.detach(); });
}

TEST(EmpiricalNtk, AgreesWithProductsOfJacobians) {
  auto net = make_net();
  const auto f = [&](const ModuleState& p, const at::Tensor& x) {
    return functional_call(net, p, x);
  };
  const ModuleState params = params_of(net);
  for (const int64_t n : {0, 1, 5}) {
    const at::Tensor x1 = torch::randn({n, 3}, torch::kDouble);
    const at::Tensor x2 = torch::randn({4, 3}, torch::kDouble);
    const at::Tensor full = empirical_ntk(f, params, x1, x2);
    ASSERT_EQ(full.sizes(), (at::IntArrayRef{n, 4, 2, 2}));
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j < 4; ++j) {
        const at::Tensor want = jacobian_of(net, x1[i]).mm(jacobian_of(net, x2[j]).t());
        EXPECT_TRUE(torch::allclose(full[i][j], want, 1e-10, 1e-12));
      }
    }
    const at::Tensor diagonal =
        empirical_ntk(f, params, x1, x2, {.compute = NtkKind::kDiagonal, .chunk_size = 2});
    EXPECT_TRUE(torch::allclose(diagonal, full.diagonal(0, 2, 3)));
    const at::Tensor trace = empirical_ntk(f, params, x1, x2, {.compute = NtkKind::kTrace});
    EXPECT_TRUE(torch::allclose(trace, full.diagonal(0, 2, 3).sum(2)));
    if (n > 0) {
      const at::Tensor own = empirical_ntk(f, params, x1);
      EXPECT_TRUE(torch::allclose(own, own.permute({1, 0, 3, 2})));
    }
  }
}

TEST(EmpiricalNtk, MappedOverModels) {
  auto net = make_net();
  const auto f = [&](const ModuleState& p, const at::Tensor& x) {
    return functional_call(net, p, x);
  };
  const ModuleState params = params_of(net);
  const at::Tensor x = torch::randn({3, 3}, torch::kDouble);
  const ModuleState models = tree_map(params, [](const at::Tensor& t) {
    return torch::stack({t, t * 2});
  });
  const auto kernel = [&](const ModuleState& p) { return empirical_ntk(f, p, x); };
  const at::Tensor got = vmap(kernel)(models);
  for (int64_t i = 0; i < 2; ++i) {
    const ModuleState one = tree_map(models, [i](const at::Tensor& t) { return t[i]; });
    EXPECT_TRUE(torch::allclose(got[i], kernel(one)));
  }
}

at::Tensor out_loss(const at::Tensor& out, const at::Tensor& y) {
  return (out - y).square().mul(torch::tensor({0.5, 1.5}, torch::kDouble)).sum() + out.prod() * 0.5;
}

TEST(Diagonals, AgreeWithLoops) {
  auto net = make_net();
  const auto f = [&](const ModuleState& p, const at::Tensor& x) {
    return functional_call(net, p, x);
  };
  const auto loss = [&](const ModuleState& p, const at::Tensor& x, const at::Tensor& y) {
    return out_loss(f(p, x), y);
  };
  const ModuleState params = params_of(net);
  for (const int64_t n : {1, 5}) {
    const at::Tensor xs = torch::randn({n, 3}, torch::kDouble);
    const at::Tensor ys = torch::randn({n, 2}, torch::kDouble);
    at::Tensor fisher, ggn;
    // The Hessian of out_loss by the output.
    const at::Tensor hessian = torch::tensor({{1.0, 0.5}, {0.5, 3.0}}, torch::kDouble);
    for (int64_t i = 0; i < n; ++i) {
      const at::Tensor j = jacobian_of(net, xs[i]).detach();
      const at::Tensor out = net->forward(xs[i]).detach().requires_grad_();
      const at::Tensor slope = torch::autograd::grad({out_loss(out, ys[i])}, {out})[0];
      const at::Tensor square = slope.matmul(j).square() / n;
      const at::Tensor curved = j.t().mm(hessian).mm(j).diagonal() / n;
      fisher = fisher.defined() ? fisher + square : square;
      ggn = ggn.defined() ? ggn + curved : curved;
    }
    for (const DiagonalOptions& options : {DiagonalOptions{}, DiagonalOptions{.chunk_size = 2}}) {
      EXPECT_TRUE(torch::allclose(flat(fisher_diagonal(loss, options)(params, xs, ys)), fisher));
      EXPECT_TRUE(torch::allclose(flat(ggn_diagonal(f, &out_loss, options)(params, xs, ys)), ggn));
    }
  }
}

TEST(Diagonals, Errors) {
  const auto loss = [](const at::Tensor& w, const at::Tensor& x) { return w * x; };
  EXPECT_THAT(
      error_of<TransformError>([&] { fisher_diagonal(loss)(torch::ones({}), torch::ones({0})); }),
      HasSubstr("[fisher_diagonal] the batch has no examples"));
}

}  // namespace
}  // namespace torchlift
