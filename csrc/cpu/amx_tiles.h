// Products in AMX tiles, and the two layouts that they read. Included by files named _amx.cpp alone.
//
// A tile of the left operand is 16 rows of 32 bfloat16 values; one of the right operand holds 32 rows of 16 values as
// 16 rows of pairs: the values of two rows lie beside each other in one 32-bit word. Products are summed in float32.
//
// An operand has kParts parts. One: its values are bfloat16. Three: they are float32, the sum of three bfloat16 values
// (8 bits each, nothing left over); of the nine products the six largest are summed, what is dropped is below 2^-23 of
// a product and has no preferred sign. The tiles count denormals as zero: parts below 2^-126 are lost.
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

// Where the tiles of an operand lie; strides in bytes.
struct Operand {
  const void* first;
  int64_t row, part = 0;
  const char* at(int part_, int64_t rows, int64_t bytes) const {
    return static_cast<const char*>(first) + part_ * part + rows * row + bytes;
  }
};

// kRows x kColumns tiles of sums stay in registers. Products of parts go in an order that changes few tiles.
template <int kParts, int kRows, int kColumns>
inline void tile_product(int64_t depth, const Operand& a, int64_t i, const Operand& b, int64_t j, char* c,
                         int64_t c_row, bool accumulate) {
  static_assert(kParts == 1 || kParts == 3);
  constexpr int kProducts = kParts == 1 ? 1 : 6, kLeft[6] = {0, 0, 0, 1, 1, 2}, kRight[6] = {0, 1, 2, 1, 0, 0};
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
#pragma GCC unroll 6
    for (int k = 0; k < kProducts; ++k) {
      const bool new_left = k == 0 || kLeft[k] != kLeft[k - 1], new_right = k == 0 || kRight[k] != kRight[k - 1];
      if (new_left) _tile_loadd(4, a.at(kLeft[k], i, t * 64), a.row);
      if (new_right) _tile_loadd(6, b.at(kRight[k], t * 16, j * 4), b.row);
      _tile_dpbf16ps(0, 4, 6);
      if (kTwoColumns) {
        if (new_right) _tile_loadd(7, b.at(kRight[k], t * 16, j * 4 + 64), b.row);
        _tile_dpbf16ps(1, 4, 7);
      }
      if (kTwoRows) {
        if (new_left) _tile_loadd(5, a.at(kLeft[k], i + 16, t * 64), a.row);
        _tile_dpbf16ps(2, 5, 6);
        if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, c, c_row);
  if (kTwoColumns) _tile_stored(1, c + 64, c_row);
  if (kTwoRows) _tile_stored(2, c + 16 * c_row, c_row);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * c_row + 64, c_row);
}

// c (+)= a b for `rows` x `columns` values of c (multiples of 16) and `depth` (of 32); c: rows of c_row floats.
template <int kParts>
inline void tiled_product(int64_t rows, int64_t columns, int64_t depth, const Operand& a, const Operand& b, float* c,
                          int64_t c_row, bool accumulate) {
  c_row *= 4, depth /= 32;
  written(a.first);
  for (int64_t i = 0; i < rows; i += 32)
    for (int64_t j = 0; j < columns; j += 32) {
      char* sum = reinterpret_cast<char*>(c) + i * c_row + j * 4;
      const bool two_rows = i + 16 < rows, two_columns = j + 16 < columns;
      if (two_rows && two_columns)
        tile_product<kParts, 2, 2>(depth, a, i, b, j, sum, c_row, accumulate);
      else if (two_rows)
        tile_product<kParts, 2, 1>(depth, a, i, b, j, sum, c_row, accumulate);
      else if (two_columns)
        tile_product<kParts, 1, 2>(depth, a, i, b, j, sum, c_row, accumulate);
      else
        tile_product<kParts, 1, 1>(depth, a, i, b, j, sum, c_row, accumulate);
    }
  written(c);
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

// Three bfloat16 values whose sum is x, each in the upper half of its word; of the third the lower half is junk. The
// first is cut, not rounded: what is finite stays so. An infinity leaves NaN behind.
struct Parts {
  __m512i part[3];
  [[gnu::always_inline]] explicit Parts(vf x) {
    const vi upper = vi{} + static_cast<int32_t>(0xffff0000);
    const vi first = (vi)x & upper;
    const vf rest = x - (vf)first;
    const vi second = ((vi)rest + 0x8000) & upper;
    part[0] = (__m512i)first, part[1] = (__m512i)second, part[2] = (__m512i)(rest - (vf)second);
  }
};

// Words of two bfloat16 values, part by part (`stride` words from one to the next).
[[gnu::always_inline]] inline void store_words(const Parts& low, const Parts& high, uint32_t* to, int64_t stride) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const __m512i shifted = _mm512_maskz_srli_epi32(kAll, low.part[i], 16);
    _mm512_storeu_si512(to + i * stride, _mm512_mask_blend_epi16(0xaaaaaaaa, shifted, high.part[i]));
  }
}

// Words of a left operand of one part hold neighbours. With three, values 16 apart, which takes no shuffles: so do the
// right operands' rows that meet them.
template <int kParts>
constexpr int64_t kApart = kParts == 1 ? 1 : 16;

// Two rows of two vectors to a left operand at `left` (rows of `left_row` words), unless null.
template <int kParts>
[[gnu::always_inline]] inline void store_left(const vf (&x)[2][2], uint32_t* left, int64_t left_row, int64_t part) {
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    if constexpr (kParts == 1)
      _mm512_storeu_si512(left + i * left_row, (__m512i)_mm512_cvtne2ps_pbh((__m512)x[i][1], (__m512)x[i][0]));
    else
      store_words(Parts(x[i][0]), Parts(x[i][1]), left + i * left_row, part);
}

// The same to pairs of a right operand, of the second vectors only if `wide`.
template <int kParts>
[[gnu::always_inline]] inline void store_pairs(const vf (&x)[2][2], uint32_t* pairs, int64_t part, bool wide) {
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) {
    if (j == 1 && !wide) return;
    if constexpr (kParts == 1)
      _mm512_storeu_si512(pairs + j * 16, pairs_of((__m512)x[0][j], (__m512)x[1][j]));
    else
      store_words(Parts(x[0][j]), Parts(x[1][j]), pairs + j * 16, part);
  }
}

// A float32 matrix [rows, pad(columns)] as the right operand that meets a left one made by store_square:
// [kParts, pad32(rows) / 2, pad(columns)] pairs.
template <int kParts>
inline void matrix_to_pairs(const float* from, int64_t rows, int64_t columns, uint32_t* to) {
  const int64_t width = pad(columns), part = pad32(rows) / 2 * width;
  const auto at = [&](int64_t i, int64_t j) { return i < rows ? load(from + i * width + j) : vf{}; };
  for (int64_t i = 0; i < pad32(rows) / 2; ++i)
    for (int64_t j = 0; j < width; j += 16, to += 16) {
      const int64_t row = kParts == 1 ? 2 * i : i / 16 * 32 + i % 16;
      const vf low = at(row, j), high = at(row + kApart<kParts>, j);
      if constexpr (kParts == 1)
        _mm512_storeu_si512(to, pairs_of((__m512)low, (__m512)high));
      else
        store_words(Parts(low), Parts(high), to, part);
    }
}

// The exponential by a polynomial of degree 3 (8e-5) and the reciprocal by its estimate (6e-5): both far below what
// rounding to bfloat16 loses (2e-3).
struct ShortMath {
  [[gnu::always_inline]] static vf exp(vf x) {
    const vf low = (vf)_mm512_maskz_max_ps(kAll, _mm512_set1_ps(-87.f), (__m512)x);
    const vf t = (vf)_mm512_maskz_min_ps(kAll, _mm512_set1_ps(88.f), (__m512)low) * 1.44269504088896341f;
    const __m512 n = _mm512_maskz_roundscale_ps(kAll, (__m512)t, 0);
    const vf r = t - (vf)n;
    vf p = splat(5.517166480e-2f);
    p = p * r + 2.426111251e-1f;
    p = p * r + 6.932609677e-1f;
    p = p * r + 9.999280572e-01f;
    return (vf)_mm512_maskz_scalef_ps(kAll, (__m512)p, n);
  }
  [[gnu::always_inline]] static vf inverse(vf x) { return (vf)_mm512_maskz_rcp14_ps(kAll, (__m512)x); }
};

template <Activation kKind, int kParts>
[[gnu::always_inline]] inline vf tile_phi(vf x, vf* slope) {
  if constexpr (kParts == 1)
    return phi<kKind, ShortMath>(x, slope);
  else
    return phi<kKind>(x, slope);
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
