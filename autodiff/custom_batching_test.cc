#include "autodiff/custom_batching.h"

#include <ATen/Context.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/randn.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <atomic>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <thread>

#include "autodiff/check_grads.h"
#include "autodiff/compositions.h"
#include "autodiff/curvature.h"
#include "autodiff/custom_rules.h"
#include "autodiff/grad.h"
#include "autodiff/jacobian.h"
#include "autodiff/jvp.h"
#include "autodiff/vjp.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

std::atomic<int> rule_runs{0};

// x * x * x, whose rule does `factor` times that.
Fn cube(double factor = 1) {
  return custom_batching([](const Tensor& x) { return x * x * x; },
                         [factor](const BatchInfo& batch, const BatchedTree<Tensor>& x) {
                           ++rule_runs;
                           EXPECT_TRUE(x.all());
                           EXPECT_EQ(x.tree.size(0), batch.size);
                           return factor * x.tree * x.tree * x.tree;
                         });
}

Tensor plain_cube(const Tensor& x) { return x * x * x; }

// sin(cube(x)) * x
Fn around(const Fn& f) {
  return [f](const Tensor& x) { return f(x).sin() * x; };
}

class CustomBatching : public ::testing::Test {
 protected:
  void SetUp() override { rule_runs = 0; }
  void TearDown() override {
    EXPECT_EQ(current_level(), nullptr);
    EXPECT_TRUE(level_stack().empty());
  }
};

TEST_F(CustomBatching, UsesTheRule) {
  const Tensor x = points({3, 2});
  EXPECT_CLOSE(cube(5)(x), plain_cube(x));
  EXPECT_EQ(rule_runs, 0);
  EXPECT_CLOSE(vmap(cube(5))(x), 5 * plain_cube(x));
  EXPECT_EQ(rule_runs, 1);
  // At the innermost level that maps the argument, and nowhere else.
  EXPECT_CLOSE(vmap(vmap(cube(5)))(x), 5 * plain_cube(x));
  EXPECT_CLOSE(vmap([&](const Tensor& row) {
                 return vmap([&](const Tensor& z) { return cube(5)(row) * z; })(row).sum(0);
               })(x),
               5 * plain_cube(x) * x.sum(1, /*keepdim=*/true));
  // Derivatives are those of the rule.
  for (const auto& [name, t] : transforms()) {
    if (name == "vmap" || name == "jacrev" || name == "jacfwd" || name == "hessian") continue;
    const Fn fivefold = [](const Tensor& y) { return 5 * y * y * y; };
    check("vmap of " + name, vmap(t(around(cube(5)))), vmap(t(around(fivefold))), x);
    const auto mapped = [&](const Fn& f) { return t([f](const Tensor& y) { return vmap(f)(y); }); };
    check(name + " of vmap", mapped(around(cube(5))), mapped(around(fivefold)), x);
  }
}

TEST_F(CustomBatching, Composed) {
  const Fn custom = around(cube());
  const Fn plain = around(plain_cube);
  for (const auto& [outer, t] : transforms()) {
    check(outer, t(custom), t(plain), points({3, 2}));
    for (const auto& [middle, u] : transforms()) {
      check(outer + " of " + middle, t(u(custom)), t(u(plain)), points({3, 2}));
      for (const auto& [inner, v] : transforms()) {
        check(outer + " of " + middle + " of " + inner, t(u(v(custom))), t(u(v(plain))),
              points({2, 2}));
      }
    }
  }
  EXPECT_GT(rule_runs, 100);
}

TEST_F(CustomBatching, SizesAndDims) {
  for (const int64_t size : {0, 1, 3}) {
    const Tensor x = points({2, size});
    const VmapOptions options{.in_dims = 1, .out_dims = -1};
    check("vmap", vmap(around(cube()), options), vmap(around(plain_cube), options), x);
    const auto g = [](const Fn& f) { return transforms().at("grad")(f); };
    check("vmap of grad", vmap(g(cube()), options), vmap(g(plain_cube), options), x);
    const auto outside = [&](const Fn& f) {
      return g([&, f](const Tensor& y) { return vmap(f, options)(y); });
    };
    check("grad of vmap", outside(cube()), outside(plain_cube), x);
  }
}

// [n, n], [n] -> [n]: a product, with a rule for each of the ways to be batched.
auto product() {
  return custom_batching(
      [](const Tensor& a, const Tensor& b) { return a.mv(b); },
      [](const BatchInfo&, const BatchedTree<Tensor>& a, const BatchedTree<Tensor>& b) {
        ++rule_runs;
        if (!a.any()) return b.tree.mm(a.tree.t());
        if (!b.any()) return a.tree.matmul(b.tree);
        return a.tree.bmm(b.tree.unsqueeze(2)).squeeze(2);
      });
}

TEST_F(CustomBatching, SharedArguments) {
  at::manual_seed(0);
  const Tensor a = at::randn({3, 3}, at::kDouble);
  const Tensor as = at::randn({4, 3, 3}, at::kDouble);
  const Tensor bs = at::randn({4, 3}, at::kDouble);
  const auto check_in = [&](const Dims& dims, const Tensor& left, const Tensor& right) {
    const VmapOptions options{.in_dims = dims};
    const auto f = vmap(product(), options);
    const auto plain = vmap([](const Tensor& x, const Tensor& y) { return x.mv(y); }, options);
    EXPECT_CLOSE(f(left, right), plain(left, right));
    const auto outside = [&](const auto& g) {
      return grad<0, 1>([&](const Tensor& x, const Tensor& y) { return g(x, y).sin().sum(); })(
          left, right);
    };
    EXPECT_CLOSE(std::get<0>(outside(f)), std::get<0>(outside(plain)));
    EXPECT_CLOSE(std::get<1>(outside(f)), std::get<1>(outside(plain)));
    const auto inside = [&](const auto& g) {
      return vmap(grad<0, 1>([&](const Tensor& x, const Tensor& y) { return g(x, y).sin().sum(); }),
                  options)(left, right);
    };
    const auto mv = [](const Tensor& x, const Tensor& y) { return x.mv(y); };
    EXPECT_CLOSE(std::get<0>(inside(product())), std::get<0>(inside(mv)));
    EXPECT_CLOSE(std::get<1>(inside(product())), std::get<1>(inside(mv)));
    const auto pushed = [&](const auto& g) {
      return vmap(
          [&](const Tensor& x, const Tensor& y) {
            return jvp([&](const Tensor& z) { return g(z, y); }, x, x.cos()).second;
          },
          options)(left, right);
    };
    EXPECT_CLOSE(pushed(product()), pushed(mv));
    check_grads(f, std::tuple(left, right), {.order = 2});
  };
  check_in(in(kNone, 0), a, bs);
  check_in(in(0, kNone), as, bs[0]);
  check_in(in(0, 0), as, bs);
  check_in(in(2, 1), as.movedim(0, 2), bs.t());
  EXPECT_GT(rule_runs, 0);
}

struct Pair {
  Tensor x;
  std::vector<Tensor> rest;
  double scale = 1;
};
TORCHLIFT_PYTREE(Pair, x, rest, scale);

TEST_F(CustomBatching, TreesAndFlags) {
  const auto f = custom_batching(
      [](const Pair& p) { return std::pair(p.x * p.scale + p.rest[0], p.rest[0].sin()); },
      [](const BatchInfo&, const BatchedTree<Pair>& p) {
        EXPECT_THAT(p.batched, ::testing::ElementsAre(true, false));
        return BatchedTree<std::pair<Tensor, Tensor>>{
            {p.tree.x * p.tree.scale + p.tree.rest[0], p.tree.rest[0].sin()}, {true, false}};
      });
  const Tensor xs = points({4, 3});
  const Tensor shared = points({3});
  const auto run = [&](const Tensor& x, const Tensor& y) {
    return vmap(
        [&](const Tensor& row) {
          return f(Pair{row, {y}, 2});
        },
        {.out_dims = out(0, kNone)})(x);
  };
  EXPECT_CLOSE(run(xs, shared).first, xs * 2 + shared);
  EXPECT_CLOSE(run(xs, shared).second, shared.sin());
  EXPECT_CLOSE(grad<1>([&](const Tensor& x, const Tensor& y) {
                 const auto [first, second] = run(x, y);
                 return first.sum() + second.sum();
               })(xs, shared),
               4 + shared.cos());
}

TEST_F(CustomBatching, InsideCustomRules) {
  const auto square = custom_vjp(
      [](const Tensor& x) { return cube()(x) / x; },
      [](const Tensor& x) { return std::pair(cube()(x) / x, x); },
      [](const Tensor& x, const Tensor& c) { return std::tuple(2 * c * cube()(x) / (x * x)); });
  const Fn plain = [](const Tensor& x) { return x * x; };
  const Tensor x = points({2, 2}) + 2;
  for (const auto& [outer, t] : transforms()) {
    for (const auto& [inner, u] : transforms()) {
      check(outer + " of " + inner, t(u(square)), t(u(plain)), x);
    }
  }
}

TEST_F(CustomBatching, Threads) {
  const Tensor x = points({3, 2});
  const auto f = vmap(transforms().at("grad")(cube()));
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 20; ++round) EXPECT_CLOSE(f(x), 3 * x * x);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST_F(CustomBatching, Errors) {
  const Tensor x = points({4, 3});
  const auto with = [](const auto& rule) {
    return vmap(custom_batching([](const Tensor& y) { return std::vector<Tensor>{y}; }, rule));
  };
  using Trees = BatchedTree<std::vector<Tensor>>;
  const auto sum = with([](const BatchInfo&, const BatchedTree<Tensor>& y) {
    return std::vector<Tensor>{y.tree.sum(0)};
  });
  EXPECT_THAT(error_of<TransformError>([&] { sum(x); }),
              HasSubstr("[custom_batching] the rule returned a tensor of shape [3] for result 0, "
                        "whose first dim must be the batch dim, of size 4"));
  const auto flags = with([](const BatchInfo&, const BatchedTree<Tensor>& y) {
    return Trees{{y.tree}, {true, true}};
  });
  EXPECT_THAT(error_of<TransformError>([&] { flags(x); }),
              HasSubstr("says of 2 tensors whether they have the batch dim, but returned 1"));
  const auto undefined = with([](const BatchInfo&, const BatchedTree<Tensor>&) {
    return Trees{{Tensor()}, {true}};
  });
  EXPECT_THAT(error_of<TransformError>([&] { undefined(x); }), HasSubstr("undefined tensor"));
  const auto closing = [](const Tensor& y) {
    return custom_batching(
        [](const Tensor& z) { return z; },
        [y](const BatchInfo&, const BatchedTree<Tensor>& z) { return z.tree + y; })(y);
  };
  EXPECT_THAT(error_of<UnsupportedError>([&] { vmap(closing)(x); }),
              HasSubstr("a tensor of a level inside of the one it works for"));
  const auto throwing = with([](const BatchInfo&, const BatchedTree<Tensor>&) -> Trees {
    throw std::runtime_error("rule");
  });
  EXPECT_THROW(throwing(x), std::runtime_error);
  EXPECT_TRUE(level_stack().empty());
}

}  // namespace
}  // namespace torchlift
