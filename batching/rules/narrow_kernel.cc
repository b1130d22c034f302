#include "batching/rules/narrow_kernel.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/onlookers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace torchlift {

#if defined(__x86_64__)

namespace {

constexpr int64_t kRows = 16;  // in a vector
constexpr int64_t kFewest = 3, kMost = 15;
// As many multiplications as a thread does at least.
constexpr int64_t kGrain = int64_t{1} << 17;

// The operands of 16 rows. Strides count numbers.
struct Block {
  const float* a;    // the first row
  int64_t a_stride;  // from row to row
  const float* b;    // [K, N] by its columns: a column's numbers lie one after the other
  int64_t b_stride;  // from column to column
  const float* row;  // null for none
  int64_t row_stride;
  int64_t terms;  // K
  float* out;     // contiguous rows
  int64_t skip;   // the first rows are not written
};

#define TORCHLIFT_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,fma")))
#define TORCHLIFT_INLINE_AVX512 TORCHLIFT_AVX512 __attribute__((always_inline)) inline

// Four vectors as four by four matrices of each quarter.
TORCHLIFT_INLINE_AVX512 void transpose_quarters(__m512 (&x)[4]) {
  const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(x[0], x[1]));
  const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(x[0], x[1]));
  const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(x[2], x[3]));
  const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(x[2], x[3]));
  x[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(low01, low23));
  x[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low01, low23));
  x[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high01, high23));
  x[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high01, high23));
}

// The numbers that `mask` has of four numbers of rows 0, 4, 8 and 12.
TORCHLIFT_INLINE_AVX512 __m512 fourth_rows(const float* a, int64_t stride, __mmask8 mask) {
  __m512 x = _mm512_castps128_ps512(_mm_maskz_loadu_ps(mask, a));
  x = _mm512_insertf32x4(x, _mm_maskz_loadu_ps(mask, a + 4 * stride), 1);
  x = _mm512_insertf32x4(x, _mm_maskz_loadu_ps(mask, a + 8 * stride), 2);
  return _mm512_insertf32x4(x, _mm_maskz_loadu_ps(mask, a + 12 * stride), 3);
}

// Adds the products with `kTerms` (at most four) columns of 16 rows, from column k on.
template <int kColumns, int kTerms>
TORCHLIFT_INLINE_AVX512 void add_terms(const Block& block, int64_t k, __m512 (&sums)[kColumns]) {
  constexpr auto kMask = static_cast<__mmask8>((1 << kTerms) - 1);
  __m512 x[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = fourth_rows(block.a + i * block.a_stride + k, block.a_stride, kMask);
  }
  transpose_quarters(x);
#pragma GCC unroll 4
  for (int t = 0; t < kTerms; ++t) {
#pragma GCC unroll 16
    for (int n = 0; n < kColumns; ++n) {
      const __m512 factor = _mm512_set1_ps(block.b[n * block.b_stride + k + t]);
      sums[n] = _mm512_fmadd_ps(x[t], factor, sums[n]);
    }
  }
}

// Columns of 16 rows, as rows of 16 numbers, of which the first kColumns count.
template <int kColumns>
TORCHLIFT_INLINE_AVX512 void store_rows(const __m512 (&columns)[kColumns], float* rows) {
#pragma GCC unroll 4
  for (int first = 0; first < kColumns; first += 4) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      x[i] =
          first + i < kColumns ? columns[std::min(first + i, kColumns - 1)] : _mm512_setzero_ps();
    }
    transpose_quarters(x);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      float* row = rows + i * kRows + first;
      _mm_store_ps(row, _mm512_castps512_ps128(x[i]));
      _mm_store_ps(row + 4 * kRows, _mm512_extractf32x4_ps(x[i], 1));
      _mm_store_ps(row + 8 * kRows, _mm512_extractf32x4_ps(x[i], 2));
      _mm_store_ps(row + 12 * kRows, _mm512_extractf32x4_ps(x[i], 3));
    }
  }
}

template <int kColumns>
TORCHLIFT_AVX512 void compute(const Block& block) {
  __m512 sums[kColumns];
#pragma GCC unroll 16
  for (int n = 0; n < kColumns; ++n) {
    sums[n] = _mm512_set1_ps(block.row == nullptr ? 0.0F : block.row[n * block.row_stride]);
  }
  int64_t k = 0;
  for (; k + 4 <= block.terms; k += 4) add_terms<kColumns, 4>(block, k, sums);
  switch (block.terms - k) {
    case 1:
      add_terms<kColumns, 1>(block, k, sums);
      break;
    case 2:
      add_terms<kColumns, 2>(block, k, sums);
      break;
    case 3:
      add_terms<kColumns, 3>(block, k, sums);
      break;
    default:
      break;
  }
  alignas(64) float rows[kRows * kRows];
  store_rows<kColumns>(sums, rows);
  for (int64_t m = block.skip; m < kRows; ++m) {
    std::memcpy(block.out + m * kColumns, rows + m * kRows, kColumns * sizeof(float));
  }
}

#undef TORCHLIFT_INLINE_AVX512
#undef TORCHLIFT_AVX512

using Kernel = void (*)(const Block&);

template <int... kOffsets>
constexpr auto kernels_of(std::integer_sequence<int, kOffsets...> /*offsets*/) {
  return std::array<Kernel, sizeof...(kOffsets)>{&compute<kFewest + kOffsets>...};
}
constexpr auto kKernels = kernels_of(std::make_integer_sequence<int, kMost - kFewest + 1>());

bool has_vectors() {
  static const bool found = __builtin_cpu_supports("avx512f") != 0 &&
                            __builtin_cpu_supports("avx512vl") != 0 &&
                            __builtin_cpu_supports("avx512dq") != 0;
  return found;
}

bool is_served(const at::Tensor& t) {
  return t.is_cpu() && t.scalar_type() == at::kFloat && is_unfollowed(t);
}

// Other shapes are for libtorch to refuse.
bool fit(const at::Tensor& a, const at::Tensor& b) {
  return a.dim() == b.dim() && a.size(-1) == b.size(-2) &&
         (a.dim() == 2 || (a.dim() == 3 && a.size(0) == b.size(0)));
}

// Whether t broadcasts to these sizes, and is the same for all rows.
bool is_row_of(const at::Tensor& t, at::IntArrayRef sizes) {
  const int64_t missing = static_cast<int64_t>(sizes.size()) - t.dim();
  for (int64_t d = 0; d < t.dim(); ++d) {
    const bool given = t.size(d) != 1 && t.stride(d) != 0;
    const auto place = static_cast<size_t>(std::max<int64_t>(missing, 0) + d);
    if (place >= sizes.size() || (t.size(d) != 1 && t.size(d) != sizes[place])) return false;
    if (given && place + 2 == sizes.size()) return false;
  }
  return missing >= 0;
}

// As a batch of matrices.
at::Tensor as_batch(const at::Tensor& t) { return t.dim() == 3 ? t : t.unsqueeze(0); }

}  // namespace

std::optional<at::Tensor> narrow_product(const at::Tensor& a, const at::Tensor& b,
                                         const at::Tensor& row) {
  const int64_t columns = b.size(-1), rows = a.size(-2), terms = a.size(-1);
  if (columns < kFewest || columns > kMost || rows < kRows || a.stride(-1) != 1) return {};
  if (!has_vectors() || !is_served(a) || !is_served(b) || !fit(a, b)) return {};
  at::DimVector sizes(a.sizes());
  sizes.back() = columns;
  if (row.defined() && (!is_served(row) || !is_row_of(row, sizes))) return {};
  if (!has_no_modes() || is_profiled()) return {};
  at::Tensor out = at::empty(sizes, a.options());
  const at::Tensor left = as_batch(a);
  const at::Tensor right = as_batch(b.stride(-2) == 1 ? b : b.mT().contiguous().mT());
  const at::Tensor given = row.defined() ? as_batch(row.expand(sizes)) : at::Tensor();
  const auto* const a_data = left.const_data_ptr<float>();
  const auto* const b_data = right.const_data_ptr<float>();
  const auto* const row_data = row.defined() ? given.const_data_ptr<float>() : nullptr;
  auto* const out_data = out.mutable_data_ptr<float>();
  const int64_t blocks = (rows + kRows - 1) / kRows, work = kRows * terms * columns;
  const Kernel kernel = kKernels[static_cast<size_t>(columns - kFewest)];
  at::parallel_for(0, left.size(0) * blocks,
                   std::max<int64_t>(1, kGrain / std::max<int64_t>(work, 1)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t batch = i / blocks, wanted = i % blocks * kRows;
                       // The last block reaches back into the one before, whose rows it does not
                       // write.
                       const int64_t first = std::min(wanted, rows - kRows);
                       kernel({.a = a_data + batch * left.stride(0) + first * left.stride(1),
                               .a_stride = left.stride(1),
                               .b = b_data + batch * right.stride(0),
                               .b_stride = right.stride(2),
                               .row = row.defined() ? row_data + batch * given.stride(0) : nullptr,
                               .row_stride = row.defined() ? given.stride(2) : 0,
                               .terms = terms,
                               .out = out_data + (batch * rows + first) * columns,
                               .skip = wanted - first});
                     }
                   });
  return out;
}

#else

std::optional<at::Tensor> narrow_product(const at::Tensor& /*a*/, const at::Tensor& /*b*/,
                                         const at::Tensor& /*row*/) {
  return {};
}

#endif

}  // namespace torchlift
