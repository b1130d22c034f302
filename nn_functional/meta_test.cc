#include "nn_functional/meta.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <tuple>
#include <vector>

#include "batching/vmap.h"
#include "core/error.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using ::testing::HasSubstr;

struct Params {
  at::Tensor w, b;
};
TORCHLIFT_PYTREE(Params, w, b);

at::Tensor loss(const Params& p, const at::Tensor& x, const at::Tensor& y) {
  return (torch::tanh(x.matmul(p.w)) + p.b - y).square().mean();
}

Params make_params() {
  return {torch::randn({3}, torch::kDouble), torch::randn({}, torch::kDouble)};
}

using Set = std::tuple<at::Tensor, at::Tensor>;

Set make_set(int64_t size) {
  return {torch::randn({size, 3}, torch::kDouble), torch::randn({size}, torch::kDouble)};
}

void expect_close(const at::Tensor& got, const at::Tensor& want, double tolerance = 1e-10) {
  ASSERT_EQ(got.sizes(), want.sizes());
  EXPECT_LT((got - want).abs().max().item<double>(), tolerance);
}

// The oracle: libtorch's autograd, steps written out.
at::Tensor loop(const at::Tensor& w, const at::Tensor& b, const Set& support, const Set& query,
                int steps, double lr, bool first_order) {
  Params p{w, b};
  for (int i = 0; i < steps; ++i) {
    const at::Tensor value = std::apply([&](auto&... s) { return loss(p, s...); }, support);
    auto g = torch::autograd::grad({value}, {p.w, p.b}, {}, true, /*create_graph=*/true);
    if (first_order) g = {g[0].detach(), g[1].detach()};
    p = {p.w - lr * g[0], p.b - lr * g[1]};
  }
  return std::apply([&](auto&... q) { return loss(p, q...); }, query);
}

TEST(Maml, AgreesWithAutograd) {
  torch::manual_seed(0);
  const Params params = make_params();
  const Set support = make_set(5), query = make_set(4);
  for (const bool first_order : {false, true}) {
    for (const int64_t steps : {0, 1, 3}) {
      const at::Tensor w = params.w.clone().requires_grad_(), b = params.b.clone().requires_grad_();
      const at::Tensor want = loop(w, b, support, query, static_cast<int>(steps), 0.3, first_order);
      const auto grads = torch::autograd::grad({want}, {w, b});
      const auto meta = maml(&loss, {.steps = steps, .lr = 0.3, .first_order = first_order});
      const auto [value, got] = value_and_grad(meta)(params, support, query);
      expect_close(value, want.detach());
      expect_close(got.w, grads[0]);
      expect_close(got.b, grads[1]);
    }
  }
}

TEST(Maml, MappedOverTasks) {
  const Params params = make_params();
  std::vector<Set> supports, queries;
  for (int i = 0; i < 3; ++i) supports.push_back(make_set(5)), queries.push_back(make_set(4));
  const auto stack = [](const std::vector<Set>& sets) {
    std::vector<at::Tensor> xs, ys;
    for (const auto& [x, y] : sets) xs.push_back(x), ys.push_back(y);
    return Set(torch::stack(xs), torch::stack(ys));
  };
  const auto meta = maml(&loss, optim::Adam({.lr = 0.05}), {.steps = 2});
  const auto all = [&](const Params& p) {
    return vmap(meta, {.in_dims = in(kNone, 0, 0)})(p, stack(supports), stack(queries)).mean();
  };
  const Params got = grad(all)(params);
  at::Tensor w = torch::zeros_like(params.w);
  for (size_t i = 0; i < 3; ++i) w += grad(meta)(params, supports[i], queries[i]).w / 3;
  expect_close(got.w, w);
}

TEST(Maml, Implicit) {
  torch::manual_seed(2);
  // A quadratic: p* = (A + rI)^-1 (c + r p0) in closed form, and so is its derivative.
  const at::Tensor root = torch::randn({3, 3}, torch::kDouble);
  const at::Tensor a = root.mm(root.t()) + torch::eye(3, torch::kDouble);
  const at::Tensor c = torch::randn({3}, torch::kDouble),
                   target = torch::randn({3}, torch::kDouble);
  const auto quadratic = [&](const at::Tensor& p, const at::Tensor& kind) {
    const at::Tensor inner = 0.5 * p.dot(a.mv(p)) - c.dot(p);
    return torch::where(kind > 0, inner, (p - target).square().sum());
  };
  const double r = 2.0;
  const at::Tensor start = torch::randn({3}, torch::kDouble);
  const auto run = implicit_maml_grad(
      quadratic, {.steps = 500, .lr = 0.05, .regularization = r, .cg_steps = 10});
  const std::tuple<at::Tensor> support(torch::ones({})), query(torch::zeros({}));
  const auto [got, value] = run(start, support, query);
  const at::Tensor inverse = torch::linalg_inv(a + r * torch::eye(3, torch::kDouble));
  const at::Tensor best = inverse.mv(c + r * start);
  expect_close(value, (best - target).square().sum(), 1e-8);
  expect_close(got, r * inverse.mv(2 * (best - target)), 1e-7);

  const at::Tensor starts = torch::stack({start, start + 1});
  const auto [mapped, values] = vmap(run, {.in_dims = in(0, kNone, kNone)})(starts, support, query);
  expect_close(mapped[0], got, 1e-9);
  expect_close(mapped[1], run(start + 1, support, query).first, 1e-9);
}

TEST(Adapt, AnyOptimizer) {
  const Params params = make_params();
  const auto [x, y] = make_set(5);
  const Params got =
      adapt(&loss, optim::Sgd({.lr = 0.1, .momentum = 0.9}), {.steps = 4})(params, x, y);
  const at::Tensor w = params.w.clone().requires_grad_(), b = params.b.clone().requires_grad_();
  torch::optim::SGD sgd({w, b}, torch::optim::SGDOptions(0.1).momentum(0.9));
  for (int i = 0; i < 4; ++i) {
    sgd.zero_grad();
    loss({w, b}, x, y).backward();
    sgd.step();
  }
  expect_close(got.w, w.detach());
  expect_close(got.b, b.detach());
}

TEST(Adapt, Errors) {
  EXPECT_THAT(error_of<TransformError>([] { adapt(&loss, {.steps = -1}); }),
              HasSubstr("[adapt] steps must be at least 0, got -1"));
  EXPECT_THAT(error_of<TransformError>([] { implicit_maml_grad(&loss, {.regularization = 0.0}); }),
              HasSubstr("regularization must be above 0"));
}

}  // namespace
}  // namespace torchlift
