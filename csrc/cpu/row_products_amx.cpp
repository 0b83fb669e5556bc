// Row products in AMX tiles. Operands are laid out tile by tile, 1 KB each: a load touches 16 lines in a row, whatever
// the matrix's strides are, and each 32 x 32 values of a result stay in four registers over the whole depth.
#define VISTA_ISA amx
#define VISTA_LANES 16
#include "amx_tiles.h"
#include "vista/row_products.h"

namespace vista::cpu {
namespace amx {

constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTimesRows = 128, kOuterRows = 256;  // packed at a time: some hundred KB, half of the second level
constexpr int64_t kResult = 32;                        // rows and columns of a result in registers

inline int64_t tiles_of(int64_t n, int64_t unit) { return (n + unit - 1) / unit; }

// A matrix in memory, as kParts bfloat16 parts; what lies outside of it reads as zeros.
template <int kParts>
struct Source {
  const void* base;
  int64_t rows, columns;

  // Columns j to j + 16 of a row.
  void at(int64_t r, int64_t j, __m256i (&part)[kParts]) const {
    const __mmask16 there = r < rows && j < columns ? columns_from(j, columns) : 0;
    const int64_t index = r * columns + j;
    if constexpr (kParts == 1) {
      part[0] = load_bfloat16(static_cast<const uint16_t*>(base) + index, there);
    } else {
      vf rest = (vf)_mm512_maskz_loadu_ps(there, static_cast<const float*>(base) + index);
      for (int p = 0; p < kParts; ++p) {
        part[p] = (__m256i)_mm512_cvtneps_pbh((__m512)rest);
        rest -= (vf)widen(part[p]);
      }
    }
  }

  // 16 rows of 32 values, as they are: a tile of a left operand for each part, kTileBytes apart.
  void tile(int64_t row, int64_t column, char* to) const {
    for (int64_t r = 0; r < 16; ++r)
      for (int64_t half = 0; half < 2; ++half) {
        __m256i part[kParts];
        at(row + r, column + 16 * half, part);
        for (int p = 0; p < kParts; ++p)
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + p * kTileBytes + r * 64 + half * 32), part[p]);
      }
  }

  // 32 rows of 16 values, each two rows as pairs: a tile of a right operand for each part, `stride` bytes apart.
  void pairs(int64_t row, int64_t column, char* to, int64_t stride) const {
    for (int64_t r = 0; r < 16; ++r) {
      __m256i even[kParts], odd[kParts];
      at(row + 2 * r, column, even);
      at(row + 2 * r + 1, column, odd);
      for (int p = 0; p < kParts; ++p) _mm512_store_si512(to + p * stride + r * 64, pairs_of(even[p], odd[p]));
    }
  }
};

inline void transpose_tile(const char* from, char* to) {
  transpose_words(reinterpret_cast<const uint32_t*>(from), 16, reinterpret_cast<uint32_t*>(to), 16);
}

// 32 x 32 sums from two rows of left tiles, [depth][part] each, and right tiles [depth][part][2].
template <int kParts>
inline void multiply(int64_t depth, const char* upper, const char* lower, const char* right, float* sums) {
  const auto left_tiles = [&](int64_t t, int part) __attribute__((always_inline)) {
    _tile_loadd(4, upper + (t * kParts + part) * kTileBytes, 64);
    _tile_loadd(5, lower + (t * kParts + part) * kTileBytes, 64);
  };
  const auto right_tiles = [&](int64_t t, int part) __attribute__((always_inline)) {
    _tile_loadd(6, right + (t * kParts + part) * 2 * kTileBytes, 64);
    _tile_loadd(7, right + ((t * kParts + part) * 2 + 1) * kTileBytes, 64);
  };
  const auto add = []() __attribute__((always_inline)) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  if constexpr (kParts == 3)
    for (int64_t t = 0; t < depth; ++t) {
      left_tiles(t, 0), right_tiles(t, 2), add();
      right_tiles(t, 1), add();
      left_tiles(t, 1), add();
      right_tiles(t, 0), add();
      left_tiles(t, 2), add();
    }
  for (int64_t t = 0; t < depth; ++t) left_tiles(t, 0), right_tiles(t, 0), add();
  _tile_stored(0, sums, kResult * 4);
  _tile_stored(1, sums + 16, kResult * 4);
  _tile_stored(2, sums + 16 * kResult, kResult * 4);
  _tile_stored(3, sums + 16 * kResult + 16, kResult * 4);
  written(sums);
}

template <int kParts>
void pack(int64_t depth, int64_t columns, const void* weight, bool transposed, char* to) {
  const Source<kParts> source{weight, transposed ? depth : columns, transposed ? columns : depth};
  alignas(64) char tiles[kParts * kTileBytes];
  for (int64_t j = 0; j < columns; j += kResult)
    for (int64_t t = 0; t < depth; t += 32, to += kParts * 2 * kTileBytes)
      for (int64_t half = 0; half < 2; ++half) {
        if (transposed) {
          source.pairs(t, j + 16 * half, to + half * kTileBytes, 2 * kTileBytes);
          continue;
        }
        source.tile(j + 16 * half, t, tiles);
        for (int p = 0; p < kParts; ++p) transpose_tile(tiles + p * kTileBytes, to + (2 * p + half) * kTileBytes);
      }
}

// Large results of whole lines go past the caches.
inline void put_sums(DType dtype, const float* sums, const float* bias, int64_t rows, int64_t row, int64_t column,
                     int64_t columns, void* out, bool past) {
  for (int64_t r = 0; r < least(kResult, rows - row); ++r)
    for (int64_t j = column; j < least(column + kResult, columns); j += 16) {
      const __mmask16 there = columns_from(j, columns);
      __m512 x = (__m512)load(sums + r * kResult + j - column);
      if (bias != nullptr) x = (__m512)((vf)x + (vf)_mm512_maskz_loadu_ps(there, bias + j));
      const int64_t index = (row + r) * columns + j;
      if (past)
        stream(static_cast<float*>(out) + index, (vf)x);
      else if (dtype == DType::kFloat)
        _mm512_mask_storeu_ps(static_cast<float*>(out) + index, there, x);
      else
        _mm256_mask_storeu_epi16(static_cast<uint16_t*>(out) + index, there, (__m256i)_mm512_cvtneps_pbh(x));
    }
}

template <int kParts>
void times(DType dtype, int64_t rows, int64_t depth, int64_t columns, const void* x, const char* packed,
           const float* bias, void* out, bool past, char* scratch) {
  const Tiles tiles;
  const Source<kParts> source{x, rows, depth};
  past = past && dtype == DType::kFloat && can_stream(out, columns * 4);
  const int64_t deep = tiles_of(depth, 32), row_bytes = deep * kParts * kTileBytes;
  float* sums = reinterpret_cast<float*>(scratch);
  char* left = scratch + kResult * kResult * 4;
  for (int64_t begin = 0; begin < rows; begin += kTimesRows) {
    const int64_t end = least(rows, begin + kTimesRows);
    for (int64_t i = begin; i < end; i += 32)
      for (int64_t r = 0; r < 2; ++r)
        for (int64_t t = 0; t < deep; ++t)
          source.tile(i + 16 * r, 32 * t, left + ((i - begin) / 16 + r) * row_bytes + t * kParts * kTileBytes);
    written(left);
    for (int64_t j = 0; j < columns; j += kResult)
      for (int64_t i = begin; i < end; i += kResult) {
        const char* upper = left + (i - begin) / 16 * row_bytes;
        multiply<kParts>(deep, upper, upper + row_bytes, packed + j / kResult * 2 * row_bytes, sums);
        put_sums(dtype, sums, bias, rows, i, j, columns, out, past);
      }
  }
  if (past) drain();
}

template <int kParts>
void outer(int64_t rows, int64_t left, int64_t right, const void* a, const void* b, float* sum, char* scratch) {
  const Tiles tiles;
  const Source<kParts> source_a{a, rows, left}, source_b{b, rows, right};
  constexpr int64_t kDeep = kOuterRows / 32, kRowBytes = kDeep * kParts * kTileBytes;
  float* sums = reinterpret_cast<float*>(scratch);
  char* tile = scratch + kResult * kResult * 4;
  char* left_tiles = tile + kParts * kTileBytes;
  char* right_tiles = left_tiles + 2 * tiles_of(left, kResult) * kRowBytes;
  for (int64_t begin = 0; begin < rows; begin += kOuterRows) {
    const int64_t deep = tiles_of(least(rows - begin, kOuterRows), 32);
    for (int64_t t = 0; t < deep; ++t) {
      for (int64_t i = 0; i < 2 * tiles_of(left, kResult); ++i) {
        source_a.pairs(begin + 32 * t, 16 * i, tile, kTileBytes);
        for (int p = 0; p < kParts; ++p)
          transpose_tile(tile + p * kTileBytes, left_tiles + i * kRowBytes + (t * kParts + p) * kTileBytes);
      }
      for (int64_t j = 0; j < 2 * tiles_of(right, kResult); ++j)
        source_b.pairs(begin + 32 * t, 16 * j,
                       right_tiles + j / 2 * 2 * kRowBytes + (t * kParts * 2 + j % 2) * kTileBytes, 2 * kTileBytes);
    }
    written(left_tiles);
    for (int64_t i = 0; i < left; i += kResult)
      for (int64_t j = 0; j < right; j += kResult) {
        const char* upper = left_tiles + i / 16 * kRowBytes;
        multiply<kParts>(deep, upper, upper + kRowBytes, right_tiles + j / 16 * kRowBytes, sums);
        for (int64_t r = 0; r < least(kResult, left - i); ++r)
          for (int64_t c = j; c < least(j + kResult, right); c += 16) {
            float* to = sum + (i + r) * right + c;
            const __mmask16 there = columns_from(c, right);
            const vf total = (vf)_mm512_maskz_loadu_ps(there, to) + load(sums + r * kResult + c - j);
            _mm512_mask_storeu_ps(to, there, (__m512)total);
          }
      }
  }
}

inline int64_t parts_of(DType dtype) { return dtype == DType::kFloat ? 3 : 1; }

int64_t packed_bytes(DType dtype, int64_t depth, int64_t columns) {
  return tiles_of(depth, 32) * tiles_of(columns, kResult) * 2 * parts_of(dtype) * kTileBytes;
}

void pack_weight(DType dtype, int64_t depth, int64_t columns, const void* weight, bool transposed, void* packed) {
  char* to = static_cast<char*>(packed);
  if (dtype == DType::kFloat) return pack<3>(depth, columns, weight, transposed, to);
  return pack<1>(depth, columns, weight, transposed, to);
}

int64_t times_scratch_bytes(DType dtype, int64_t depth) {
  return kResult * kResult * 4 + kTimesRows / 16 * tiles_of(depth, 32) * parts_of(dtype) * kTileBytes;
}

void rows_times(DType dtype, int64_t rows, int64_t depth, int64_t columns, const void* x, const void* packed,
                const float* bias, void* out, bool past, void* scratch) {
  const char* weight = static_cast<const char*>(packed);
  char* room = static_cast<char*>(scratch);
  if (dtype == DType::kFloat) return times<3>(dtype, rows, depth, columns, x, weight, bias, out, past, room);
  return times<1>(dtype, rows, depth, columns, x, weight, bias, out, past, room);
}

int64_t outer_scratch_bytes(DType dtype, int64_t left, int64_t right) {
  const int64_t parts = parts_of(dtype), tiles = 2 * (tiles_of(left, kResult) + tiles_of(right, kResult));
  return kResult * kResult * 4 + (tiles * kOuterRows / 32 + 1) * parts * kTileBytes;
}

void rows_outer(DType dtype, int64_t rows, int64_t left, int64_t right, const void* a, const void* b, float* sum,
                void* scratch) {
  char* room = static_cast<char*>(scratch);
  if (dtype == DType::kFloat) return outer<3>(rows, left, right, a, b, sum, room);
  return outer<1>(rows, left, right, a, b, sum, room);
}

}  // namespace amx

const RowProducts row_products_amx{amx::packed_bytes, amx::pack_weight,         amx::times_scratch_bytes,
                                   amx::rows_times,   amx::outer_scratch_bytes, amx::rows_outer};

}  // namespace vista::cpu
