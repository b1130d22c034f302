#include "batching/rules/reproducible.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/view_as_complex.h>
#include <ATen/ops/view_as_real.h>
#include <ATen/ops/where.h>
#include <c10/util/accumulate.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/philox.h"
#include "core/random_stream.h"

// NOTE [blocks of numbers]
// The kernels work on blocks of 64 words, the last one whole too: number j of a row is always made
// in the same lane of the same loop, so a compiler may vectorize as it likes, with contraction or
// without, and the number does not depend on how many others are drawn. For the same reason nothing
// here calls libtorch's kernels on floating-point CPU tensors but for casts: their vectorized loops
// and their tails may differ in the last bit.

namespace torchlift {
namespace {

using Kind = Distribution::Kind;

constexpr int64_t kWords = 64;

// The words of a key from word kWords * block on.
void fill_words(uint64_t key, int64_t block, uint32_t* out) {
  for (int64_t i = 0; i < kWords / 4; ++i) {
    const PhiloxWords w = philox(key, static_cast<uint64_t>(block * (kWords / 4) + i),
                                 static_cast<uint64_t>(PhiloxUse::kNumbers));
    for (int64_t j = 0; j < 4; ++j) out[4 * i + j] = w[j];
  }
}

// Fills a row by make(words, numbers), which makes the numbers of one block.
template <int64_t kWordsEach, class T, class Make>
void fill_row(uint64_t key, T* out, int64_t count, const Make& make) {
  constexpr int64_t kNumbers = kWords / kWordsEach;
  uint32_t words[kWords];
  T numbers[kNumbers];
  for (int64_t block = 0; block * kNumbers < count; ++block) {
    fill_words(key, block, words);
    make(words, numbers);
    const int64_t start = block * kNumbers;
    std::copy_n(numbers, std::min(kNumbers, count - start), out + start);
  }
}

// [keys, count] filled by rows.
template <int64_t kWordsEach, class T, class Make>
at::Tensor filled(const std::vector<uint64_t>& keys, int64_t count, const Make& make) {
  const auto rows = static_cast<int64_t>(keys.size());
  at::Tensor out = at::empty({rows, count}, c10::CppTypeToScalarType<T>::value);
  T* data = out.data_ptr<T>();
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(count, 1));
  at::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      fill_row<kWordsEach>(keys[r], data + r * count, count, make);
    }
  });
  return out;
}

uint64_t word64(const uint32_t* words, int64_t i) {
  return (uint64_t{words[2 * i + 1]} << 32) | words[2 * i];
}

// One number of T a word pair: f(64 bits).
template <class T, class F>
at::Tensor from_pairs(const std::vector<uint64_t>& keys, int64_t count, const F& f) {
  return filled<2, T>(keys, count, [&](const uint32_t* words, T* numbers) {
    for (int64_t i = 0; i < kWords / 2; ++i) numbers[i] = f(word64(words, i));
  });
}

// --- uniform numbers -----------------------------------------------------------------------------

// In [0, 1), a multiple of 2^-53.
double unit(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

// In (0, 1), both ends excluded.
double open_unit(uint64_t bits) { return (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52; }

// Rounding may take a number to the end of the interval, which is not part of it.
template <class T>
T below(T number, double from, double to) {
  return static_cast<double>(number) >= to && to > from ? static_cast<T>(from) : number;
}

template <class T>
at::Tensor uniform(const std::vector<uint64_t>& keys, int64_t count, double from, double to) {
  if constexpr (std::is_same_v<T, double>) {
    return from_pairs<double>(keys, count, [&](uint64_t bits) {
      return below(unit(bits) * (to - from) + from, from, to);
    });
  } else {
    // As many bits as T has: the largest number is below 1.
    constexpr int kDigits = std::numeric_limits<T>::digits;
    constexpr float kScale = 1.0F / (1 << kDigits);
    const auto offset = static_cast<float>(from);
    const auto length = static_cast<float>(to - from);
    return filled<1, T>(keys, count, [&](const uint32_t* words, T* numbers) {
      for (int64_t i = 0; i < kWords; ++i) {
        const auto u = static_cast<float>(static_cast<int32_t>(words[i] >> (32 - kDigits)));
        numbers[i] = below(static_cast<T>(u * kScale * length + offset), from, to);
      }
    });
  }
}

// --- normal numbers (Box and Muller, 1958) -------------------------------------------------------

// log of x in (0, 1], by Cephes' polynomial. No branches: GCC makes vectors of it.
float log_of(float x) {
  const auto bits = std::bit_cast<int32_t>(x);
  const int32_t exponent =
      (bits - 0x3f3504f3) >> 23;  // x = m * 2^exponent, m in [sqrt(1/2), sqrt(2))
  const float m = std::bit_cast<float>(bits - (exponent << 23)) - 1.0F;
  const auto e = static_cast<float>(exponent);
  float p = 7.0376836292e-2F;
  p = p * m - 1.1514610310e-1F;
  p = p * m + 1.1676998740e-1F;
  p = p * m - 1.2420140846e-1F;
  p = p * m + 1.4249322787e-1F;
  p = p * m - 1.6668057665e-1F;
  p = p * m + 2.0000714765e-1F;
  p = p * m - 2.4999993993e-1F;
  p = p * m + 3.3333331174e-1F;
  const float m2 = m * m;
  return m * m2 * p - 2.12194440e-4F * e - 0.5F * m2 + m + 0.693359375F * e;
}

// cos and sin of 2 pi word / 2^32.
void cos_sin(uint32_t word, float* cosine, float* sine) {
  const uint32_t quadrant = (word + 0x20000000U) >> 30;
  const auto part = static_cast<int32_t>(word - (quadrant << 30));
  const float x = static_cast<float>(part) * 1.4629180792671596e-9F;  // in [-pi/4, pi/4]
  const float z = x * x;
  const float s = ((-1.9515295891e-4F * z + 8.3321608736e-3F) * z - 1.6666654611e-1F) * z * x + x;
  const float c =
      ((2.443315711809948e-5F * z - 1.388731625493765e-3F) * z + 4.166664568298827e-2F) * z * z -
      0.5F * z + 1.0F;
  const bool odd = (quadrant & 1U) != 0;
  const float a = odd ? s : c;
  const float b = odd ? c : s;
  *cosine = ((quadrant + 1) & 2U) != 0 ? -a : a;
  *sine = (quadrant & 2U) != 0 ? -b : b;
}

at::Tensor normal_floats(const std::vector<uint64_t>& keys, int64_t count, double mean,
                         double deviation) {
  const auto shift = static_cast<float>(mean);
  const auto scale = static_cast<float>(deviation);
  return filled<1, float>(keys, count, [&](const uint32_t* words, float* numbers) {
    constexpr int64_t kPairs = kWords / 2;
    float radius[kPairs], cosine[kPairs], sine[kPairs];
    for (int64_t i = 0; i < kPairs; ++i) {
      const auto u = static_cast<float>(static_cast<int32_t>(words[2 * i] >> 1));
      radius[i] = std::sqrt(-2.0F * log_of((u + 0.5F) * 0x1p-31F));
    }
    for (int64_t i = 0; i < kPairs; ++i) cos_sin(words[2 * i + 1], &cosine[i], &sine[i]);
    for (int64_t i = 0; i < kPairs; ++i) {
      numbers[2 * i] = radius[i] * cosine[i] * scale + shift;
      numbers[2 * i + 1] = radius[i] * sine[i] * scale + shift;
    }
  });
}

// As above with double precision: two pairs of words make two numbers.
template <class F>
at::Tensor normal_doubles(const std::vector<uint64_t>& keys, int64_t count, const F& finish) {
  return filled<2, double>(keys, count, [&](const uint32_t* words, double* numbers) {
    for (int64_t i = 0; i < kWords / 2; i += 2) {
      const double radius = std::sqrt(-2.0 * std::log(open_unit(word64(words, i))));
      const double angle = 2 * M_PI * unit(word64(words, i + 1));
      numbers[i] = finish(radius * std::cos(angle));
      numbers[i + 1] = finish(radius * std::sin(angle));
    }
  });
}

// --- all distributions ---------------------------------------------------------------------------

int64_t integer(uint64_t bits, int64_t from, uint64_t range) {
  constexpr uint64_t kSmall = uint64_t{1} << 32;
  uint64_t offset = bits;
  if (range != 0 && range <= kSmall) {
    // The upper half of the product of 64 bits and the range.
    offset = ((bits >> 32) * range + (((bits & 0xffffffff) * range) >> 32)) >> 32;
  } else if (range != 0 && range <= (uint64_t{1} << 63)) {
    offset = (bits >> 1) % range;
  } else if (range != 0) {
    offset = bits % range;
  }
  return static_cast<int64_t>(static_cast<uint64_t>(from) + offset);
}

// p * 2^53: an integer below it is drawn with probability p.
uint64_t threshold(double p) { return static_cast<uint64_t>(std::ceil(p * 0x1p53)); }

at::Tensor draw_uniform(const std::vector<uint64_t>& keys, int64_t count, at::ScalarType dtype,
                        const Distribution& d) {
  at::Tensor out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "reproducible uniform numbers",
                                  [&] { out = uniform<scalar_t>(keys, count, d.a, d.b); });
  return out;
}

at::Tensor draw_normal(const std::vector<uint64_t>& keys, int64_t count, at::ScalarType dtype,
                       const Distribution& d) {
  if (dtype != at::kDouble) return normal_floats(keys, count, d.a, d.b).to(dtype);
  return normal_doubles(keys, count, [&](double z) { return z * d.b + d.a; });
}

at::Tensor draw_other(const std::vector<uint64_t>& keys, int64_t count, const Distribution& d) {
  switch (d.kind) {
    case Kind::kExponential:
      return from_pairs<double>(keys, count,
                                [&](uint64_t bits) { return -std::log(open_unit(bits)) / d.a; });
    case Kind::kCauchy:
      return from_pairs<double>(keys, count, [&](uint64_t bits) {
        return d.a + d.b * std::tan(M_PI * (open_unit(bits) - 0.5));
      });
    case Kind::kLogNormal:
      return normal_doubles(keys, count, [&](double z) { return std::exp(z * d.b + d.a); });
    case Kind::kGeometric:
      return from_pairs<double>(keys, count, [&](uint64_t bits) {
        return std::max(1.0, std::ceil(std::log(open_unit(bits)) / std::log1p(-d.a)));
      });
    case Kind::kBernoulli:
      return from_pairs<bool>(
          keys, count, [limit = threshold(d.a)](uint64_t bits) { return (bits >> 11) < limit; });
    default:
      return from_pairs<int64_t>(keys, count,
                                 [&](uint64_t bits) { return integer(bits, d.from, d.range); });
  }
}

// --- by operators --------------------------------------------------------------------------------

constexpr int64_t kLow = 0xffffffff;

at::Tensor high_half(const at::Tensor& t) { return t.bitwise_right_shift(32).bitwise_and(kLow); }
at::Tensor low_half(const at::Tensor& t) { return t.bitwise_and(kLow); }

// [keys, count] 32-bit words, in int64. Products wrap around, as they do without a sign.
at::Tensor words_by_operators(const std::vector<uint64_t>& keys, int64_t count,
                              c10::Device device) {
  const std::vector<int64_t> signed_keys(keys.begin(), keys.end());
  const auto options = at::TensorOptions().dtype(at::kLong);
  const at::Tensor key = at::tensor(signed_keys, options).to(device).unsqueeze(1);
  const at::Tensor counter = at::arange((count + 3) / 4, options.device(device)).unsqueeze(0);
  at::Tensor k0 = low_half(key), k1 = high_half(key);
  at::Tensor c0 = low_half(counter), c1 = high_half(counter);
  at::Tensor c2 = at::tensor(static_cast<int64_t>(PhiloxUse::kNumbers), options).to(device);
  at::Tensor c3 = c2.bitwise_and(0);
  for (int round = 0; round < 10; ++round) {
    const at::Tensor p0 = c0.mul(int64_t{0xD2511F53}), p1 = c2.mul(int64_t{0xCD9E8D57});
    c0 = high_half(p1).bitwise_xor(c1).bitwise_xor(k0);
    c1 = low_half(p1);
    c2 = high_half(p0).bitwise_xor(c3).bitwise_xor(k1);
    c3 = low_half(p0);
    k0 = low_half(k0.add(int64_t{0x9E3779B9}));
    k1 = low_half(k1.add(int64_t{0xBB67AE85}));
  }
  const auto rows = static_cast<int64_t>(keys.size());
  const std::vector<int64_t> sizes{rows, (count + 3) / 4};
  const at::Tensor words =
      at::stack({c0.expand(sizes), c1.expand(sizes), c2.expand(sizes), c3.expand(sizes)}, -1);
  return words.flatten(1).narrow(1, 0, count);
}

struct PairsByOperators {
  at::Tensor bits;  // [keys, count], 64 bits each

  PairsByOperators(const std::vector<uint64_t>& keys, int64_t count, c10::Device device) {
    const at::Tensor words = words_by_operators(keys, 2 * count, device).unflatten(1, {count, 2});
    bits = words.select(2, 1).bitwise_left_shift(32).bitwise_or(words.select(2, 0));
  }
  at::Tensor top(int64_t count) const {
    return bits.bitwise_right_shift(64 - count).bitwise_and((int64_t{1} << count) - 1);
  }
  at::Tensor unit() const { return top(53).to(at::kDouble).mul(0x1p-53); }
  at::Tensor open_unit() const { return top(52).to(at::kDouble).add(0.5).mul(0x1p-52); }
};

at::Tensor uniform_by_operators(const std::vector<uint64_t>& keys, int64_t count,
                                at::ScalarType dtype, c10::Device device, const Distribution& d) {
  at::Tensor u;
  if (dtype == at::kDouble) {
    u = PairsByOperators(keys, count, device).unit();
  } else {
    const int digits = dtype == at::kFloat ? 24 : dtype == at::kHalf ? 11 : 8;
    const at::Tensor words = words_by_operators(keys, count, device);
    u = words.bitwise_right_shift(32 - digits).to(at::kFloat).mul(std::ldexp(1.0, -digits));
  }
  u = u.mul(d.b - d.a).add(d.a).to(dtype);
  return d.b > d.a ? u.masked_fill(u.to(at::kDouble).ge(d.b), d.a) : u;
}

at::Tensor normal_by_operators(const std::vector<uint64_t>& keys, int64_t count,
                               at::ScalarType dtype, c10::Device device) {
  const int64_t pairs = (count + 1) / 2;
  at::Tensor log_radius, turns;
  if (dtype == at::kDouble) {
    const PairsByOperators p(keys, 2 * pairs, device);
    log_radius = p.open_unit().unflatten(1, {pairs, 2}).select(2, 0).log();
    turns = p.unit().unflatten(1, {pairs, 2}).select(2, 1);
  } else {
    const at::Tensor words = words_by_operators(keys, 2 * pairs, device).unflatten(1, {pairs, 2});
    const at::Tensor first = words.select(2, 0).bitwise_right_shift(1).to(at::kFloat);
    log_radius = first.add(0.5).mul(0x1p-31).log();
    turns = words.select(2, 1).to(at::kDouble).mul(0x1p-32).to(at::kFloat);
  }
  const at::Tensor radius = log_radius.mul(-2).sqrt(), angle = turns.mul(2 * M_PI);
  const at::Tensor both = at::stack({radius.mul(angle.cos()), radius.mul(angle.sin())}, -1);
  return both.flatten(1).narrow(1, 0, count);
}

at::Tensor integers_by_operators(const PairsByOperators& p, const Distribution& d) {
  constexpr uint64_t kSmall = uint64_t{1} << 32;
  const auto range = static_cast<int64_t>(d.range);
  if (d.range == 0) return p.bits.add(d.from);
  if (d.range <= kSmall) {
    const at::Tensor low = high_half(low_half(p.bits).mul(range));
    return high_half(high_half(p.bits).mul(range).add(low)).add(d.from);
  }
  if (d.range == uint64_t{1} << 63) return p.top(63).add(d.from);
  TORCH_CHECK(d.range < uint64_t{1} << 63, "[vmap] reproducible random integers of a range above ",
              "2^63 are drawn on CPU only. Draw them there and move them.");
  return p.top(63).remainder(range).add(d.from);
}

at::Tensor other_by_operators(const std::vector<uint64_t>& keys, int64_t count, c10::Device device,
                              const Distribution& d) {
  if (d.kind == Kind::kLogNormal) {
    return normal_by_operators(keys, count, at::kDouble, device).mul(d.b).add(d.a).exp();
  }
  const PairsByOperators p(keys, count, device);
  switch (d.kind) {
    case Kind::kExponential:
      return p.open_unit().log().neg().div(d.a);
    case Kind::kCauchy:
      return p.open_unit().sub(0.5).mul(M_PI).tan().mul(d.b).add(d.a);
    case Kind::kGeometric:
      return p.open_unit().log().div(std::log1p(-d.a)).ceil().clamp_min(1);
    case Kind::kBernoulli:
      return p.top(53).lt(static_cast<int64_t>(threshold(d.a)));
    default:
      return integers_by_operators(p, d);
  }
}

// --- keys ----------------------------------------------------------------------------------------

bool takes_part(const Level& level) {
  return level.kind() == LevelKind::kVmap || level.kind() == LevelKind::kRow;
}

// The levels out to `level` whose rows have numbers of their own, outermost first.
std::vector<LevelPtr> levels_with_numbers(const Level& level, const char* op) {
  std::vector<LevelPtr> levels;
  for (const LevelPtr& each : level_stack()) {
    if (each->depth() > level.depth()) break;
    if (takes_part(*each) && has_own_numbers(*each, op)) levels.push_back(each);
  }
  return levels;
}

// A key for each row of each of the levels.
std::vector<uint64_t> row_keys(uint64_t root, const std::vector<LevelPtr>& levels, int64_t call) {
  std::vector<uint64_t> keys{root};
  for (const LevelPtr& level : levels) {
    std::vector<uint64_t> next;
    next.reserve(keys.size() * level->size());
    for (const uint64_t key : keys) {
      for (const auto row : c10::irange(level->size())) next.push_back(fold_row(key, *level, row));
    }
    keys = std::move(next);
  }
  for (uint64_t& key : keys) key = fold_in(key, PhiloxUse::kCall, static_cast<uint64_t>(call));
  return keys;
}

}  // namespace

namespace reproducible_internal {

at::Tensor draw(const std::vector<uint64_t>& keys, int64_t count, at::ScalarType dtype,
                c10::Device device, const Distribution& distribution) {
  if (!device.is_cpu()) return draw_by_operators(keys, count, dtype, device, distribution);
  switch (distribution.kind) {
    case Kind::kUniform:
      return draw_uniform(keys, count, dtype, distribution);
    case Kind::kNormal:
      return draw_normal(keys, count, dtype, distribution);
    default:
      return draw_other(keys, count, distribution).to(dtype);
  }
}

at::Tensor draw_by_operators(const std::vector<uint64_t>& keys, int64_t count, at::ScalarType dtype,
                             c10::Device device, const Distribution& d) {
  if (keys.empty() || count == 0) {
    return at::empty({static_cast<int64_t>(keys.size()), count},
                     at::TensorOptions().dtype(dtype).device(device));
  }
  switch (d.kind) {
    case Kind::kUniform:
      return uniform_by_operators(keys, count, dtype, device, d);
    case Kind::kNormal:
      return normal_by_operators(keys, count, dtype, device).mul(d.b).add(d.a).to(dtype);
    default:
      return other_by_operators(keys, count, device, d).to(dtype);
  }
}

}  // namespace reproducible_internal

Batched reproducible_numbers(const Level& level, at::IntArrayRef sizes, at::ScalarType dtype,
                             c10::Device device, const std::optional<at::Generator>& generator,
                             const Distribution& distribution, const char* op) {
  const std::vector<LevelPtr> levels = levels_with_numbers(level, op);
  const auto keys = row_keys(level.stream()->root(generator), levels, level.take_call());
  const bool complex = at::isComplexType(dtype);
  Distribution part = distribution;
  if (complex && part.kind == Kind::kNormal) part.a = 0, part.b *= M_SQRT1_2;
  const int64_t count = c10::multiply_integers(sizes);
  at::Tensor numbers =
      reproducible_internal::draw(keys, complex ? 2 * count : count,
                                  complex ? c10::toRealValueType(dtype) : dtype, device, part);
  // A row of a loop is no dim to the levels inside of it: no tensor they see belongs to it.
  const auto has_dim = [&](const LevelPtr& each) {
    return each->kind() == LevelKind::kVmap || each->depth() == level.depth();
  };
  std::vector<int64_t> shape;
  for (const LevelPtr& each : levels) {
    if (has_dim(each)) shape.push_back(each->size());
  }
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  if (complex) shape.push_back(2);
  numbers = numbers.view(shape);
  if (complex) numbers = at::view_as_complex(numbers);
  if (complex && part.kind == Kind::kNormal && distribution.a != 0) numbers.add_(distribution.a);
  for (const LevelPtr& each : levels) {
    if (has_dim(each) && each->depth() < level.depth()) numbers = lift(numbers, 0, each);
  }
  return {numbers, 0};
}

}  // namespace torchlift
