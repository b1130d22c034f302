#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/bernoulli.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/multinomial.h>
#include <ATen/ops/native_dropout.h>
#include <ATen/ops/normal.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randint_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/randperm.h>
#include <ATen/ops/rrelu.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "batching/fallback.h"
#include "batching/testing/call_op.h"
#include "core/level.h"
#include "core/lifted_tensor.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using testing::call_op;

constexpr int64_t kSize = 4;

using F = std::function<at::Tensor(const at::Tensor&)>;

at::Tensor with_batch_first(const at::Tensor& t, const Level& level) {
  const Lowered lowered = lower(t, level);
  std::vector<int64_t> sizes{level.size()};
  sizes.insert(sizes.end(), lowered.value.sizes().begin(), lowered.value.sizes().end());
  return lowered.bdim ? lowered.value.movedim(*lowered.bdim, 0) : lowered.value.expand(sizes);
}

// vmap(f, in_dims=bdim, randomness=...)(x); x not batched when bdim is nullopt.
at::Tensor map(const F& f, const at::Tensor& x, std::optional<int64_t> bdim,
               Randomness randomness) {
  LevelScope scope({.size = kSize, .randomness = randomness});
  const at::Tensor in = bdim ? lift_alias(x, bdim, scope.level()) : x;
  return with_batch_first(f(in), *scope.level());
}

bool rows_equal(const at::Tensor& t) {
  for (int64_t i = 1; i < t.size(0); ++i) {
    if (!t[i].equal(t[0])) return false;
  }
  return true;
}

bool rows_differ(const at::Tensor& t) {
  for (int64_t i = 1; i < t.size(0); ++i) {
    if (t[i].equal(t[0])) return false;
  }
  return true;
}

struct Case {
  const char* name;
  F f;
  bool in_place = false;  // draws into its argument
};

// Draws 40 numbers a call, so that equal rows are no accident.
const std::vector<Case>& cases() {
  static const auto* all = new std::vector<Case>{
      {"rand", [](const at::Tensor&) { return at::rand({40}); }},
      {"randn", [](const at::Tensor&) { return at::randn({40}, at::kDouble); }},
      {"randint", [](const at::Tensor&) { return at::randint(1000, {40}); }},
      {"randint.low", [](const at::Tensor&) { return at::randint(-1000, 1000, {40}); }},
      {"randperm", [](const at::Tensor&) { return at::randperm(40); }},
      {"normal(floats)", [](const at::Tensor&) { return at::normal(1.0, 2.0, {40}); }},
      {"rand_like", [](const at::Tensor& x) { return at::rand_like(x); }},
      {"randn_like", [](const at::Tensor& x) { return at::randn_like(x); }},
      {"randint_like", [](const at::Tensor& x) { return at::randint_like(x, 1000); }},
      {"randint_like.low", [](const at::Tensor& x) { return at::randint_like(x, 10, 1000); }},
      {"bernoulli", [](const at::Tensor& x) { return at::bernoulli(x); }},
      {"bernoulli.p", [](const at::Tensor& x) { return at::bernoulli(x, 0.5); }},
      {"bernoulli(x, p)",
       [](const at::Tensor& x) {
         return call_op("aten::bernoulli.Tensor", {x, x})[0];
       }},
      {"normal(mean)", [](const at::Tensor& x) { return at::normal(x, 2.0); }},
      {"normal(std)", [](const at::Tensor& x) { return at::normal(1.0, x); }},
      {"normal(both)", [](const at::Tensor& x) { return at::normal(x, x); }},
      {"dropout",
       [](const at::Tensor& x) { return std::get<0>(at::native_dropout(x, 0.5, true)); }},
      {"uniform_", [](const at::Tensor& x) { return at::Tensor(x).uniform_(); }, true},
      {"normal_", [](const at::Tensor& x) { return at::Tensor(x).normal_(1.0, 2.0); }, true},
      {"random_", [](const at::Tensor& x) { return at::Tensor(x).random_(); }, true},
      {"random_.to", [](const at::Tensor& x) { return at::Tensor(x).random_(1000); }, true},
      {"exponential_", [](const at::Tensor& x) { return at::Tensor(x).exponential_(); }, true},
      {"cauchy_", [](const at::Tensor& x) { return at::Tensor(x).cauchy_(); }, true},
      {"log_normal_", [](const at::Tensor& x) { return at::Tensor(x).log_normal_(); }, true},
      {"geometric_", [](const at::Tensor& x) { return at::Tensor(x).geometric_(0.1); }, true},
      {"bernoulli_", [](const at::Tensor& x) { return at::Tensor(x).bernoulli_(0.5); }, true},
      {"bernoulli_.Tensor", [](const at::Tensor& x) { return at::Tensor(x).bernoulli_(x.clone()); },
       true},
  };
  return *all;
}

at::Tensor halves(at::IntArrayRef sizes) { return at::full(sizes, 0.5, at::kDouble); }

TEST(RandomRules, DifferentOrSame) {
  const StrictScope strict;
  for (const Case& c : cases()) {
    for (const std::optional<int64_t> bdim :
         {std::optional<int64_t>(0), std::optional<int64_t>(1), std::optional<int64_t>()}) {
      const at::Tensor x = !bdim        ? halves({40})
                           : *bdim == 0 ? halves({kSize, 40})
                                        : halves({40, kSize});
      const std::string label = std::string(c.name) + (bdim ? ", batched" : ", not batched");
      const at::Tensor same = map(c.f, x.clone(), bdim, Randomness::kSame);
      EXPECT_EQ(same.sizes(), at::IntArrayRef({kSize, 40})) << label;
      EXPECT_TRUE(rows_equal(same)) << label;
      if (c.in_place && !bdim) continue;
      const at::Tensor different = map(c.f, x.clone(), bdim, Randomness::kDifferent);
      EXPECT_EQ(different.sizes(), at::IntArrayRef({kSize, 40})) << label;
      EXPECT_TRUE(rows_differ(different)) << label;
      EXPECT_EQ(different.scalar_type(), same.scalar_type()) << label;
    }
  }
}

TEST(RandomRules, ErrorMode) {
  for (const Case& c : cases()) {
    EXPECT_THAT(error_of([&] {
                  map(c.f, halves({kSize, 40}), 0, Randomness::kError);
                }),
                ::testing::HasSubstr("called random operation"))
        << c.name;
  }
}

TEST(RandomRules, InPlaceOnUnbatched) {
  for (const Case& c : cases()) {
    if (!c.in_place) continue;
    EXPECT_THAT(error_of([&] { map(c.f, halves({40}), std::nullopt, Randomness::kDifferent); }),
                ::testing::HasSubstr("different in-place randomness on an unbatched tensor"))
        << c.name;
  }
}

TEST(RandomRules, DropoutThatDrawsNothingIsNoError) {
  const at::Tensor x = halves({kSize, 40});
  const auto eval = [](const at::Tensor& in) {
    return std::get<0>(at::native_dropout(in, 0.5, false));
  };
  EXPECT_TRUE(map(eval, x, 0, Randomness::kError).equal(x));
  const auto never = [](const at::Tensor& in) {
    return std::get<0>(at::native_dropout(in, 0.0, true));
  };
  EXPECT_TRUE(map(never, x, 0, Randomness::kError).equal(x));
  const auto rrelu = [](const at::Tensor& in) {
    return at::rrelu(in, 0.1, 0.3, /*training=*/false);
  };
  EXPECT_TRUE(map(rrelu, x, 0, Randomness::kError).equal(x));
}

// randomness="same": what the function alone draws with that seed.
TEST(RandomRules, SameIsWhatOneExampleDraws) {
  for (const Case& c : cases()) {
    if (std::string(c.name).rfind("bernoulli_.Tensor", 0) == 0) continue;
    at::manual_seed(5);
    const at::Tensor alone = c.f(halves({40}));
    at::manual_seed(5);
    const at::Tensor mapped = map(c.f, halves({kSize, 40}), 0, Randomness::kSame);
    EXPECT_TRUE(at::allclose(mapped[2].to(at::kDouble), alone.to(at::kDouble), 1e-6, 1e-6))
        << c.name;
  }
}

TEST(RandomRules, SeedsReproduce) {
  for (const Case& c : cases()) {
    at::manual_seed(7);
    const at::Tensor first = map(c.f, halves({kSize, 40}), 0, Randomness::kDifferent);
    at::manual_seed(7);
    const at::Tensor second = map(c.f, halves({kSize, 40}), 0, Randomness::kDifferent);
    EXPECT_TRUE(first.equal(second)) << c.name;
  }
}

TEST(RandomRules, GeneratorIsUsed) {
  at::Generator generator = at::globalContext().defaultGenerator(at::kCPU).clone();
  const auto draw = [&] {
    generator.set_current_seed(11);
    return map([&](const at::Tensor& x) { return x.add(at::randn({40}, generator, at::kDouble)); },
               at::zeros({kSize, 40}, at::kDouble), 0, Randomness::kDifferent);
  };
  const at::Tensor first = draw();
  EXPECT_TRUE(rows_differ(first));
  EXPECT_TRUE(first.equal(draw()));
}

// The rows of the outer level must be equal or differ as the outer one asks, and those of the inner
// level as the inner one asks.
TEST(RandomRules, NestedLevelsEachHaveTheirSay) {
  for (const Case& c : cases()) {
    for (const auto outer : {Randomness::kSame, Randomness::kDifferent}) {
      for (const auto inner : {Randomness::kSame, Randomness::kDifferent}) {
        const F both = [&](const at::Tensor& x) { return map(c.f, x, 0, inner); };
        const at::Tensor out = map(both, halves({kSize, kSize, 40}), 0, outer);
        const bool outer_same = outer == Randomness::kSame;
        const bool inner_same = inner == Randomness::kSame;
        EXPECT_EQ(out.sizes(), at::IntArrayRef({kSize, kSize, 40})) << c.name;
        EXPECT_TRUE(outer_same ? rows_equal(out) : rows_differ(out)) << c.name << " outer";
        for (int64_t i = 0; i < kSize; ++i) {
          EXPECT_TRUE(inner_same ? rows_equal(out[i]) : rows_differ(out[i])) << c.name << " inner";
        }
      }
    }
  }
}

TEST(RandomRules, OuterErrorReachesInnerDraws) {
  const F inner = [](const at::Tensor& x) {
    return map([](const at::Tensor&) { return at::rand({40}); }, x, 0, Randomness::kDifferent);
  };
  EXPECT_THAT(error_of([&] {
                map(inner, halves({kSize, kSize, 40}), 0, Randomness::kError);
              }),
              ::testing::HasSubstr("called random operation"));
}

TEST(RandomRules, ParametersThatDifferBetweenExamples) {
  const at::Tensor p = at::zeros({kSize, 40}, at::kDouble);
  p[1].fill_(1.0);
  for (const auto randomness : {Randomness::kSame, Randomness::kDifferent}) {
    const at::Tensor drawn =
        map([](const at::Tensor& x) { return at::bernoulli(x); }, p, 0, randomness);
    EXPECT_TRUE(drawn.equal(p));
    const at::Tensor normal =
        map([](const at::Tensor& x) { return at::normal(x.mul(1e6), 1.0).div(1e6).round(); }, p, 0,
            randomness);
    EXPECT_TRUE(normal.abs().equal(p));
  }
}

TEST(RandomRules, Multinomial) {
  at::Tensor weights = at::zeros({kSize, 3, 5}, at::kDouble);
  for (int64_t i = 0; i < kSize; ++i) weights[i].select(1, i).fill_(1.0);
  const F draw = [](const at::Tensor& w) { return at::multinomial(w, 6, /*replacement=*/true); };
  const at::Tensor rows = map(draw, weights, 0, Randomness::kDifferent);
  EXPECT_EQ(rows.sizes(), at::IntArrayRef({kSize, 3, 6}));
  for (int64_t i = 0; i < kSize; ++i) EXPECT_TRUE(rows[i].eq(i).all().item<bool>());
  const at::Tensor one = map(draw, weights.select(1, 0), 0, Randomness::kDifferent);
  EXPECT_EQ(one.sizes(), at::IntArrayRef({kSize, 6}));
  EXPECT_THAT(error_of([&] { map(draw, weights, 0, Randomness::kSame); }),
              ::testing::HasSubstr("cannot do so with randomness=\"same\""));
}

TEST(RandomRules, Rrelu) {
  const at::Tensor x = at::full({kSize, 40}, -1.0, at::kDouble);
  const F f = [](const at::Tensor& in) { return at::rrelu(in, 0.1, 0.3, /*training=*/true); };
  const at::Tensor different = map(f, x, 0, Randomness::kDifferent);
  EXPECT_TRUE(rows_differ(different));
  EXPECT_TRUE(different.neg().gt(0.1).logical_and(different.neg().lt(0.3)).all().item<bool>());
  EXPECT_TRUE(rows_equal(map(f, x, 0, Randomness::kSame)));
}

// Dropout of whole channels, and the one that keeps mean and variance, are made of the above.
TEST(RandomRules, CompositeDropouts) {
  for (const char* op : {"aten::dropout", "aten::feature_dropout", "aten::alpha_dropout",
                         "aten::feature_alpha_dropout"}) {
    const F f = [op](const at::Tensor& x) { return call_op(op, {x, 0.5, true})[0]; };
    const at::Tensor x = at::ones({kSize, 2, 40, 3}, at::kDouble);
    EXPECT_TRUE(rows_differ(map(f, x, 0, Randomness::kDifferent))) << op;
    EXPECT_TRUE(rows_equal(map(f, x, 0, Randomness::kSame))) << op;
  }
}

// The gradient of dropout is its own mask.
TEST(RandomRules, DropoutBackward) {
  for (const auto randomness : {Randomness::kSame, Randomness::kDifferent}) {
    const at::Tensor x = at::ones({kSize, 40}, at::kDouble).requires_grad_();
    const at::Tensor y =
        map([](const at::Tensor& in) { return std::get<0>(at::native_dropout(in, 0.5, true)); }, x,
            0, randomness);
    y.sum().backward();
    EXPECT_TRUE(x.grad().equal(y.detach()));
  }
}

}  // namespace
}  // namespace torchlift
