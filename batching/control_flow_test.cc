#include "batching/control_flow.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <map>

#include "batching/vmap.h"
#include "core/error.h"
#include "core/lifted_tensor.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct State {
  Tensor x, steps;
  double scale = 0.5;
};
TORCHLIFT_PYTREE(State, x, steps, scale);

Tensor rows() { return at::linspace(-1, 9, 8, at::kDouble); }

template <class F>
Tensor loop(const F& f, const Tensor& x) {
  std::vector<Tensor> results;
  for (const Tensor& row : x.unbind(0)) results.push_back(f(row));
  return at::stack(results);
}

// Halves x until it is below 1; with its number of steps.
State shrink(const Tensor& x) {
  return while_loop([](const State& s) { return s.x.gt(1); },
                    [](const State& s) {
                      return State{s.x * s.scale + s.x.sin() * 0.1, s.steps + 1, s.scale};
                    },
                    State{x, at::zeros({}, at::kLong)});
}

Tensor shrink_alone(Tensor x) {
  while (x.item<double>() > 1) x = x * 0.5 + x.sin() * 0.1;
  return x;
}

Tensor branch(const Tensor& x) {
  return cond(
      x.gt(2), [](const Tensor& y) { return (y - 2).sqrt(); },
      [](const Tensor& y) { return y * y; }, x);
}

Tensor branch_alone(const Tensor& x) { return x.item<double>() > 2 ? (x - 2).sqrt() : x * x; }

template <class F>
Tensor gradient(const F& f, const Tensor& x) {
  const Tensor leaf = x.detach().clone().set_requires_grad(true);
  return torch::autograd::grad({f(leaf).sum()}, {leaf}, {}, /*retain_graph=*/std::nullopt,
                               /*create_graph=*/false, /*allow_unused=*/true)[0];
}

TEST(ControlFlowTest, EagerLoopsAndBranches) {
  for (const Tensor& x : rows().unbind(0)) {
    EXPECT_TRUE(at::equal(shrink(x).x, shrink_alone(x)));
    EXPECT_TRUE(at::equal(branch(x), branch_alone(x)));
  }
}

TEST(ControlFlowTest, VmapIsTheLoop) {
  const auto value = [](const Tensor& x) { return shrink(x).x; };
  EXPECT_CLOSE(vmap(value)(rows()), loop(shrink_alone, rows()));
  EXPECT_CLOSE(vmap(branch)(rows()), loop(branch_alone, rows()));
  const Tensor grid = rows().view({2, 4});
  EXPECT_CLOSE(vmap(vmap(value))(grid).flatten(), loop(shrink_alone, rows()));
  EXPECT_CLOSE(
      vmap(vmap(branch, {.in_dims = 0, .out_dims = 0}), {.in_dims = 1, .out_dims = 1})(grid)
          .flatten(),
      loop(branch_alone, rows()));
  EXPECT_EQ(vmap(value)(rows().narrow(0, 0, 0)).size(0), 0);
  EXPECT_CLOSE(vmap(value)(rows().narrow(0, 5, 1)), loop(shrink_alone, rows().narrow(0, 5, 1)));
}

TEST(ControlFlowTest, GradientsOfVmap) {
  const auto one_by_one = [](const auto& f) { return [f](const Tensor& x) { return loop(f, x); }; };
  const auto value = [](const Tensor& x) { return shrink(x).x; };
  EXPECT_CLOSE(gradient(vmap(value), rows()), gradient(one_by_one(shrink_alone), rows()));
  EXPECT_CLOSE(gradient(vmap(branch), rows()), gradient(one_by_one(branch_alone), rows()));
  const auto pairs = [&](const Tensor& x) { return vmap(vmap(value))(x.view({2, 4})); };
  EXPECT_CLOSE(gradient(pairs, rows()), gradient(one_by_one(shrink_alone), rows()));
}

// A captured matrix for each example, and weights that all share.
TEST(ControlFlowTest, CapturedTensors) {
  const Tensor a = at::randn({8, 3, 3}, at::kDouble) * 0.3;
  const Tensor w = at::randn({3}, at::kDouble).set_requires_grad(true);
  const auto f = [&](const Tensor& a, const Tensor& x) {
    return while_loop([](const Tensor& c) { return c.norm().gt(2); },
                      [&](const Tensor& c) { return a.mv(c) * 0.5 + w * 0.1; }, x + w * 0);
  };
  const auto alone = [&](const Tensor& a, const Tensor& x) {
    Tensor c = x + w * 0;
    while (c.norm().item<double>() > 2) c = a.mv(c) * 0.5 + w * 0.1;
    return c;
  };
  const Tensor x = rows().unsqueeze(1) * at::ones({3}, at::kDouble);
  const Tensor found = vmap(f)(a, x);
  std::vector<Tensor> expected;
  for (int64_t i = 0; i < 8; ++i) expected.push_back(alone(a[i], x[i]));
  EXPECT_CLOSE(found, at::stack(expected));
  EXPECT_CLOSE(torch::autograd::grad({found.sum()}, {w})[0],
               torch::autograd::grad({at::stack(expected).sum()}, {w})[0]);
}

TEST(ControlFlowTest, WorkIsDoneForActiveRowsOnly) {
  std::vector<int64_t> sizes;
  const auto f = [&](const Tensor& n) {
    return while_loop([](const Tensor& c) { return c.gt(0); },
                      [&](const Tensor& c) {
                        sizes.push_back(as_lifted(c)->level().size());
                        return c - 1;
                      },
                      n);
  };
  const std::vector<int64_t> counts{4, 0, 2, 4};
  EXPECT_TRUE(at::equal(vmap(f)(at::tensor(counts)), at::zeros({4}, at::kLong)));
  EXPECT_THAT(sizes, ElementsAre(3, 3, 2, 2));
}

TEST(ControlFlowTest, NoNanFromRowsThatDoNotTakeABranch) {
  const auto root = [](const Tensor& x) {
    return cond(
        x.gt(0), [&] { return x.sqrt(); }, [&] { return at::zeros_like(x); });
  };
  const Tensor x = at::tensor(std::vector<double>{4, 0, 1, -1});
  EXPECT_CLOSE(gradient(vmap(root), x), at::tensor(std::vector<double>{0.25, 0, 0.5, 0}));
}

TEST(ControlFlowTest, ForOverNumbers) {
  const auto power = [](const Tensor& x, int64_t n) {
    return fori_loop(
        0, n, [&](int64_t, const Tensor& y) { return y * x; }, at::full_like(x, 1));
  };
  EXPECT_CLOSE(vmap([&](const Tensor& x) { return power(x, 3); })(rows()), rows().pow(3));
  const auto power_of = [](const Tensor& x, const Tensor& n) {
    return fori_loop(
        at::zeros({}, at::kLong), n,
        [&](const Tensor& i, const std::pair<Tensor, Tensor>& y) {
          return std::pair<Tensor, Tensor>(y.first * x, y.second + i);
        },
        std::pair<Tensor, Tensor>(at::full_like(x, 1), at::zeros({}, at::kLong)));
  };
  const Tensor n = at::arange(8, at::kLong);
  const auto [powers, sums] = vmap(power_of)(rows(), n);
  EXPECT_CLOSE(powers, rows().pow(n));
  EXPECT_TRUE(at::equal(sums, (n * (n - 1)).div(2, "floor")));
}

TEST(ControlFlowTest, Scan) {
  using Xs = std::map<std::string, Tensor>;
  const auto step = [](const Tensor& total, const Xs& x) {
    return std::make_pair(total + x.at("a"), std::make_tuple(total * x.at("a"), total));
  };
  const Xs xs{{"a", at::arange(5, at::kDouble)}};
  const auto [total, ys] = scan(step, at::ones({}, at::kDouble), xs);
  EXPECT_EQ(total.item<double>(), 11);
  EXPECT_TRUE(at::equal(std::get<1>(ys), at::tensor(std::vector<double>{1, 1, 2, 4, 7})));
  EXPECT_TRUE(at::equal(std::get<0>(ys), std::get<1>(ys) * xs.at("a")));
  const auto back = scan(step, at::ones({}, at::kDouble), xs, {.reverse = true});
  EXPECT_TRUE(
      at::equal(std::get<1>(back.second), at::tensor(std::vector<double>{11, 10, 8, 5, 1})));
  const auto count = [](const Tensor& c, std::monostate) { return std::make_pair(c + 1, c); };
  EXPECT_TRUE(at::equal(scan(count, at::zeros({}), std::monostate{}, {.length = 3}).second,
                        at::arange(3, at::kFloat)));
  const auto none = scan(step, at::ones({}, at::kDouble), Xs{{"a", at::zeros({0, 4})}});
  EXPECT_EQ(std::get<0>(none.second).sizes(), at::IntArrayRef({0, 4}));
  EXPECT_EQ(none.first.item<double>(), 1);
}

TEST(ControlFlowTest, ErrorsOfConditions) {
  const auto same = [](const Tensor& x) { return x; };
  EXPECT_THAT(
      error_of([&] { cond(rows().gt(0), same, same, rows()); }),
      AllOf(HasSubstr("[cond] the condition must be a bool tensor without dims, got a tensor "
                      "of shape [8] and dtype Bool"),
            HasSubstr("torch.where")));
  EXPECT_THAT(
      error_of([&] { while_loop(same, same, rows()[0]); }),
      HasSubstr("[while_loop] the condition must be a bool tensor without dims, got a tensor "
                "of shape [] and dtype Double"));
}

TEST(ControlFlowTest, ErrorsOfResults) {
  const auto positive = [](const Tensor& x) { return x.gt(0); };
  const auto wide = [](const Tensor& x) { return x.expand({2}); };
  const auto same = [](const Tensor& x) { return x; };
  EXPECT_THAT(
      error_of([&] { while_loop(positive, wide, at::ones({})); }),
      HasSubstr("[while_loop] body_fn returned a tensor of shape [2], dtype Float on cpu, but "
                "expected was shape [], dtype Float on cpu"));
  EXPECT_THAT(error_of([&] {
                vmap([&](const Tensor& x) { return cond(x.gt(2), same, wide, x); })(rows());
              }),
              HasSubstr("[cond] false_fn returned, unlike true_fn, a tensor of shape [2]"));
  using List = std::vector<Tensor>;
  EXPECT_THAT(error_of([&] {
                while_loop([](const List& x) { return x[0].gt(0); },
                           [](const List& x) {
                             return List{x[0], x[0]};
                           },
                           List{at::ones({})});
              }),
              HasSubstr("body_fn returned another structure: expected 1 elements, got 2"));
  EXPECT_THAT(error_of([&] {
                while_loop([](const State& s) { return s.x.gt(0); },
                           [](const State& s) {
                             return State{s.x, s.steps, s.scale + 1};
                           },
                           State{at::ones({}), at::ones({})});
              }),
              HasSubstr("another value that is no tensor, at .scale"));
  EXPECT_THAT(error_of([&] {
                fori_loop(
                    0, 3, [&](int64_t, const Tensor& x) { return wide(x); }, at::ones({}));
              }),
              HasSubstr("[fori_loop] body_fn returned a tensor of shape [2]"));
  EXPECT_THAT(error_of([&] {
                fori_loop(
                    at::ones({}), at::ones({}), [&](const Tensor&, const Tensor& x) { return x; },
                    at::ones({}));
              }),
              HasSubstr("[fori_loop] lower must be an integer, or an integer tensor without dims"));
}

TEST(ControlFlowTest, ErrorsOfScan) {
  const auto step = [](const Tensor& c, const std::vector<Tensor>&) { return std::pair(c, c); };
  const auto run = [&](std::vector<Tensor> xs, ScanOptions options) {
    return error_of([&] { scan(step, at::ones({}), xs, options); });
  };
  EXPECT_THAT(run({at::ones({3}), at::ones({2, 5})}, {}),
              HasSubstr("xs[0]: size 3 (shape [3])\n  xs[1]: size 2 (shape [2, 5])"));
  EXPECT_THAT(run({at::ones({3})}, {.length = 4}), HasSubstr("length: 4\n  xs[0]: size 3"));
  EXPECT_THAT(run({}, {}), HasSubstr("Give length"));
  EXPECT_THAT(run({at::ones({})}, {}), HasSubstr("xs[0] has no dims"));
  EXPECT_THAT(run({}, {.length = -1}), HasSubstr("length is -1"));
}

TEST(ControlFlowTest, WritesIntoCapturedTensors) {
  const auto write = [](const Tensor& x) {
    const Tensor buffer = x * 2;
    return cond(
        x.gt(2), [&] { return buffer.add_(1); }, [&] { return buffer; });
  };
  EXPECT_THAT(error_of([&] { vmap(write)(rows()); }),
              HasSubstr("from outside of the branch or loop body at work"));
  const auto write_view = [](const Tensor& x) {
    const Tensor buffer = x.expand({2}).clone();
    return cond(
        x.gt(2), [&] { return buffer.select(0, 0).add_(1); }, [&] { return buffer.select(0, 0); });
  };
  EXPECT_THAT(error_of([&] { vmap(write_view)(rows()); }),
              HasSubstr("wrote in place into a tensor of shape [2] that it closes over"));
}

}  // namespace
}  // namespace torchlift
