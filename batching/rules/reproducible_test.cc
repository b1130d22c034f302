#include "batching/rules/reproducible.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_standard_gamma.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/binomial.h>
#include <ATen/ops/full.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/normal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/poisson.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "batching/random_rows.h"
#include "batching/vmap.h"
#include "core/error.h"
#include "core/philox.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;
using Kind = Distribution::Kind;
using F = std::function<Tensor(const Tensor&)>;

VmapOptions reproducible(std::optional<int64_t> chunk_size = {}) {
  return {.randomness = Randomness::kReproducible, .chunk_size = chunk_size};
}

// --- the kernels ---------------------------------------------------------------------------------

TEST(ReproducibleKernels, WordsArePhiloxs) {
  const uint64_t key = 0x0123456789abcdef;
  const Tensor drawn = reproducible_internal::draw({key}, 10, at::kLong, c10::kCPU,
                                                   {.kind = Kind::kInteger, .from = 0, .range = 0});
  for (int64_t i = 0; i < 10; ++i) {
    const PhiloxWords w = philox(key, static_cast<uint64_t>(i / 2), 0);
    const uint64_t low = w[2 * (i % 2)], high = w[2 * (i % 2) + 1];
    EXPECT_EQ(static_cast<uint64_t>(drawn[0][i].item<int64_t>()), (high << 32) | low);
  }
}

TEST(ReproducibleKernels, NumbersDoNotDependOnHowManyThereAre) {
  for (const auto kind : {Kind::kUniform, Kind::kNormal, Kind::kExponential, Kind::kLogNormal,
                          Kind::kCauchy, Kind::kBernoulli, Kind::kInteger}) {
    for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      const Distribution d{.kind = kind, .a = 0.5, .b = 2, .from = 0, .range = 9};
      const Tensor all = reproducible_internal::draw({7, 8}, 1000, dtype, c10::kCPU, d);
      for (const int64_t count : {0, 1, 2, 63, 64, 65, 999}) {
        const Tensor some = reproducible_internal::draw({7, 8}, count, dtype, c10::kCPU, d);
        EXPECT_TRUE(some.equal(all.narrow(1, 0, count))) << static_cast<int>(kind) << dtype;
      }
    }
  }
}

// Devices without a kernel of ours draw by operators on integer tensors.
TEST(ReproducibleKernels, OperatorsDrawTheSameNumbers) {
  const std::vector<uint64_t> keys{0, 1, ~uint64_t{0}, 0x8000000000000000, 0xfedcba9876543210};
  const auto check = [&](Distribution d, at::ScalarType dtype, double tolerance) {
    for (const int64_t count : {1, 5, 64, 333}) {
      const Tensor a = reproducible_internal::draw(keys, count, dtype, c10::kCPU, d);
      const Tensor b = reproducible_internal::draw_by_operators(keys, count, dtype, c10::kCPU, d);
      EXPECT_EQ(a.scalar_type(), b.scalar_type());
      if (tolerance == 0) {
        EXPECT_TRUE(a.equal(b)) << static_cast<int>(d.kind) << dtype;
      } else {
        EXPECT_TRUE(at::allclose(a.to(at::kDouble), b.to(at::kDouble), tolerance, tolerance))
            << static_cast<int>(d.kind) << dtype;
      }
    }
  };
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    check({.kind = Kind::kUniform, .a = 0, .b = 1}, dtype, 0);
    check({.kind = Kind::kUniform, .a = -3, .b = 2.5}, dtype, 0);
    const double ulp = dtype == at::kDouble ? 1e-13 : dtype == at::kFloat ? 2e-6 : 2e-2;
    check({.kind = Kind::kNormal, .a = 1, .b = 2}, dtype, ulp);
    check({.kind = Kind::kExponential, .a = 2}, dtype, ulp);
    check({.kind = Kind::kLogNormal, .a = 0.5, .b = 0.5}, dtype, ulp);
    check({.kind = Kind::kGeometric, .a = 0.1}, dtype, 0);
    check({.kind = Kind::kBernoulli, .a = 0.3}, dtype, 0);
  }
  check({.kind = Kind::kCauchy, .a = 1, .b = 2}, at::kDouble, 1e-8);
  for (const uint64_t range :
       {uint64_t{1}, uint64_t{10}, uint64_t{1} << 32, (uint64_t{1} << 32) + 1,
        (uint64_t{1} << 40) + 123, uint64_t{1} << 63, uint64_t{0}}) {
    check({.kind = Kind::kInteger, .from = -5, .range = range}, at::kLong, 0);
  }
}

// Mean and standard deviation of many numbers, to five times their own.
void check_moments(const Tensor& t, double mean, double deviation) {
  const double n = static_cast<double>(t.numel());
  const Tensor d = t.to(at::kDouble);
  EXPECT_NEAR(d.mean().item<double>(), mean, 5 * deviation / std::sqrt(n));
  EXPECT_NEAR(d.std().item<double>(), deviation, 0.02 * deviation);
}

TEST(ReproducibleKernels, Moments) {
  const auto draw = [](Distribution d, at::ScalarType dtype) {
    return reproducible_internal::draw({1, 2, 3, 4}, 50000, dtype, c10::kCPU, d);
  };
  for (const auto dtype : {at::kFloat, at::kDouble}) {
    check_moments(draw({.kind = Kind::kUniform, .a = -1, .b = 3}, dtype), 1, 4 / std::sqrt(12));
    check_moments(draw({.kind = Kind::kNormal, .a = 1, .b = 2}, dtype), 1, 2);
    check_moments(draw({.kind = Kind::kExponential, .a = 2}, dtype), 0.5, 0.5);
    check_moments(draw({.kind = Kind::kGeometric, .a = 0.25}, dtype), 4, std::sqrt(12.0));
    check_moments(draw({.kind = Kind::kBernoulli, .a = 0.25}, dtype), 0.25, std::sqrt(0.1875));
    check_moments(draw({.kind = Kind::kInteger, .from = -10, .range = 21}, dtype), 0,
                  std::sqrt(440.0 / 12));
  }
  // Neighbours and rows are uncorrelated; the tails are those of the normal distribution.
  const Tensor z = draw({.kind = Kind::kNormal, .a = 0, .b = 1}, at::kFloat).to(at::kDouble);
  const double limit = 5 / std::sqrt(50000.0);
  EXPECT_LT(std::abs(z[0].narrow(0, 0, 49999).mul(z[0].narrow(0, 1, 49999)).mean().item<double>()),
            limit);
  EXPECT_LT(std::abs(z[0].mul(z[1]).mean().item<double>()), limit);
  EXPECT_NEAR(z.abs().gt(3).to(at::kDouble).mean().item<double>(), 0.0027, 0.0006);
  EXPECT_NEAR(z.pow(4).mean().item<double>(), 3, 0.2);
}

TEST(ReproducibleKernels, Bounds) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
    const Tensor u = reproducible_internal::draw({5}, 100000, dtype, c10::kCPU,
                                                 {.kind = Kind::kUniform, .a = 0, .b = 1});
    EXPECT_TRUE(u.ge(0).logical_and(u.lt(1)).all().item<bool>());
    const Tensor shifted = reproducible_internal::draw({5}, 100000, dtype, c10::kCPU,
                                                       {.kind = Kind::kUniform, .a = 3, .b = 5});
    EXPECT_TRUE(shifted.ge(3).logical_and(shifted.lt(5)).all().item<bool>());
  }
}

// --- what numbers depend on ----------------------------------------------------------------------

const F& draw_four() {
  static const F f = [](const Tensor& x) { return at::randn({4}, at::kDouble).add(x); };
  return f;
}

TEST(Reproducible, TheGeneratorMovesOnWithCallsAlone) {
  const Tensor x = at::zeros({6}, at::kDouble);
  const auto after = [&](const std::function<void()>& run) {
    at::manual_seed(4);
    run();
    return at::rand({4});
  };
  const Tensor whole = after([&] { vmap(draw_four(), reproducible())(x); });
  EXPECT_TRUE(whole.equal(after([&] { vmap(draw_four(), reproducible(1))(x); })));
  EXPECT_TRUE(whole.equal(after([&] { vmap(draw_four(), reproducible(4))(x); })));
  EXPECT_TRUE(whole.equal(after([&] { vmap(draw_four(), reproducible())(x.narrow(0, 0, 2)); })));
  EXPECT_TRUE(whole.equal(after([] { const RandomRows rows; })));
  EXPECT_TRUE(whole.equal(after(
      [&] { vmap([](const Tensor& t) { return at::randperm(5).add(t); }, reproducible())(x); })));
}

TEST(Reproducible, TwoCallsDiffer) {
  const Tensor x = at::zeros({6}, at::kDouble);
  const auto f = vmap(draw_four(), reproducible());
  EXPECT_FALSE(f(x).equal(f(x)));
}

TEST(Reproducible, AnInnerVmapIsACallOfTheOuterRow) {
  const Tensor x = at::zeros({3, 2}, at::kDouble);
  const F twice = [](const Tensor& row) {
    const auto inner = vmap(draw_four(), reproducible());
    return at::stack({inner(row), inner(row)});
  };
  at::manual_seed(4);
  const Tensor whole = vmap(twice, reproducible())(x);
  EXPECT_FALSE(whole.select(1, 0).equal(whole.select(1, 1)));
  at::manual_seed(4);
  EXPECT_TRUE(vmap(twice, reproducible(2))(x).equal(whole));
  // The numbers of a pair of rows are those of the pair, whatever the batches.
  at::manual_seed(4);
  const Tensor part = vmap(twice, reproducible())(x.narrow(0, 0, 2).narrow(1, 0, 1));
  EXPECT_TRUE(part.equal(whole.narrow(0, 0, 2).narrow(2, 0, 1)));
}

// "same" around or inside: its rows share, and chunks of it too.
TEST(Reproducible, SameInChunksInside) {
  const Tensor x = at::zeros({3, 4}, at::kDouble);
  const auto draw = [&](std::optional<int64_t> outer, std::optional<int64_t> inner) {
    at::manual_seed(4);
    const auto rows = vmap(draw_four(), {.randomness = Randomness::kSame, .chunk_size = inner});
    return vmap(
        [&](const Tensor& row) {
          return at::stack({rows(row), rows(row)});
        },
        reproducible(outer))(x);
  };
  const Tensor whole = draw({}, {});
  EXPECT_TRUE(whole[0][0][0].equal(whole[0][0][3]));
  EXPECT_FALSE(whole[0][0][0].equal(whole[1][0][0]));
  EXPECT_FALSE(whole[0][0][0].equal(whole[0][1][0]));
  EXPECT_TRUE(draw(2, {}).equal(whole));
  EXPECT_TRUE(draw({}, 1).equal(whole));
  EXPECT_TRUE(draw(1, 3).equal(whole));
}

TEST(Reproducible, InsideOfErrorItIsAnError) {
  const F inner = [](const Tensor& x) { return vmap(draw_four(), reproducible())(x); };
  EXPECT_THAT(error_of([&] {
                vmap(inner)(at::zeros({2, 3}, at::kDouble));
              }),
              HasSubstr("while in randomness error mode: vmap level 1"));
  const F permutation = [](const Tensor& x) {
    return vmap([](const Tensor& t) { return at::randperm(4).add(t); }, reproducible())(x);
  };
  EXPECT_THAT(error_of([&] {
                vmap(permutation)(at::zeros({2, 3}, at::kDouble));
              }),
              HasSubstr("called random operation"));
}

TEST(Reproducible, GeneratorsAreHonoured) {
  at::Generator generator = at::detail::createCPUGenerator();
  const auto draw = [&](uint64_t seed, std::optional<int64_t> chunk_size) {
    generator.set_current_seed(seed);
    const auto f = [&](const Tensor& x) {
      const Tensor a = at::rand({3}, generator, at::kDouble);
      return at::stack({a, at::normal(x.expand(3), 1.0, generator),
                        at::poisson(x.exp().expand(3), generator), at::rand({3}, at::kDouble)});
    };
    return vmap(f, reproducible(chunk_size))(at::ones({5}, at::kDouble));
  };
  at::manual_seed(1);
  const Tensor first = draw(7, {});
  at::manual_seed(2);
  const Tensor second = draw(7, 2);
  EXPECT_TRUE(first.narrow(1, 0, 3).equal(second.narrow(1, 0, 3)));
  EXPECT_FALSE(first.select(1, 3).equal(second.select(1, 3)));
  EXPECT_FALSE(first.narrow(1, 0, 3).equal(draw(8, {}).narrow(1, 0, 3)));
  // It moves on.
  generator.set_current_seed(7);
  const auto g = vmap([&](const Tensor& x) { return at::rand_like(x, generator); }, reproducible());
  const Tensor x = at::zeros({3, 4});
  EXPECT_FALSE(g(x).equal(g(x)));
}

TEST(Reproducible, RowsInAnyOrderAndTwice) {
  at::manual_seed(4);
  const Tensor whole = vmap(draw_four(), reproducible())(at::zeros({3}, at::kDouble));
  at::manual_seed(4);
  const RandomRows rows;
  for (const int64_t i : {2, 0, 2, 1}) {
    const RandomRows::Row row(rows, i);
    EXPECT_TRUE(draw_four()(at::zeros({}, at::kDouble)).equal(whole[i]));
  }
  EXPECT_THAT(error_of([&] { const RandomRows::Row row(rows, -1); }),
              HasSubstr("rows are counted from 0"));
}

// Rows of several threads do not disturb each other, whether an operator has a form that takes a
// generator (randperm) or borrows the default one (native_dropout).
TEST(Reproducible, RowsOnThreads) {
  constexpr int64_t kRows = 4, kTimes = 50;
  const F draw = [](const Tensor& x) {
    const Tensor dropped = std::get<0>(at::native_dropout(x.add(1).expand({16}), 0.5, true));
    return at::stack({at::randperm(16).to(at::kDouble), dropped, at::rand({16}, at::kDouble),
                      at::randint(5, 90, {16}).to(at::kDouble)});
  };
  at::manual_seed(4);
  const Tensor whole = vmap(draw, reproducible())(at::zeros({kRows}, at::kDouble));
  at::manual_seed(4);
  const RandomRows rows;
  const Tensor state = at::detail::getDefaultCPUGenerator().get_state();
  std::vector<int64_t> same(kRows);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < kRows; ++i) {
    threads.emplace_back([&, i] {
      for (int64_t time = 0; time < kTimes; ++time) {
        const RandomRows::Row row(rows, i);
        same[i] += draw(at::zeros({}, at::kDouble)).equal(whole[i]);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(same, ::testing::Each(kTimes));
  EXPECT_TRUE(at::detail::getDefaultCPUGenerator().get_state().equal(state));
}

TEST(Reproducible, InARowTensorsStayPlain) {
  const RandomRows rows;
  const RandomRows::Row row(rows, 3);
  Tensor x = at::zeros({4}, at::kDouble);
  EXPECT_TRUE(x.uniform_().is_same(x));
  EXPECT_FALSE(is_lifted(x));
  EXPECT_FALSE(is_lifted(at::rand({3})));
  EXPECT_FALSE(is_lifted(at::randperm(3)));
  const auto [y, mask] = at::native_dropout(x, 0.5, true);
  EXPECT_FALSE(is_lifted(y));
  EXPECT_FALSE(is_lifted(mask));
}

TEST(Reproducible, Dtypes) {
  const Tensor x = at::zeros({3, 50});
  for (const auto dtype :
       {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kComplexFloat, at::kComplexDouble}) {
    at::manual_seed(4);
    const auto f = [&](const Tensor& t) { return at::randn_like(t, t.options().dtype(dtype)); };
    const Tensor whole = vmap(f, reproducible())(x);
    EXPECT_EQ(whole.scalar_type(), dtype);
    at::manual_seed(4);
    EXPECT_TRUE(vmap(f, reproducible(2))(x).equal(whole));
    EXPECT_NEAR(whole.abs().to(at::kDouble).square().mean().item<double>(), 1, 0.4) << dtype;
  }
  for (const auto dtype : {at::kLong, at::kInt, at::kByte, at::kBool, at::kFloat}) {
    const auto f = [&](const Tensor&) { return at::randint(2, {50}, dtype); };
    const Tensor drawn = vmap(f, reproducible())(x);
    EXPECT_EQ(drawn.scalar_type(), dtype);
    EXPECT_TRUE(
        drawn.to(at::kDouble).ge(0).logical_and(drawn.to(at::kDouble).lt(2)).all().item<bool>());
  }
}

TEST(Reproducible, ArgumentsAreChecked) {
  const Tensor x = at::zeros({3, 5});
  const auto run = [&](const F& f) { return error_of([&] { vmap(f, reproducible())(x); }); };
  EXPECT_NE(run([](const Tensor& t) { return t.clone().uniform_(2, 1); }), "no error");
  EXPECT_NE(run([](const Tensor& t) { return t.clone().normal_(0, -1); }), "no error");
  EXPECT_NE(run([](const Tensor& t) { return t.clone().exponential_(-1); }), "no error");
  EXPECT_NE(run([](const Tensor& t) { return t.clone().random_(5, 2); }), "no error");
  EXPECT_NE(run([](const Tensor& t) { return at::randint(3, 3, {2}).add(t[0]); }), "no error");
  EXPECT_NE(run([](const Tensor& t) { return at::rand({-1}).add(t[0]); }), "no error");
  EXPECT_NE(run([](const Tensor& t) { return t.to(at::kLong).uniform_(); }), "no error");
}

// --- differentiation -----------------------------------------------------------------------------

// What a loop of plain autograd gives, row by row.
void check_gradient(const F& f, const Tensor& x) {
  at::manual_seed(4);
  const Tensor leaf = x.clone().requires_grad_();
  vmap(f, reproducible(2))(leaf).sum().backward();
  at::manual_seed(4);
  const RandomRows rows;
  for (int64_t i = 0; i < x.size(0); ++i) {
    const Tensor one = x[i].clone().requires_grad_();
    const RandomRows::Row row(rows, i);
    f(one).sum().backward();
    EXPECT_TRUE(at::allclose(leaf.grad()[i], one.grad(), 1e-12, 1e-12));
  }
}

TEST(Reproducible, Gradients) {
  const Tensor x = at::arange(1, 13, at::kDouble).view({3, 4});
  check_gradient(
      [](const Tensor& t) { return std::get<0>(at::native_dropout(t, 0.5, true)).square(); }, x);
  check_gradient([](const Tensor& t) { return at::_standard_gamma(t); }, x);
  check_gradient([](const Tensor& t) { return at::poisson(t).mul(t); }, x);
  check_gradient([](const Tensor& t) { return at::normal(t, 1.0).mul(t); }, x);
  check_gradient([](const Tensor& t) { return at::normal(t, t).add(t); }, x);
  check_gradient([](const Tensor& t) { return at::rand_like(t).mul(t); }, x);
  check_gradient([](const Tensor& t) { return t.div(20).bernoulli().mul(t); }, x);
}

// The gradient of numbers that were drawn is zero, in every mode, also seen from outside.
TEST(Reproducible, DrawnNumbersAreConstants) {
  for (const auto mode : {Randomness::kSame, Randomness::kDifferent, Randomness::kReproducible}) {
    const Tensor x = at::ones({3, 4}, at::kDouble).requires_grad_();
    const auto f = [](const Tensor& t) { return at::normal(t, 1.0).add(at::normal(t, t)); };
    vmap(f, {.randomness = mode})(x).sum().backward();
    EXPECT_TRUE(x.grad().equal(at::zeros({3, 4}, at::kDouble))) << static_cast<int>(mode);
  }
}

}  // namespace
}  // namespace torchlift
