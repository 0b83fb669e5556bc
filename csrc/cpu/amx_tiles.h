// bfloat16 products in AMX tiles, and the two layouts that they read. Included by files named _amx.cpp alone.
//
// A tile of the left operand is 16 rows of 32 values; one of the right operand holds 32 rows of 16 values as 16 rows of
// pairs: the values of rows 2i and 2i+1 of a column lie beside each other in one 32-bit word. Products are summed in
// float32; denormals count as zero.
#pragma once

#include "vector_math.h"

namespace vista::cpu {
namespace VISTA_ISA {

inline int64_t pad32(int64_t n) { return (n + 31) / 32 * 32; }

// GCC's tile intrinsics do not tell the compiler what they read.
inline void written(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// Every tile register as 16 rows of 64 bytes, for the life of this object.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = 16;
    written(&config);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

// kRows x kColumns tiles of sums stay in registers. Strides are in bytes.
template <int kRows, int kColumns>
inline void tile_product(int64_t depth, const char* a, int64_t a_row, const char* b, int64_t b_row, char* c,
                         int64_t c_row, bool accumulate) {
  constexpr bool kTwoRows = kRows == 2, kTwoColumns = kColumns == 2;
  if (accumulate) {
    _tile_loadd(0, c, c_row);
    if (kTwoColumns) _tile_loadd(1, c + 64, c_row);
    if (kTwoRows) _tile_loadd(2, c + 16 * c_row, c_row);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, c + 16 * c_row + 64, c_row);
  } else {
    _tile_zero(0);
    if (kTwoColumns) _tile_zero(1);
    if (kTwoRows) _tile_zero(2);
    if (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t t = 0; t < depth; ++t) {
    _tile_loadd(4, a + t * 64, a_row);
    _tile_loadd(6, b + t * 16 * b_row, b_row);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, b + t * 16 * b_row + 64, b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a + 16 * a_row + t * 64, a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_row);
  if (kTwoColumns) _tile_stored(1, c + 64, c_row);
  if (kTwoRows) _tile_stored(2, c + 16 * c_row, c_row);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * c_row + 64, c_row);
}

// c (+)= a b for `rows` x `columns` values of c (multiples of 16) and `depth` (of 32). a: rows of a_row bfloat16
// values; b: rows of b_row pairs; c: rows of c_row floats.
inline void tiled_product(int64_t rows, int64_t columns, int64_t depth, const void* a, int64_t a_row, const void* b,
                          int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  a_row *= 2, b_row *= 4, c_row *= 4, depth /= 32;
  written(a);
  for (int64_t i = 0; i < rows; i += 32)
    for (int64_t j = 0; j < columns; j += 32) {
      const char* left = static_cast<const char*>(a) + i * a_row;
      const char* right = static_cast<const char*>(b) + j * 4;
      char* sum = reinterpret_cast<char*>(c) + i * c_row + j * 4;
      const bool two_rows = i + 16 < rows, two_columns = j + 16 < columns;
      if (two_rows && two_columns)
        tile_product<2, 2>(depth, left, a_row, right, b_row, sum, c_row, accumulate);
      else if (two_rows)
        tile_product<2, 1>(depth, left, a_row, right, b_row, sum, c_row, accumulate);
      else if (two_columns)
        tile_product<1, 2>(depth, left, a_row, right, b_row, sum, c_row, accumulate);
      else
        tile_product<1, 1>(depth, left, a_row, right, b_row, sum, c_row, accumulate);
    }
}

// The columns from i on of a row of n, at most 16.
inline __mmask16 columns_from(int64_t i, int64_t n) { return n - i >= 16 ? 0xffff : (1u << (n - i)) - 1; }

inline __m256i load_bfloat16(const uint16_t* from, __mmask16 columns) {
  return _mm256_maskz_loadu_epi16(columns, from);
}

inline __m512 widen(__m256i x) { return (__m512)((vi)_mm512_maskz_cvtepu16_epi32(kAll, x) << 16); }

// Two vectors of bfloat16 as one of pairs.
inline __m512i interleave(__m512i even_then_odd) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_maskz_permutexvar_epi16(~0u, _mm512_load_si512(kOrder), even_then_odd);
}
inline __m512i pairs_of(__m256i even, __m256i odd) {
  return interleave(_mm512_maskz_inserti64x4(0xff, _mm512_castsi256_si512(even), odd, 1));
}
inline __m512i pairs_of(__m512 even, __m512 odd) { return interleave((__m512i)_mm512_cvtne2ps_pbh(odd, even)); }

// Rows of `row` 32-bit words to their transpose: 16 x 16 words from `from` to `to`.
inline void transpose_words(const uint32_t* from, int64_t from_row, uint32_t* to, int64_t to_row) {
  __m512i x[16], y[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_loadu_si512(from + i * from_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_maskz_unpacklo_epi32(kAll, x[i], x[i + 1]);
    y[i + 1] = _mm512_maskz_unpackhi_epi32(kAll, x[i], x[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_maskz_unpacklo_epi64(0xff, y[i], y[i + 2]);
    x[i + 1] = _mm512_maskz_unpackhi_epi64(0xff, y[i], y[i + 2]);
    x[i + 2] = _mm512_maskz_unpacklo_epi64(0xff, y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_maskz_unpackhi_epi64(0xff, y[i + 1], y[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_maskz_shuffle_i32x4(kAll, x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_maskz_shuffle_i32x4(kAll, x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_maskz_shuffle_i32x4(kAll, x[i + 8], x[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + i * to_row, _mm512_maskz_shuffle_i32x4(kAll, y[i], y[i + 8], 0x88));
    _mm512_storeu_si512(to + (i + 4) * to_row, _mm512_maskz_shuffle_i32x4(kAll, y[i + 4], y[i + 12], 0x88));
    _mm512_storeu_si512(to + (i + 8) * to_row, _mm512_maskz_shuffle_i32x4(kAll, y[i], y[i + 8], 0xdd));
    _mm512_storeu_si512(to + (i + 12) * to_row, _mm512_maskz_shuffle_i32x4(kAll, y[i + 4], y[i + 12], 0xdd));
  }
}

// A float32 matrix [rows, pad(columns)] as pairs [pad32(rows) / 2, pad(columns)].
inline void matrix_to_pairs(const float* from, int64_t rows, int64_t columns, uint32_t* to) {
  const int64_t width = pad(columns);
  for (int64_t i = 0; i < pad32(rows); i += 2)
    for (int64_t j = 0; j < width; j += 16) {
      const __m512 even = i < rows ? (__m512)load(from + i * width + j) : (__m512)vf{};
      const __m512 odd = i + 1 < rows ? (__m512)load(from + (i + 1) * width + j) : (__m512)vf{};
      _mm512_storeu_si512(to + i / 2 * width + j, pairs_of(even, odd));
    }
}

// phi and its slope where the result is rounded to bfloat16: the exponential by a polynomial of degree 3 (8e-5) and the
// reciprocal by its estimate (6e-5), both far below that rounding (2e-3).
inline __m512 short_exp(__m512 x) {
  const vf low = (vf)_mm512_maskz_max_ps(kAll, _mm512_set1_ps(-87.f), x);
  const vf t = (vf)_mm512_maskz_min_ps(kAll, _mm512_set1_ps(88.f), (__m512)low) * 1.44269504088896341f;
  const __m512 n = _mm512_maskz_roundscale_ps(kAll, (__m512)t, 0);
  const vf r = t - (vf)n;
  vf p = splat(5.517166480e-2f);
  p = p * r + 2.426111251e-1f;
  p = p * r + 6.932609677e-1f;
  p = p * r + 9.999280572e-01f;
  return _mm512_maskz_scalef_ps(kAll, (__m512)p, n);
}

template <Activation kKind>
inline __m512 short_phi(__m512 x, __m512* slope) {
  const vf a = (vf)x;
  vf value = a, rise = splat(1.f);
  if (kKind == Activation::kSilu) {
    const vf s = (vf)_mm512_maskz_rcp14_ps(kAll, (__m512)(1.f + (vf)short_exp((__m512)-a)));
    value = a * s;
    rise = s + value * (1.f - s);
  } else if (kKind == Activation::kShiftedElu) {
    const vf below = (vf)short_exp((__m512)(a - 1.f));
    value = a < 1.f ? below : a;
    rise = a < 1.f ? below : rise;
  } else if (kKind == Activation::kRelu) {
    value = a < 0.f ? vf{} : a;  // keeps NaN
    rise = a > 0.f ? rise : vf{};
  }
  if (slope != nullptr) *slope = (__m512)rise;
  return (__m512)value;
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
