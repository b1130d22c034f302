#ifndef TORCHLIFT_COMPILE_VECTOR_MATH_H_
#define TORCHLIFT_COMPILE_VECTOR_MATH_H_

// File: compile/vector_math.h
//
// Elementary functions of vectors of floats, for elementary.cc alone.
//
//   Floats<64> y = Tanh::of(x);   // sixteen numbers at a time
//
// Each has no branches, takes every float (infinities and NaN as the standard library does), and is
// within the error that its comment says, in units in the last place (ulp) of the exact result;
// elementary_test.cc looks at all exponents.
//
// NOTE [coefficients]
// A function is brought to a short interval (Cody and Waite, Software Manual for the Elementary
// Functions, 1980; Muller, Elementary Functions, 3rd ed., ch. 11), and a polynomial stands for it
// there: coefficients of the smallest greatest relative error (Lawson's reweighted least squares in
// double, then rounded to float). What they err by themselves is below 0.1 ulp; the rest is
// rounding. Products and sums are written so that they are one fused operation each: compile with
// -ffp-contract=fast, for a processor that has them.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#define TORCHLIFT_INLINE inline __attribute__((always_inline))

namespace torchlift::compile {

template <int kBytes>
struct VectorTypes {
  // An attribute of a typedef depends on template parameters; one of an alias does not.
  typedef float Floats __attribute__((vector_size(kBytes)));  // NOLINT(modernize-use-using)
};
template <int kBytes>
using Floats = typename VectorTypes<kBytes>::Floats;

// Integers as wide; comparisons give such, 0 or -1.
template <class V>
using IntsOf = decltype(V{} < V{});

template <class V>
TORCHLIFT_INLINE V all(float x) {
  return V{} + x;
}

template <class To, class From>
TORCHLIFT_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// NaN stays NaN in both.
template <class V>
TORCHLIFT_INLINE V at_most(V x, float bound) {
  return x > bound ? all<V>(bound) : x;
}
template <class V>
TORCHLIFT_INLINE V at_least(V x, float bound) {
  return x < bound ? all<V>(bound) : x;
}

template <class V>
TORCHLIFT_INLINE V magnitude(V x) {
  return bits_as<V>(bits_as<IntsOf<V>>(x) & INT32_C(0x7fffffff));
}

// The magnitude of x, the sign of `like`. x is not below zero.
template <class V>
TORCHLIFT_INLINE V signed_as(V x, V like) {
  return bits_as<V>(bits_as<IntsOf<V>>(x) | (bits_as<IntsOf<V>>(like) & INT32_MIN));
}

// c[0] + c[1] x + c[2] x^2 + ...
template <class V, size_t kCount>
TORCHLIFT_INLINE V polynomial(const float (&c)[kCount], V x) {
  V sum = all<V>(c[kCount - 1]);
#pragma GCC unroll 16
  for (int i = static_cast<int>(kCount) - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// The nearest integer, as a number and as an integer; for magnitudes below 2^22.
template <class V>
struct Rounded {
  V number;
  IntsOf<V> integer;
};
template <class V>
TORCHLIFT_INLINE Rounded<V> rounded(V x) {
  constexpr float kShift = 0x1.8p23F;  // sums with it have no bits behind the point
  const V shifted = x + kShift;
  return {shifted - kShift, bits_as<IntsOf<V>>(shifted) - bits_as<IntsOf<V>>(all<V>(kShift))};
}

// 2^n, for n in [-126, 127].
template <class V>
TORCHLIFT_INLINE V power_of_two(IntsOf<V> n) {
  return bits_as<V>((n + 127) << 23);
}

// --- exp and its kin -----------------------------------------------------------------------------

// exp(x) = 2^n (1 + p): what lies between two powers of two, without the one.
template <class V>
struct ExpParts {
  V p;
  IntsOf<V> n;
};
template <class V>
TORCHLIFT_INLINE ExpParts<V> exp_parts(V x) {
  constexpr float c[] = {0x1.fffffcp-2F, 0x1.555492p-3F, 0x1.5558f2p-5F, 0x1.123a20p-7F,
                         0x1.6a23d0p-10F};
  const Rounded<V> n = rounded(x * 0x1.715476p0F);  // 1 / ln 2
  V r = n.number * -0x1.63p-1F + x;                 // ln 2 in two parts; the first has few bits
  r = n.number * 0x1.bd0106p-13F + r;
  return {(r * r) * polynomial(c, r) + r, n.integer};
}

// For x in [-87, 88].
template <class V>
TORCHLIFT_INLINE V exp_of_moderate(V x) {
  const ExpParts<V> parts = exp_parts(x);
  const V scale = power_of_two<V>(parts.n);
  return parts.p * scale + scale;
}

// 1.1 ulp. Results below 2^-126 are rounded as others are.
struct Exp {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    const ExpParts<V> parts = exp_parts(at_most(at_least(x, -104), 89));
    const IntsOf<V> half = parts.n >> 1;
    const V scale = power_of_two<V>(half);
    return (parts.p * scale + scale) * power_of_two<V>(parts.n - half);
  }
};

// 1.5 ulp.
struct Expm1 {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    const ExpParts<V> parts = exp_parts(at_most(at_least(x, -25), 89));
    const IntsOf<V> half = parts.n >> 1;
    const V scale = power_of_two<V>(half), rest = power_of_two<V>(parts.n - half);
    // Above 2^60 the one is nothing, and 2^n may be too much for one float.
    const V large = (parts.p * scale + scale) * rest;
    const V result = parts.n > 60 ? large : parts.p * (scale * rest) + (scale * rest - 1.0F);
    return magnitude(x) < 0x1p-25F ? x : result;
  }
};

// 2.5 ulp; 0 where the result is below 2^-126, as 1 / (1 + exp(-x)) is in floats.
struct Sigmoid {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    return 1.0F / (1.0F + Exp::of(-x));
  }
};

// x sigmoid(x): 3 ulp.
struct Silu {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    return x / (1.0F + Exp::of(-x));
  }
};

// 1.5 ulp. x + x^3 P(x^2) below 0.625; above, 1 - 2 / (exp(2 |x|) + 1), where little is lost.
struct Tanh {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    constexpr float c[] = {-0x1.555554p-2F, 0x1.111066p-3F,  -0x1.b9ee90p-5F,
                           0x1.638b58p-6F,  -0x1.0bf4fep-7F, 0x1.18e1dep-9F};
    const V t = magnitude(x), square = x * x;
    const V below = (t * square) * polynomial(c, square) + t;
    const V above = 1.0F - 2.0F / (exp_of_moderate(2.0F * at_most(t, 10)) + 1.0F);
    return signed_as(t < 0.625F ? below : above, x);
  }
};

// --- erf and its kin -----------------------------------------------------------------------------

// 1.5 ulp. x + x P(x^2) below 1; above, 1 - exp(-Q(|x|)), Q for -log(1 - erf).
struct Erf {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    constexpr float p[] = {0x1.06eba8p-3F, -0x1.81273ep-2F,  0x1.ce2cf8p-4F, -0x1.b7f90ep-6F,
                           0x1.5405b2p-8F, -0x1.a3f700p-11F, 0x1.496a30p-14F};
    constexpr float q[] = {-0x1.62d8aap-13F, 0x1.212626p+0F, 0x1.444d1ep-1F,   0x1.bb4548p-4F,
                           -0x1.9aebb0p-6F,  0x1.106250p-8F, -0x1.c45910p-12F, 0x1.5d71d8p-16F};
    const V t = magnitude(x), square = x * x;
    const V below = t * polynomial(p, square) + t;
    const V above = 1.0F - exp_of_moderate(-polynomial(q, at_most(t, 4)));
    return signed_as(t < 1.0F ? below : above, x);
  }
};

inline constexpr float kSqrtHalf = 0x1.6a09e6p-1F;

// x (1 + erf(x / sqrt 2)) / 2, computed as that: within 2 ulp of x.
struct Gelu {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    return (x * 0.5F) * (1.0F + Erf::of(x * kSqrtHalf));
  }
};

// g (Phi(x) + x phi(x)), the normal distribution and its density: within 3 ulp of g, or of g x.
struct GeluBackward {
  template <class V>
  static TORCHLIFT_INLINE V of(V g, V x) {
    constexpr float kDensityAtZero = 0x1.988454p-2F;  // 1 / sqrt(2 pi)
    // Further out the density is nothing beside what is below.
    const V near = at_most(at_least(x, -14), 14);
    const V below = (1.0F + Erf::of(near * kSqrtHalf)) * 0.5F;
    const V density = exp_of_moderate(at_least(near * near * -0.5F, -87)) * kDensityAtZero;
    return g * (near * density + below);
  }
};

// --- log -----------------------------------------------------------------------------------------

// 1.5 ulp. x = 2^n (1 + f), f in [sqrt(1/2) - 1, sqrt 2 - 1]; f - f^2 / 2 + f^3 P(f).
struct Log {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    constexpr float c[] = {0x1.555548p-2F,  -0x1.000006p-2F, 0x1.99a4b6p-3F,
                           -0x1.555c4ep-3F, 0x1.233768p-3F,  -0x1.fc2208p-4F,
                           0x1.e6f06ap-4F,  -0x1.de3c16p-4F, 0x1.1457a8p-4F};
    const auto is_tiny = x < 0x1p-126F;
    const IntsOf<V> bits = bits_as<IntsOf<V>>(is_tiny ? x * 0x1p23F : x);
    const IntsOf<V> n = (bits - INT32_C(0x3f3504f3)) >> 23;  // of sqrt(1/2)
    const V f = bits_as<V>(bits - (n << 23)) - 1.0F;
    const V power = __builtin_convertvector(n + (is_tiny & INT32_C(-23)), V);
    const V square = f * f;
    V sum = (square * f) * polynomial(c, f) + power * 0x1.7f7d1cp-20F;  // ln 2, the small part
    sum = square * -0.5F + sum;
    const V result = power * 0x1.62e4p-1F + (f + sum);
    const V at_edges = x == 0.0F ? all<V>(-__builtin_inff()) : all<V>(__builtin_nanf(""));
    return x > 0.0F ? (x < __builtin_inff() ? result : x) : at_edges;
  }
};

// --- sin and cos ---------------------------------------------------------------------------------

// Up to this, pi / 2 in three parts is exact enough.
inline constexpr float kLargestAngle = 0x1p15F;

template <class V>
TORCHLIFT_INLINE bool is_any(IntsOf<V> mask) {
  uint64_t words[sizeof(V) / sizeof(uint64_t)];
  std::memcpy(words, &mask, sizeof(mask));
  uint64_t seen = 0;
  for (const uint64_t word : words) seen |= word;
  return seen != 0;
}

// sin(x + quarters pi / 2).
template <class V>
TORCHLIFT_INLINE V sine_of_turned(V x, int32_t quarters) {
  constexpr float s[] = {-0x1.555556p-3F, 0x1.111108p-7F, -0x1.a00f7ep-13F, 0x1.6cd1b0p-19F};
  constexpr float c[] = {0x1.555556p-5F, -0x1.6c16b8p-10F, 0x1.a010dep-16F, -0x1.241e6ap-22F};
  const Rounded<V> n = rounded(x * 0x1.45f306p-1F);  // 2 / pi
  V r = n.number * -0x1.921fb6p0F + x;               // pi / 2 in three parts
  r = n.number * 0x1.777a5cp-25F + r;
  r = n.number * 0x1.ee59dap-50F + r;
  const V square = r * r;
  const V sine = (r * square) * polynomial(s, square) + r;
  const V cosine = (square * square) * polynomial(c, square) + (square * -0.5F + 1.0F);
  const IntsOf<V> quarter = n.integer + quarters;
  const V result = (quarter & 1) != 0 ? cosine : sine;
  return bits_as<V>(bits_as<IntsOf<V>>(result) ^ ((quarter & 2) << 30));
}

// `exact` one by one, if some of x are too large; else `near`.
template <class V>
TORCHLIFT_INLINE V unless_large(V x, V near, float (*exact)(float)) {
  if (!is_any<V>(magnitude(x) > kLargestAngle)) return near;
  for (size_t i = 0; i < sizeof(V) / sizeof(float); ++i) near[i] = exact(x[i]);
  return near;
}

// 1.6 ulp, but where the result is below 2^-24: there 2^-48.
struct Sin {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    return unless_large(x, x == 0.0F ? x : sine_of_turned(x, 0), &std::sin);
  }
};

struct Cos {
  template <class V>
  static TORCHLIFT_INLINE V of(V x) {
    return unless_large(x, sine_of_turned(x, 1), &std::cos);
  }
};

}  // namespace torchlift::compile

#undef TORCHLIFT_INLINE

#endif  // TORCHLIFT_COMPILE_VECTOR_MATH_H_
