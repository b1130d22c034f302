#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/enum_tag.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <set>
#include <string>
#include <vector>

#include "batching/fallback.h"
#include "batching/random_rows.h"
#include "batching/testing/random_ops.h"
#include "batching/vmap.h"
#include "core/testing.h"

// Every random operator in every mode of randomness.

namespace torchlift {
namespace {

using at::Tensor;
using testing::random_ops;
using testing::RandomOp;

constexpr int64_t kRows = 5;
constexpr int64_t kNumbers = 40;

Tensor halves(at::IntArrayRef sizes) { return at::full(sizes, 0.5, at::kDouble); }

// vmap of the operator over a fresh batch, or over nothing: every example sees the same tensor.
Tensor map(const RandomOp& op, bool batched, int64_t rows, VmapOptions options) {
  if (batched) return vmap(op.f, options)(halves({rows, kNumbers}));
  options.in_dims = kNone;
  options.axis_size = rows;
  return vmap(op.f, options)(halves({kNumbers}));
}

bool rows_equal(const Tensor& t) {
  for (int64_t i = 1; i < t.size(0); ++i) {
    if (!t[i].equal(t[0])) return false;
  }
  return true;
}

bool rows_differ(const Tensor& t) {
  for (int64_t i = 0; i < t.size(0); ++i) {
    for (int64_t j = 0; j < i; ++j) {
      if (t[i].equal(t[j])) return false;
    }
  }
  return true;
}

// Bit for bit, unless matrix products are involved.
bool agree(const RandomOp& op, const Tensor& a, const Tensor& b) {
  return op.exact ? a.equal(b) : a.allclose(b, 1e-12, 1e-12);
}

// The same on a copy that the function makes: it can be promoted, what is passed in cannot.
RandomOp on_copy(const RandomOp& op) {
  RandomOp copying = op;
  copying.f = [f = op.f](const Tensor& x) { return f(x.clone()); };
  return copying;
}

// Calls f(op, batched) for all that make sense together.
void for_all(const std::function<void(const RandomOp&, bool)>& f) {
  const StrictScope strict;
  for (const RandomOp& op : random_ops()) {
    for (const bool batched : {false, true}) {
      SCOPED_TRACE(op.name + (batched ? ", batched" : ", not batched"));
      f(op, batched);
    }
  }
}

// --- the table -----------------------------------------------------------------------------------

bool ends_with(const std::string& name, const std::string& end) {
  return name.size() >= end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
}

bool runs_on_cpu(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(c10::DispatchKey::CPU) ||
         op.hasKernelForDispatchKey(c10::DispatchKey::CompositeExplicitAutograd) ||
         op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

TEST(RandomOperators, TheTableHasAllOfThem) {
  std::set<std::string> known;
  for (const RandomOp& op : random_ops()) known.insert(op.name);
  for (const auto& [name, reason] : testing::random_ops_left_out()) known.insert(name);
  for (const c10::OperatorName& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    if (!op.has_value() || !op->hasTag(at::Tag::nondeterministic_seeded)) continue;
    if (name.name.rfind("aten::", 0) != 0 || !runs_on_cpu(*op)) continue;
    if (ends_with(name.overload_name, "out")) continue;  // write into a tensor without a batch dim
    EXPECT_EQ(known.count(c10::toString(name)), 1) << c10::toString(name);
  }
}

// --- error, same, different ----------------------------------------------------------------------

TEST(RandomOperators, Error) {
  for_all([](const RandomOp& op, bool batched) {
    EXPECT_THAT(error_of([&] { map(op, batched, kRows, {}); }),
                ::testing::HasSubstr("called random operation"));
  });
}

TEST(RandomOperators, Same) {
  for_all([](const RandomOp& op, bool batched) {
    const VmapOptions options{.randomness = Randomness::kSame};
    if (batched && !op.shares) {
      EXPECT_THAT(error_of([&] { map(op, batched, kRows, options); }),
                  ::testing::HasSubstr("cannot do so with randomness=\"same\""));
      return;
    }
    at::manual_seed(3);
    const Tensor drawn = map(op, batched, kRows, options);
    EXPECT_TRUE(rows_equal(drawn));
    at::manual_seed(3);
    const Tensor alone = op.f(halves({kNumbers}));
    EXPECT_EQ(drawn.scalar_type(), alone.scalar_type());
    EXPECT_TRUE(drawn[1].allclose(alone, 1e-6, 1e-6) || op.name == "aten::bernoulli_.Tensor" ||
                op.name == "aten::bernoulli.Tensor");
  });
}

TEST(RandomOperators, Different) {
  for_all([](const RandomOp& given, bool batched) {
    const VmapOptions options{.randomness = Randomness::kDifferent};
    const bool promoted = (given.in_place || given.fills) && !batched;
    const RandomOp op = promoted ? on_copy(given) : given;
    if (given.in_place && !batched) {
      EXPECT_THAT(error_of([&] { map(given, batched, kRows, options); }),
                  ::testing::HasSubstr("cannot ask for different in-place randomness"));
    }
    const Tensor drawn = map(op, batched, kRows, options);
    EXPECT_EQ(drawn.sizes(), at::IntArrayRef({kRows, kNumbers}));
    EXPECT_EQ(drawn.scalar_type(), op.f(halves({kNumbers})).scalar_type());
    EXPECT_TRUE(rows_differ(drawn));
  });
}

TEST(RandomOperators, NestedModes) {
  using enum Randomness;
  const StrictScope strict;
  for (const RandomOp& op : random_ops()) {
    for (const auto outer : {kSame, kDifferent, kReproducible}) {
      for (const auto inner : {kSame, kDifferent, kReproducible}) {
        if (!op.shares && (outer == kSame || inner == kSame)) continue;
        SCOPED_TRACE(op.name);
        const auto f = vmap(vmap(op.f, {.randomness = inner}), {.randomness = outer});
        const Tensor drawn = f(halves({kRows, 3, kNumbers}));
        EXPECT_EQ(drawn.sizes(), at::IntArrayRef({kRows, 3, kNumbers}));
        EXPECT_TRUE(outer == kSame ? rows_equal(drawn) : rows_differ(drawn)) << "outer";
        for (int64_t i = 0; i < kRows; ++i) {
          EXPECT_TRUE(inner == kSame ? rows_equal(drawn[i]) : rows_differ(drawn[i])) << "inner";
        }
      }
    }
  }
}

// --- reproducible --------------------------------------------------------------------------------

VmapOptions reproducible(std::optional<int64_t> chunk_size = {}) {
  return {.randomness = Randomness::kReproducible, .chunk_size = chunk_size};
}

// f on rows 0, 1... of a loop.
Tensor looped(const std::function<Tensor(int64_t)>& f, int64_t count) {
  const RandomRows rows;
  std::vector<Tensor> results;
  for (int64_t i = 0; i < count; ++i) {
    const RandomRows::Row row(rows, i);
    results.push_back(f(i));
  }
  return at::stack(results);
}

TEST(RandomOperators, Reproducible) {
  for_all([](const RandomOp& given, bool batched) {
    const bool promoted = (given.in_place || given.fills) && !batched;
    const RandomOp op = promoted ? on_copy(given) : given;
    if (given.in_place && !batched) {
      EXPECT_THAT(error_of([&] { map(given, batched, kRows, reproducible()); }),
                  ::testing::HasSubstr("cannot ask for reproducible in-place randomness"));
    }
    at::manual_seed(11);
    const Tensor whole = map(op, batched, kRows, reproducible());
    EXPECT_EQ(whole.sizes(), at::IntArrayRef({kRows, kNumbers}));
    const Tensor alone = op.f(halves({kNumbers}));
    EXPECT_EQ(whole.scalar_type(), alone.scalar_type());
    EXPECT_TRUE(rows_differ(whole));
    for (const int64_t chunk : {1, 2, 3, 4}) {
      at::manual_seed(11);
      EXPECT_TRUE(agree(op, map(op, batched, kRows, reproducible(chunk)), whole)) << chunk;
    }
    at::manual_seed(11);
    const Tensor loop = looped([&](int64_t) { return op.f(halves({kNumbers})); }, kRows);
    EXPECT_TRUE(agree(op, loop, whole));
    // The batch does not matter, the seed and the call do.
    at::manual_seed(11);
    EXPECT_TRUE(agree(op, map(op, batched, 2, reproducible()), whole.narrow(0, 0, 2)));
    EXPECT_FALSE(map(op, batched, 2, reproducible()).equal(whole.narrow(0, 0, 2)));
    at::manual_seed(12);
    EXPECT_FALSE(map(op, batched, kRows, reproducible()).equal(whole));
    EXPECT_EQ(map(op, batched, 1, reproducible()).sizes(), at::IntArrayRef({1, kNumbers}));
    EXPECT_EQ(map(op, batched, 0, reproducible()).sizes(), at::IntArrayRef({0, kNumbers}));
  });
}

TEST(RandomOperators, ReproducibleTwiceInOneFunction) {
  for_all([](const RandomOp& op, bool batched) {
    RandomOp twice = op;
    twice.f = [&](const Tensor& x) { return at::stack({op.f(x.clone()), op.f(x.clone())}); };
    at::manual_seed(11);
    const Tensor whole = map(twice, batched, kRows, reproducible());
    EXPECT_FALSE(whole.select(1, 0).equal(whole.select(1, 1)));
    at::manual_seed(11);
    EXPECT_TRUE(agree(op, map(twice, batched, kRows, reproducible(2)), whole));
  });
}

TEST(RandomOperators, ReproducibleNested) {
  const StrictScope strict;
  for (const RandomOp& op : random_ops()) {
    SCOPED_TRACE(op.name);
    const Tensor x = halves({3, 2, kNumbers});
    at::manual_seed(11);
    const Tensor whole = vmap(vmap(op.f, reproducible()), reproducible())(x);
    EXPECT_TRUE(rows_differ(whole.flatten(0, 1)));
    for (const int64_t outer : {1, 2}) {
      for (const int64_t inner : {1, 2}) {
        at::manual_seed(11);
        const auto chunked = vmap(vmap(op.f, reproducible(inner)), reproducible(outer));
        EXPECT_TRUE(agree(op, chunked(x.clone()), whole));
      }
    }
    at::manual_seed(11);
    const auto loop_of_vmap = [&](int64_t i) { return vmap(op.f, reproducible())(x[i].clone()); };
    EXPECT_TRUE(agree(op, looped(loop_of_vmap, 3), whole));
    at::manual_seed(11);
    const auto loop_of_loop = [&](int64_t i) {
      return looped([&](int64_t j) { return op.f(x[i][j].clone()); }, 2);
    };
    EXPECT_TRUE(agree(op, looped(loop_of_loop, 3), whole));
  }
}

// Two samples of one distribution: Kolmogorov and Smirnov's distance is below 1.95 sqrt(2 / n), but
// once in a thousand times. Ties (discrete numbers) make it smaller.
double distance(Tensor a, Tensor b) {
  a = std::get<0>(a.flatten().to(at::kDouble).sort());
  b = std::get<0>(b.flatten().to(at::kDouble).sort());
  const auto* x = a.const_data_ptr<double>();
  const auto* y = b.const_data_ptr<double>();
  const int64_t n = a.numel();
  double largest = 0;
  int64_t i = 0, j = 0;
  while (i < n && j < n) {
    const double value = std::min(x[i], y[j]);
    while (i < n && x[i] == value) ++i;
    while (j < n && y[j] == value) ++j;
    largest = std::max(largest, std::abs(static_cast<double>(i - j)) / static_cast<double>(n));
  }
  return largest;
}

TEST(RandomOperators, DistributionsAreThoseOfTheOperators) {
  for_all([](const RandomOp& op, bool batched) {
    if (!op.numbers) return;
    constexpr int64_t kSamples = 500;
    at::manual_seed(11);
    const Tensor drawn = map(batched ? op : on_copy(op), batched, kSamples, reproducible());
    std::vector<Tensor> plain;
    for (int64_t i = 0; i < kSamples; ++i) plain.push_back(op.f(halves({kNumbers})));
    EXPECT_LT(distance(drawn, at::stack(plain)), 1.95 * std::sqrt(2.0 / (kSamples * kNumbers)));
  });
}

}  // namespace
}  // namespace torchlift
