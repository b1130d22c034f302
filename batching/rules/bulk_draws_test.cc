#include "batching/rules/bulk_draws.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/MT19937RNGEngine.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>

#include "batching/vmap.h"

namespace torchlift {
namespace {

using at::Tensor;

at::Generator seeded(uint64_t seed) { return at::detail::createCPUGenerator(seed); }

uint64_t next_of(const at::Generator& generator) {
  return at::check_generator<at::CPUGeneratorImpl>(generator)->random64();
}

// Whether libtorch draws masks by this generator here, a word after another. On Intel's processors
// it asks MKL.
bool draws_by_words() {
  const Tensor drawn = at::empty({20}).bernoulli_(0.5, seeded(1));
  at::mt19937 words(1);
  for (int64_t i = 0; i < drawn.numel(); ++i) {
    const uint32_t upper = words() & ((1U << 21) - 1);
    words();
    if ((upper < (1U << 20)) != (drawn[i].item<float>() == 1)) return false;
  }
  return true;
}

// Elements that libtorch's operator draws, too, and its generator afterwards; where this build
// draws them in another way, nothing is done.
void expect_same(const Tensor& like, double p, uint64_t seed) {
  const at::Generator theirs = seeded(seed);
  const at::Generator ours = seeded(seed);
  Tensor expected = at::empty_like(like).fill_(7);
  Tensor got = at::empty_like(like).fill_(7);
  ASSERT_EQ(got.strides(), like.strides());
  ASSERT_EQ(draw_bernoulli(got, p, ours), draws_by_words()) << like.dtype() << like.sizes();
  if (!draws_by_words()) {
    EXPECT_TRUE(got.equal(at::empty_like(like).fill_(7)));
    return;
  }
  expected.bernoulli_(p, theirs);
  EXPECT_TRUE(got.equal(expected)) << like.sizes() << " " << like.dtype() << " p=" << p;
  EXPECT_EQ(next_of(theirs), next_of(ours));
}

TEST(BulkDraws, AreLibtorchsNumbers) {
  uint64_t seed = 0;
  for (const int64_t count : {0, 1, 2, 255, 256, 257, 311, 312, 313, 624, 1000, 5000}) {
    for (const double p : {0.0, 0.3, 0.5, 0.8, 1.0, 1e-9, 1 - 1e-9}) {
      expect_same(at::empty({count}), p, ++seed);
    }
  }
}

TEST(BulkDraws, AllDtypesAndLayouts) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kHalf, at::kBFloat16, at::kBool, at::kByte,
                           at::kChar, at::kShort, at::kInt, at::kLong}) {
    expect_same(at::empty({3, 50}, dtype), 0.4, 1);
    expect_same(at::empty({3, 50, 4}, dtype).permute({2, 0, 1}), 0.4, 2);
  }
}

// Where the upper bits are equal, the lower ones decide: p that are numbers the generator gives.
TEST(BulkDraws, ComparesAllBits) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const double drawn =
        static_cast<double>(next_of(seeded(seed)) & ((uint64_t{1} << 53) - 1)) * 0x1p-53;
    expect_same(at::empty({10}), drawn, seed);
    expect_same(at::empty({10}), std::nextafter(drawn, 1.0), seed);
  }
}

TEST(BulkDraws, LeavesToLibtorchWhatIsNotPlain) {
  const Tensor gaps = at::zeros({4, 4}).slice(1, 0, 2);
  EXPECT_FALSE(draw_bernoulli(gaps, 0.5, std::nullopt));
  EXPECT_FALSE(draw_bernoulli(at::zeros({3}).set_requires_grad(true), 0.5, std::nullopt));
  EXPECT_FALSE(draw_bernoulli(at::zeros({3}, at::kComplexFloat), 0.5, std::nullopt));
  EXPECT_FALSE(draw_bernoulli(at::zeros({3}), 1.5, std::nullopt));
  EXPECT_FALSE(draw_bernoulli(at::zeros({3}), std::nan(""), std::nullopt));
}

TEST(BulkDraws, AWriteCounts) {
  const Tensor target = at::zeros({3});
  const auto before = target._version();
  const bool drawn = draw_bernoulli(target, 0.5, std::nullopt);
  EXPECT_EQ(target._version(), before + (drawn ? 1 : 0));
}

// A dropout that is mapped draws the mask of the dropout of the whole batch.
TEST(BulkDraws, DropoutOfABatch) {
  const Tensor x = at::rand({5, 7});
  at::manual_seed(3);
  const Tensor expected = at::dropout(x, 0.4, /*train=*/true);
  const Tensor after = at::rand({2});
  at::manual_seed(3);
  const Tensor got = vmap([](const Tensor& row) { return at::dropout(row, 0.4, /*train=*/true); },
                          {.randomness = Randomness::kDifferent})(x);
  EXPECT_TRUE(got.equal(expected));
  EXPECT_TRUE(at::rand({2}).equal(after));
}

}  // namespace
}  // namespace torchlift
