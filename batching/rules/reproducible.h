#ifndef TORCHLIFT_BATCHING_RULES_REPRODUCIBLE_H_
#define TORCHLIFT_BATCHING_RULES_REPRODUCIBLE_H_

// File: batching/rules/reproducible.h
//
// The numbers of Randomness::kReproducible: see NOTE [reproducible numbers] in
// core/random_stream.h.

#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "core/plumbing.h"

namespace torchlift {

// What to draw. Each number is a function of its place in the row's stream of 32-bit words.
struct Distribution {
  enum class Kind : uint8_t {
    kUniform,      // [a, b)
    kNormal,       // mean a, standard deviation b
    kExponential,  // of rate a
    kCauchy,       // median a, scale b
    kLogNormal,    // exp of a normal number of mean a, standard deviation b
    kGeometric,    // of probability a
    kBernoulli,    // 1 with probability a
    kInteger,      // from, from + 1... `range` of them; a range of 0 stands for 2^64
  };
  Kind kind;
  double a = 0;
  double b = 1;
  int64_t from = 0;
  uint64_t range = 0;
};

// The numbers of `dtype` that a call of a random operator in a function under `level` draws: for
// each example a tensor of `sizes`, contiguous. The result belongs to the levels around `level`,
// each of which gives its rows numbers of their own (or the same ones, as it asks). Counts as one
// call.
Batched reproducible_numbers(const Level& level, at::IntArrayRef sizes, at::ScalarType dtype,
                             c10::Device device, const std::optional<at::Generator>& generator,
                             const Distribution& distribution, const char* op);

namespace reproducible_internal {

// One row of `count` numbers for each key: [keys, count].
at::Tensor draw(const std::vector<uint64_t>& keys, int64_t count, at::ScalarType dtype,
                c10::Device device, const Distribution& distribution);

// The same numbers (in the last bit, what the device makes of logarithms and the like), by
// operators on integer tensors, for a device without a kernel of ours.
at::Tensor draw_by_operators(const std::vector<uint64_t>& keys, int64_t count, at::ScalarType dtype,
                             c10::Device device, const Distribution& distribution);

}  // namespace reproducible_internal
}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_REPRODUCIBLE_H_
