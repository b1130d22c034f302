#include "compile/jit.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "autodiff/grad.h"
#include "batching/vmap.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

struct Params {
  Tensor w;
  std::vector<Tensor> biases;
  double scale = 1;
};

TORCHLIFT_PYTREE(Params, w, biases, scale);

Tensor loss(const Params& p, const Tensor& x) {
  return (p.w.mv(x) + p.biases[0]).tanh().sum() * p.scale;
}

Params params(int64_t rows = 2) {
  return {at::rand({rows, 3}, at::kDouble), {at::rand({rows}, at::kDouble)}, 2};
}

TEST(JitTest, ReplaysWhatItHasTraced) {
  int calls = 0;
  const auto f = [&](const Params& p, const Tensor& x) {
    ++calls;
    return loss(p, x);
  };
  const auto per_sample = vmap(grad(f), {.in_dims = in(kNone, 0)});
  const auto fast = jit(per_sample);
  for (int i = 0; i < 3; ++i) {
    const Params p = params();
    const Tensor x = at::rand({5, 3}, at::kDouble);
    const Params got = fast(p, x);
    EXPECT_EQ(calls, 1);
    const Params expected = vmap(grad(&loss), {.in_dims = in(kNone, 0)})(p, x);
    EXPECT_CLOSE(got.w, expected.w);
    EXPECT_CLOSE(got.biases[0], expected.biases[0]);
  }
  const JitCounters counters = fast.counters<Params, Tensor>();
  EXPECT_EQ(counters.hits, 2);
  EXPECT_EQ(counters.misses, 1);
}

TEST(JitTest, TracesAnewForAnotherSignature) {
  const auto fast = jit([](const Params& p, const Tensor& x) { return loss(p, x); });
  const Tensor x = at::rand({3}, at::kDouble);
  fast(params(), x);
  fast(params(4), x);
  Params other = params(4);
  other.scale = 3;
  EXPECT_CLOSE(fast(other, x), loss(other, x));
  other.biases.push_back(x);
  fast(other, x);
  fast(params(), x);
  const std::vector<std::string> reasons = fast.explain<Params, Tensor>();
  ASSERT_EQ(reasons.size(), 4U);
  EXPECT_EQ(reasons[0], "the first call");
  EXPECT_THAT(reasons[1], HasSubstr("tensor 0 of the arguments is Double[4, 3] of strides [3, 1]"));
  EXPECT_THAT(reasons[2], HasSubstr("the constant at [0].scale is another one"));
  EXPECT_THAT(reasons[3], HasSubstr("expected 1 elements, got 2"));
}

TEST(JitTest, KeepsTheGraphsUsedLast) {
  const auto fast = jit([](const Tensor& x) { return x * 2; }, {.cache_size = 2});
  for (const int64_t n : {1, 2, 1, 3, 1, 2}) fast(at::ones({n}));
  const JitCounters counters = fast.counters<Tensor>();
  EXPECT_EQ(counters.misses, 4);  // 1, 2, 3, and 2 again
  EXPECT_EQ(counters.evicted, 2);
}

TEST(JitTest, IsTransformedAsTheFunction) {
  const auto f = [](const Tensor& x) { return (x.sin() * x).sum(); };
  const auto fast = jit(f);
  const Tensor x = at::rand({4, 3}, at::kDouble);
  EXPECT_CLOSE(vmap(grad(fast))(x), vmap(grad(f))(x));
  const Tensor leaf = x.clone().requires_grad_();
  fast(leaf).backward();
  EXPECT_CLOSE(leaf.grad(), grad(f)(x));
  EXPECT_EQ(fast.counters<Tensor>().direct, 2);
  EXPECT_CLOSE(jit(grad(fast))(x), grad(f)(x));
}

TEST(JitTest, WritesIntoItsArguments) {
  const auto f = [](Tensor x, const Tensor& y) {
    x.add_(y);
    x[0] *= 2;
    return x.sum();
  };
  const auto fast = jit(f);
  for (int i = 0; i < 2; ++i) {
    const Tensor x = at::rand({3, 2}, at::kDouble), y = at::rand({3, 2}, at::kDouble);
    Tensor mine = x.clone(), theirs = x.clone();
    EXPECT_CLOSE(fast(mine, y), f(theirs, y));
    EXPECT_CLOSE(mine, theirs);
  }
}

TEST(JitTest, ReusesMemoryOfItsOwnOnly) {
  const auto f = [](const Tensor& x) {
    const Tensor y = x.view({-1}).exp();
    return std::tuple(y.sin().mul(2).add(y), x.neg().abs());
  };
  const auto fast = jit(f);
  const Tensor x = at::rand({3, 2}, at::kDouble);
  const Tensor before = x.clone();
  for (int i = 0; i < 2; ++i) {
    const auto [a, b] = fast(x);
    const auto [c, d] = f(x);
    EXPECT_CLOSE(a, c);
    EXPECT_CLOSE(b, d);
    EXPECT_TRUE(x.equal(before));
  }
}

TEST(JitTest, SeveralThreads) {
  const auto fast = jit(vmap(grad([](const Tensor& x) { return x.pow(3).sum(); })));
  std::atomic<int> right{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (int k = 0; k < 20; ++k) {
        const Tensor x = at::full({2 + (i + k) % 3, 3}, 2.0, at::kDouble);
        right += fast(x).equal(x * x * 3) ? 1 : 0;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 80);
}

// See NOTE [graphs for other numbers].
TEST(JitTest, TracesForOtherNumbersOfElements) {
  const auto f = [](const Tensor& x) { return x.index({x.gt(0)}).sin(); };
  const auto fast = jit(f);
  const auto with = [](int64_t count) {
    return at::where(at::arange(6).lt(count), at::rand({6}) + 0.1, -1.0);
  };
  for (const int64_t count : {2, 3, 2, 0, 3, 6, 0}) {
    const Tensor x = with(count);
    EXPECT_CLOSE(fast(x), f(x));
  }
  const JitCounters counters = fast.counters<Tensor>();
  EXPECT_EQ(counters.misses, 4);
  EXPECT_EQ(counters.hits, 3);
  EXPECT_EQ(counters.direct, 0);
  const std::vector<std::string> reasons = fast.explain<Tensor>();
  EXPECT_EQ(reasons[0], "the first call");
  EXPECT_THAT(reasons[1], HasSubstr("was 2 when the function was traced, and is 3 in this run"));
}

TEST(JitTest, CallsTheFunctionForTooManyNumbers) {
  const auto f = [](const Tensor& x) { return x.index({x.gt(0)}) * 2; };
  const auto fast = jit(f);
  constexpr auto kMost = static_cast<int64_t>(compile::kMaxGraphsOfNumbers);
  for (int64_t count = 0; count < kMost + 4; ++count) {
    const Tensor x = at::arange(kMost + 4).lt(count).to(at::kFloat);
    EXPECT_CLOSE(fast(x), f(x));
  }
  EXPECT_EQ(fast.counters<Tensor>().misses, kMost);
  EXPECT_EQ(fast.counters<Tensor>().direct, 4);
}

TEST(JitTest, FailedRunsLeaveArgumentsAsTheyWere) {
  const auto f = [](const Tensor& x) {
    Tensor written = x;
    written.add_(1);
    return x.index({x.gt(0)}) + at::rand({});
  };
  const auto fast = jit(f);
  for (const double shift : {0.0, 1.5, -2.0, 0.0}) {
    const Tensor x = at::tensor({-2.5, -1.5, 0.5}) + shift, y = x.clone();
    at::manual_seed(2);
    const Tensor expected = f(y);
    at::manual_seed(2);
    EXPECT_CLOSE(fast(x), expected);
    EXPECT_CLOSE(x, y);
  }
  EXPECT_EQ(fast.counters<Tensor>().misses, 3);
}

}  // namespace
}  // namespace torchlift
