#include "core/philox.h"

#include <gtest/gtest.h>

#include <set>

namespace torchlift {
namespace {

// Known answers of the authors' Random123 1.14 (tests/kat_vectors, philox 4x32 10).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (PhiloxWords{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  const uint64_t ones = ~uint64_t{0};
  EXPECT_EQ(philox(ones, ones, ones),
            (PhiloxWords{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  // Digits of pi: counter 243f6a88 85a308d3 13198a2e 03707344, key a4093822 299f31d0.
  EXPECT_EQ(philox(0x299f31d0a4093822, 0x85a308d3243f6a88, 0x0370734413198a2e),
            (PhiloxWords{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, FoldedKeysDiffer) {
  std::set<uint64_t> keys;
  for (uint64_t seed = 0; seed < 10; ++seed) {
    for (uint64_t i = 0; i < 100; ++i) {
      for (const auto use : {PhiloxUse::kRow, PhiloxUse::kCall, PhiloxUse::kState}) {
        keys.insert(fold_in(seed, use, i));
      }
    }
  }
  EXPECT_EQ(keys.size(), 3000);
}

}  // namespace
}  // namespace torchlift
