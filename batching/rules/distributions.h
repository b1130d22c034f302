#ifndef TORCHLIFT_BATCHING_RULES_DISTRIBUTIONS_H_
#define TORCHLIFT_BATCHING_RULES_DISTRIBUTIONS_H_

// File: batching/rules/distributions.h
//
// What each random operator draws, from its dtype and the arguments after the tensor.

#include <ATen/core/Generator.h>
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "batching/rules/reproducible.h"

namespace torchlift {

using OptGenerator = std::optional<at::Generator>;

inline Distribution uniform_numbers_of(at::ScalarType, double from, double to,
                                       const OptGenerator&) {
  return {.kind = Distribution::Kind::kUniform, .a = from, .b = to};
}
inline Distribution normal_numbers_of(at::ScalarType, double mean, double std,
                                      const OptGenerator&) {
  return {.kind = Distribution::Kind::kNormal, .a = mean, .b = std};
}
inline Distribution exponential_numbers_of(at::ScalarType, double rate, const OptGenerator&) {
  return {.kind = Distribution::Kind::kExponential, .a = rate};
}
inline Distribution cauchy_numbers_of(at::ScalarType, double median, double scale,
                                      const OptGenerator&) {
  return {.kind = Distribution::Kind::kCauchy, .a = median, .b = scale};
}
inline Distribution log_normal_numbers_of(at::ScalarType, double mean, double std,
                                          const OptGenerator&) {
  return {.kind = Distribution::Kind::kLogNormal, .a = mean, .b = std};
}
inline Distribution geometric_numbers_of(at::ScalarType, double p, const OptGenerator&) {
  return {.kind = Distribution::Kind::kGeometric, .a = p};
}
inline Distribution bernoulli_numbers_of(at::ScalarType, double p, const OptGenerator&) {
  return {.kind = Distribution::Kind::kBernoulli, .a = p};
}

// How many bits an integer may have for the dtype to hold it exactly.
inline int integer_bits(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble:
      return 53;
    case at::kFloat:
      return 24;
    case at::kHalf:
      return 11;
    case at::kBFloat16:
      return 8;
    case at::kBool:
      return 1;
    case at::kByte:
      return 8;
    default:
      return static_cast<int>(c10::elementSize(dtype)) * 8 - 1;
  }
}

// The largest integer that random_() draws.
inline uint64_t largest_integer(at::ScalarType dtype) {
  const uint64_t power = uint64_t{1} << integer_bits(dtype);
  return at::isFloatingType(dtype) ? power : power - 1;
}

inline Distribution integers(int64_t from, uint64_t range) {
  return {.kind = Distribution::Kind::kInteger, .from = from, .range = range};
}

// Integers of [from, to) that stay below `to` when they are rounded to the dtype.
inline Distribution integers_below(at::ScalarType dtype, int64_t from, int64_t to) {
  const uint64_t range = static_cast<uint64_t>(to) - static_cast<uint64_t>(from);
  uint64_t spacing = 0;
  if (at::isFloatingType(dtype)) {
    const uint64_t limit = uint64_t{1} << integer_bits(dtype);
    for (uint64_t size = to < 0 ? 0 : static_cast<uint64_t>(to); size > limit; size /= 2) {
      spacing = spacing == 0 ? 1 : spacing * 2;
    }
  }
  return integers(from, range > spacing ? range - spacing : 1);
}

inline Distribution random_numbers_of(at::ScalarType dtype, const OptGenerator&) {
  return integers(0, largest_integer(dtype) + 1);
}
inline Distribution random_from_numbers_of(at::ScalarType dtype, int64_t from,
                                           std::optional<int64_t> to, const OptGenerator&) {
  if (to.has_value()) return integers_below(dtype, from, *to);
  return integers(from, largest_integer(dtype) - static_cast<uint64_t>(from) + 1);
}
inline Distribution random_to_numbers_of(at::ScalarType dtype, int64_t to, const OptGenerator&) {
  return integers_below(dtype, 0, to);
}

// rand_like(x), randint_like(x, 10)...
struct UnitUniform {
  template <class... A>
  Distribution operator()(at::ScalarType, const A&...) const {
    return {.kind = Distribution::Kind::kUniform, .a = 0, .b = 1};
  }
};
struct UnitNormal {
  template <class... A>
  Distribution operator()(at::ScalarType, const A&...) const {
    return {.kind = Distribution::Kind::kNormal, .a = 0, .b = 1};
  }
};
struct BelowHigh {
  template <class... A>
  Distribution operator()(at::ScalarType dtype, int64_t high, const A&...) const {
    return integers_below(dtype, 0, high);
  }
};
struct FromLowToHigh {
  template <class... A>
  Distribution operator()(at::ScalarType dtype, int64_t low, int64_t high, const A&...) const {
    return integers_below(dtype, low, high);
  }
};

}  // namespace torchlift

#endif  // TORCHLIFT_BATCHING_RULES_DISTRIBUTIONS_H_
