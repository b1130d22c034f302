#include "compile/passes/pool_before_relu.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <variant>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "compile/executable.h"
#include "compile/passes/optimize.h"
#include "compile/passes/testing.h"
#include "compile/trace.h"
#include "core/memory_meter.h"

namespace torchlift::compile {
namespace {

using at::Tensor;

// The traced function without and with the pass.
struct Pair {
  Graph before;
  Graph after;
  int64_t exchanged = 0;
};

template <class F, class... Args>
Pair exchanged(const F& f, const Args&... args) {
  Graph graph = torchlift::trace(f, args...);
  OptimizeOptions others;
  others.pool_before_relu = false;
  optimize(graph, others);
  Pair pair{graph, graph};
  pair.exchanged = pool_before_relu(pair.after);
  verify(pair.after);
  others.pool_before_relu = true;
  optimize(pair.after, others);
  return pair;
}

// A number for each node that names the operator, in the order of the nodes.
std::vector<size_t> places(const Graph& graph, const std::string& op) {
  std::vector<size_t> all;
  for (size_t i = 0; i < graph.nodes.size(); ++i) {
    if (graph.nodes[i].op == op) all.push_back(i);
  }
  return all;
}

constexpr const char* kPool = "aten::max_pool2d_with_indices";
constexpr const char* kPoolBackward = "aten::max_pool2d_with_indices_backward";

Tensor pooled(const Tensor& x) { return at::max_pool2d(at::relu(x), 2); }
Tensor sum_of_pooled(const Tensor& x) {
  const Tensor y = pooled(x);
  return (y * y.sigmoid()).sum();
}

TEST(PoolBeforeRelu, ReluComesAfterThePool) {
  const Pair pair = exchanged(pooled, at::randn({2, 3, 8, 8}));
  EXPECT_EQ(pair.exchanged, 1);
  expect_same(pair.before, pair.after);
  EXPECT_GT(places(pair.after, "aten::relu"), places(pair.after, kPool));
}

TEST(PoolBeforeRelu, GradientsAreMaskedBeforeTheyAreSpread) {
  const Pair pair = exchanged(torchlift::grad(sum_of_pooled), at::randn({2, 3, 8, 8}));
  EXPECT_EQ(pair.exchanged, 1);
  expect_same(pair.before, pair.after);
  EXPECT_LT(places(pair.after, "aten::threshold_backward"), places(pair.after, kPoolBackward));
}

// Their indices differ, and both gradients are zero.
TEST(PoolBeforeRelu, WindowsWithoutPositiveNumbers) {
  Tensor x = at::randn({1, 1, 6, 6});
  x.slice(2, 0, 2) = -at::rand({2, 6}) - 1;
  x.slice(2, 2, 4) = 0;
  x.slice(2, 2, 3) = -0.0;
  const Pair pair = exchanged(torchlift::grad(sum_of_pooled), x);
  ASSERT_EQ(pair.exchanged, 1);
  const auto before = run_reference(pair.before, {x}), after = run_reference(pair.after, {x});
  EXPECT_TRUE(identical(before[0], after[0]));
  EXPECT_EQ(after[0].slice(2, 0, 4).count_nonzero().item<int64_t>(), 0);
}

TEST(PoolBeforeRelu, NanAndInfinity) {
  Tensor x = at::randn({1, 2, 6, 6});
  x[0][0][1][1] = std::numeric_limits<float>::quiet_NaN();
  x[0][0][1][0] = std::numeric_limits<float>::quiet_NaN();
  x[0][1][2][3] = std::numeric_limits<float>::infinity();
  x[0][1][4][5] = -std::numeric_limits<float>::infinity();
  for (const Pair& pair : {exchanged(pooled, x), exchanged(torchlift::grad(sum_of_pooled), x)}) {
    ASSERT_EQ(pair.exchanged, 1);
    EXPECT_TRUE(identical(run_reference(pair.before, {x})[0], run_reference(pair.after, {x})[0]));
  }
}

TEST(PoolBeforeRelu, WindowsThatOverlapAndPadding) {
  const auto f = [](const Tensor& x) {
    const Tensor y = at::max_pool2d(at::relu(x), 3, /*stride=*/1, /*padding=*/1);
    return (y * y).sum();
  };
  const Pair pair = exchanged(torchlift::grad(f), at::randn({2, 2, 7, 5}));
  EXPECT_EQ(pair.exchanged, 1);
  expect_same(pair.before, pair.after);
}

// With dilation a window may lie in the padding alone, whose largest number is minus infinity.
TEST(PoolBeforeRelu, NotWhereWindowsMayBeEmpty) {
  const auto f = [](const Tensor& x) { return at::max_pool2d(at::relu(x), 2, 1, 1, 3); };
  EXPECT_EQ(exchanged(f, at::randn({1, 1, 2, 2})).exchanged, 0);
  const auto dilated = [](const Tensor& x) { return at::max_pool2d(at::relu(x), 2, 1, 0, 2); };
  const Pair pair = exchanged(dilated, at::randn({1, 2, 6, 6}));
  EXPECT_EQ(pair.exchanged, 1);
  expect_same(pair.before, pair.after);
}

// As a file may have them.
TEST(PoolBeforeRelu, UndefinedTensors) {
  const Graph traced = torchlift::trace(torchlift::grad(sum_of_pooled), at::randn({1, 1, 4, 4}));
  for (size_t n = 0; n < traced.nodes.size(); ++n) {
    for (size_t r = 0; r < traced.nodes[n].results.size(); ++r) {
      Graph graph = traced;
      graph.nodes[n].results[r].ids[0] = kNoValue;
      pool_before_relu(graph);
    }
    for (size_t a = 0; a < traced.nodes[n].args.size(); ++a) {
      if (!std::holds_alternative<ValueRef>(traced.nodes[n].args[a])) continue;
      Graph graph = traced;
      graph.nodes[n].args[a] = std::monostate();
      pool_before_relu(graph);
    }
  }
}

TEST(PoolBeforeRelu, UnderVmapAndTwice) {
  const auto f = [](const Tensor& x) {
    return (pooled(at::tanh(pooled(x.unsqueeze(0)))) * 3).sum();
  };
  const Pair pair = exchanged(torchlift::vmap(torchlift::grad(f)), at::randn({5, 3, 8, 12}));
  EXPECT_EQ(pair.exchanged, 2);
  expect_same(pair.before, pair.after);
}

TEST(PoolBeforeRelu, NotWhereReluIsReadOtherwise) {
  const auto f = [](const Tensor& x) {
    const Tensor y = at::relu(x);
    return at::max_pool2d(y, 2).sum() + y.sum();
  };
  EXPECT_EQ(exchanged(f, at::randn({2, 3, 8, 8})).exchanged, 0);
  const auto both = [](const Tensor& x) {
    const Tensor y = at::relu(x);
    return std::vector<Tensor>{at::max_pool2d(y, 2), y};
  };
  EXPECT_EQ(exchanged(both, at::randn({2, 3, 8, 8})).exchanged, 0);
  const auto two_pools = [](const Tensor& x) {
    const Tensor y = at::relu(x);
    return at::max_pool2d(y, 2).sum() + at::max_pool2d(y, 3).sum();
  };
  EXPECT_EQ(exchanged(two_pools, at::randn({2, 3, 8, 8})).exchanged, 0);
}

TEST(PoolBeforeRelu, NotWhereIndicesAreRead) {
  const auto f = [](const Tensor& x) {
    const auto [y, indices] = at::max_pool2d_with_indices(at::relu(x), 2);
    return std::vector<Tensor>{y, indices};
  };
  EXPECT_EQ(exchanged(f, at::randn({2, 3, 8, 8})).exchanged, 0);
}

// The derivative of a derivative gathers by the indices.
TEST(PoolBeforeRelu, SecondDerivativesAreTheSame) {
  const auto f = [](const Tensor& x) { return (pooled(x).sin()).sum(); };
  const auto g = [&](const Tensor& x) { return torchlift::grad(f)(x).square().sum(); };
  const Pair pair = exchanged(torchlift::grad(g), at::randn({1, 2, 6, 6}));
  expect_same(pair.before, pair.after);
}

// What a gradient of a pool needs of the numbers that were pooled is their shape.
TEST(PoolBeforeRelu, PooledNumbersAreNotKeptForTheGradient) {
  const auto f = [](const Tensor& x) { return sum_of_pooled(x + 1); };
  const Tensor x = at::randn({2, 3, 64, 64});
  const Executable program(torchlift::trace(torchlift::grad(f), x));
  const Tensor expected = torchlift::grad(f)(x);
  const MemoryMeter meter(c10::kCPU);
  const Tensor result = program.run({x})[0];
  // The gradient, the indices (of twice the bytes a number), and a few of the pooled size.
  const double size = static_cast<double>(x.nbytes());
  EXPECT_LE(static_cast<double>(meter.peak()), size * (1 + 0.5 + 0.75) + 4096);
  EXPECT_TRUE(at::allclose(result, expected, 1e-5, 1e-6));
}

}  // namespace
}  // namespace torchlift::compile
