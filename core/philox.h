#ifndef TORCHLIFT_CORE_PHILOX_H_
#define TORCHLIFT_CORE_PHILOX_H_

// File: core/philox.h
//
// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011): a bijection of 128-bit counters for each 64-bit key, so
// the numbers at one counter can be had without those before it.
//
//   const PhiloxWords w = philox(/*key=*/seed, /*low=*/7, /*high=*/0);   // four 32-bit words

#include <array>
#include <cstdint>

namespace torchlift {

using PhiloxWords = std::array<uint32_t, 4>;

// The words at the counter (low, high), each 64 bits of it.
inline PhiloxWords philox(uint64_t key, uint64_t low, uint64_t high) {
  auto c0 = static_cast<uint32_t>(low), c1 = static_cast<uint32_t>(low >> 32);
  auto c2 = static_cast<uint32_t>(high), c3 = static_cast<uint32_t>(high >> 32);
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0;
    const uint64_t p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {c0, c1, c2, c3};
}

// What the counters of a key are used for. The high half of a counter says it.
enum class PhiloxUse : uint64_t {
  kNumbers = 0,  // the numbers a random operator draws
  kRow = 1,      // the key of a row
  kCall = 2,     // the key of a call
  kState = 3,    // the state of a sequential generator
};

// A key made of another: that of row or call `index`.
inline uint64_t fold_in(uint64_t key, PhiloxUse use, uint64_t index) {
  const PhiloxWords w = philox(key, index, static_cast<uint64_t>(use));
  return (uint64_t{w[1]} << 32) | w[0];
}

}  // namespace torchlift

#endif  // TORCHLIFT_CORE_PHILOX_H_
