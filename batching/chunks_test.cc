#include "batching/chunks.h"

#include <ATen/Context.h>
#include <ATen/ops/allclose.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <tuple>

#include "batching/vmap.h"
#include "core/error.h"
#include "core/tensor_operators.h"
#include "core/testing.h"

namespace torchlift {
namespace {

using at::Tensor;
using ::testing::HasSubstr;

// One example x: [100] takes an outer product of 100 x 100 doubles, twice at its peak.
Tensor outer_norm(const Tensor& x) {
  const Tensor product = x.unsqueeze(1) * x;
  return (product * 2).sum();
}
constexpr int64_t kExample = 2 * 100 * 100 * 8;

TEST(MemoryBudget, ChunksAreAsLargeAsItAllows) {
  const Tensor x = at::randn({64, 100}, at::kDouble);
  const Tensor whole = vmap(outer_norm)(x);
  for (const int64_t examples : {1, 3, 10, 64, 1000}) {
    // Room for that many examples, and a little for what is small beside them.
    const int64_t budget = examples * kExample + kExample / 2;
    const Tensor got = vmap(outer_norm, {.memory_budget = budget})(x);
    EXPECT_TRUE(at::allclose(got, whole));
    const MemoryReport& report = memory_report().value();
    EXPECT_EQ(report.examples, 64);
    EXPECT_EQ(report.budget, budget);
    EXPECT_LE(report.peak_bytes, budget);
    EXPECT_GE(report.peak_bytes, std::min(report.chunk_size * kExample, budget) * 9 / 10);
    if (examples < 64) {
      EXPECT_LE(report.chunk_size, examples);
      EXPECT_GE(report.chunk_size, std::min<int64_t>(examples, 63) * 2 / 3);
      EXPECT_LE(report.chunks, 2 + 63 / report.chunk_size + 1);
    } else {
      EXPECT_EQ(report.chunks, 2);  // one example, and the rest
    }
    EXPECT_GE(report.result_bytes, 64 * 8);
    EXPECT_LE(report.result_bytes, 64 * 8 + 1024);
  }
}

// What every chunk needs however small it is.
TEST(MemoryBudget, FixedCostsAreToldApart) {
  const auto f = [](const Tensor& x) {
    const Tensor shared = at::ones({100, 1000}, at::kDouble);  // 800 kB
    return shared.sum() + (x.unsqueeze(1) * x).sum();          // 80 kB an example
  };
  const Tensor x = at::randn({100, 100}, at::kDouble);
  const Tensor got = vmap(f, {.memory_budget = 1800000})(x);
  EXPECT_TRUE(at::allclose(got, vmap(f)(x)));
  const MemoryReport& report = memory_report().value();
  EXPECT_LE(report.peak_bytes, 1800000);
  EXPECT_GE(report.chunk_size, 6);
}

TEST(MemoryBudget, GradientsOutsideAreRight) {
  const Tensor x = at::randn({20, 100}, at::kDouble).requires_grad_();
  const Tensor y = vmap(outer_norm, {.memory_budget = 6 * kExample})(x);
  y.sum().backward();
  const Tensor gradient = x.grad().clone();
  x.mutable_grad() = Tensor();
  vmap(outer_norm)(x).sum().backward();
  EXPECT_TRUE(at::allclose(gradient, x.grad()));
}

TEST(MemoryBudget, SameAndReproducibleNumbersDoNotDependOnIt) {
  const auto f = [](const Tensor& x) { return at::rand_like(x) + outer_norm(x) * 0; };
  const Tensor x = at::randn({20, 100}, at::kDouble);
  for (const auto mode : {Randomness::kSame, Randomness::kReproducible}) {
    at::manual_seed(3);
    const Tensor whole = vmap(f, {.randomness = mode})(x);
    at::manual_seed(3);
    EXPECT_TRUE(vmap(f, {.randomness = mode, .memory_budget = 4 * kExample})(x).equal(whole));
    EXPECT_GT(memory_report()->chunks, 3);
  }
}

TEST(MemoryBudget, TreesAndOtherDims) {
  const auto f = [](const Tensor& x) { return std::make_tuple(x * 2, outer_norm(x)); };
  const Tensor x = at::randn({100, 12}, at::kDouble);
  const VmapOptions options{.in_dims = 1, .out_dims = out(-1, 0), .memory_budget = 3 * kExample};
  const auto [doubled, norms] = vmap(f, options)(x);
  EXPECT_TRUE(doubled.equal(x * 2));
  EXPECT_TRUE(at::allclose(norms, vmap(outer_norm, {.in_dims = 1})(x)));
}

TEST(MemoryBudget, Nested) {
  const Tensor x = at::randn({6, 8, 100}, at::kDouble);
  const auto inner = vmap(outer_norm, {.memory_budget = 20 * kExample});
  const Tensor got = vmap(inner, {.memory_budget = 100 * kExample})(x);
  EXPECT_TRUE(at::allclose(got, vmap(vmap(outer_norm))(x)));
  EXPECT_EQ(memory_report()->budget, 100 * kExample);
}

TEST(MemoryBudget, SmallBatches) {
  EXPECT_EQ(vmap(outer_norm, {.memory_budget = kExample})(at::zeros({0, 100}, at::kDouble)).numel(),
            0);
  EXPECT_EQ(
      vmap(outer_norm, {.memory_budget = 2 * kExample})(at::zeros({1, 100}, at::kDouble)).numel(),
      1);
  EXPECT_EQ(memory_report()->chunks, 1);
}

TEST(MemoryBudget, Errors) {
  const Tensor x = at::randn({5, 100}, at::kDouble);
  EXPECT_THAT(error_of([&] { vmap(outer_norm, {.memory_budget = kExample / 2})(x); }),
              AllOf(HasSubstr("memory_budget is 80000 bytes, but one example takes 1"),
                    HasSubstr("Raise the budget")));
  EXPECT_THAT(error_of([] { vmap(outer_norm, {.memory_budget = 0}); }),
              HasSubstr("memory_budget is 0, but it is the number of bytes"));
  EXPECT_THAT(error_of([] { vmap(outer_norm, {.memory_budget = -5}); }),
              HasSubstr("memory_budget is -5"));
  EXPECT_THAT(error_of([] { vmap(outer_norm, {.chunk_size = 3, .memory_budget = 5}); }),
              HasSubstr("both chunk_size (3) and memory_budget (5) were given"));
  // The next call is not disturbed by one that failed.
  EXPECT_TRUE(
      at::allclose(vmap(outer_norm, {.memory_budget = 8 * kExample})(x), vmap(outer_norm)(x)));
}

}  // namespace
}  // namespace torchlift
