// Vectors of float, their activations and a small matrix product, in the instruction set of the including file.
// The includer defines VISTA_ISA (a namespace: each file keeps its own copy) and VISTA_LANES. No std:: templates here:
// the linker might keep the widest copy of a weak symbol for every processor.
#pragma once

#include <cstdint>
#include <cstring>
#ifdef VISTA_X86
#include <immintrin.h>
#endif

#include "vista/types.h"

namespace vista::cpu {
namespace VISTA_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t pad(int64_t n) { return (n + 15) / 16 * 16; }  // 16: the widest kLanes, so that layouts agree

constexpr int64_t kLanes = VISTA_LANES;
typedef float vf __attribute__((vector_size(VISTA_LANES * 4)));
typedef int32_t vi __attribute__((vector_size(VISTA_LANES * 4)));
typedef float vf_memory __attribute__((vector_size(VISTA_LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_memory __attribute__((vector_size(VISTA_LANES * 2), aligned(2), may_alias));

inline vf load(const float* p) { return *reinterpret_cast<const vf_memory*>(p); }
inline void store(float* p, vf x) { *reinterpret_cast<vf_memory*>(p) = x; }
// Past the caches, in whole vectors: what is written is not read before, and pushes nothing out. Follow with drain().
inline void stream(float* p, vf x) {
#if VISTA_LANES == 16
  _mm512_stream_ps(p, (__m512)x);
#elif VISTA_LANES == 8
  _mm256_stream_ps(p, (__m256)x);
#elif defined(VISTA_X86)
  _mm_stream_ps(p, (__m128)x);
#else
  store(p, x);
#endif
}
inline bool can_stream(const void* p, int64_t bytes) { return (reinterpret_cast<uintptr_t>(p) | bytes) % 64 == 0; }
// Makes what was streamed visible to other threads.
inline void drain() {
#ifdef VISTA_X86
  _mm_sfence();
#endif
}

inline vf splat(float x) { return x - vf{}; }

#if VISTA_LANES == 16
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own headers where an intrinsic has no mask

// A NaN stays one: the processor's min and max return their second operand then.
inline vf clamp(vf x, float low, float high) {
  return (vf)_mm512_maskz_min_ps(kAll, (__m512)splat(high), _mm512_maskz_max_ps(kAll, (__m512)splat(low), (__m512)x));
}

// 2^n, n in sixteenths: whole part by scaling, the rest from a table in a register; times a degree-3 polynomial of what
// is left (1e-8). Relative error about 1e-7; saturates outside [-87, 88].
[[gnu::always_inline]] inline vf exp_v(vf x) {
  alignas(64) static constexpr float kRoots[16] = {
      1.0000000f, 1.0442737f, 1.0905077f, 1.1387886f, 1.1892071f, 1.2418578f, 1.2968396f, 1.3542556f,
      1.4142135f, 1.4768262f, 1.5422108f, 1.6104903f, 1.6817929f, 1.7562522f, 1.8340081f, 1.9152066f};
  x = clamp(x, -87.f, 88.f);
  const vf log2_e = splat(1.44269504088896341f);
  const vf magic = splat(786432.f);  // 1.5 * 2^19: adding it leaves sixteenths in the low bits
  const vf shifted = x * log2_e + magic;
  const vf n = shifted - magic;
  const vf r = (vf)_mm512_fmsub_ps((__m512)x, (__m512)log2_e, (__m512)n);  // not x * log2_e again: one rounding
  const vf root = (vf)_mm512_maskz_permutexvar_ps(kAll, (__m512i)shifted, _mm512_load_ps(kRoots));
  vf p = splat(5.550411e-2f);
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  return (vf)_mm512_maskz_scalef_ps(kAll, (__m512)(root + root * (r * p)), (__m512)n);
}

// 1 / x for x in [1, 2^127): an estimate of 14 bits and a Newton step, a third of a division's time.
inline vf reciprocal(vf x) {
  const vf y = (vf)_mm512_maskz_rcp14_ps(kAll, (__m512)x);
  return y + y * (1.f - x * y);
}
#else
// Cephes-style exp: 2^n times a degree-6 polynomial, relative error about 1e-7; saturates outside [-87, 88].
inline vf exp_v(vf x) {
  const vf magic = splat(12582912.f);  // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
  x = x < -87.f ? splat(-87.f) : x;
  x = x > 88.f ? splat(88.f) : x;
  const vf shifted = x * 1.44269504088896341f + magic;
  const vf n = shifted - magic;
  vf r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  const vi bits = (reinterpret_cast<vi>(shifted) - reinterpret_cast<vi>(magic)) << 23;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + bits);
}

inline vf reciprocal(vf x) { return 1.f / x; }
#endif

// How far the exponential and the reciprocal of an activation go: all of float32.
struct FullMath {
  [[gnu::always_inline]] static vf exp(vf x) { return exp_v(x); }
  [[gnu::always_inline]] static vf inverse(vf x) { return reciprocal(x); }
};

// phi(a); with `slope` also phi'(a).
template <Activation kKind, typename Math = FullMath>
[[gnu::always_inline]] inline vf phi(vf a, vf* slope) {
  vf value = a, rise = splat(1.f);
  if (kKind == Activation::kSilu) {
    const vf s = Math::inverse(1.f + Math::exp(-a));
    value = a * s;
    rise = s + value * (1.f - s);
  } else if (kKind == Activation::kShiftedElu) {
    const vf below = Math::exp(a - 1.f);
    value = a < 1.f ? below : a;
    rise = a < 1.f ? below : rise;
  } else if (kKind == Activation::kRelu) {
    value = a < 0.f ? vf{} : a;  // keeps NaN
    rise = a > 0.f ? rise : vf{};
  }
  if (slope != nullptr) *slope = rise;
  return value;
}

template <Activation kKind>
inline void activate_rows(const float* x, int64_t x_row, float* y, float* dy, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r, x += x_row, y += n, dy += dy == nullptr ? 0 : n)
    for (int64_t i = 0; i < n; i += kLanes) {
      vf slope;
      store(y + i, phi<kKind>(load(x + i), &slope));
      if (dy != nullptr) store(dy + i, slope);
    }
}

// y = phi(x) for rows of n values, a multiple of kLanes, that lie x_row apart in x; with dy also phi'(x).
inline void activate_rows(Activation kind, const float* x, int64_t x_row, float* y, float* dy, int64_t rows,
                          int64_t n) {
  switch (kind) {
    case Activation::kSilu: return activate_rows<Activation::kSilu>(x, x_row, y, dy, rows, n);
    case Activation::kShiftedElu: return activate_rows<Activation::kShiftedElu>(x, x_row, y, dy, rows, n);
    case Activation::kRelu: return activate_rows<Activation::kRelu>(x, x_row, y, dy, rows, n);
    case Activation::kIdentity: return activate_rows<Activation::kIdentity>(x, x_row, y, dy, rows, n);
  }
}

inline void activate(Activation kind, const float* x, float* y, float* dy, int64_t n) {
  activate_rows(kind, x, n, y, dy, 1, n);
}

inline float dot(const float* a, const float* b, int64_t padded) {
  vf sum{};
  for (int64_t i = 0; i < padded; i += kLanes) sum += load(a + i) * load(b + i);
  float total = 0.f;
  for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t rounded = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  return value != value ? static_cast<uint16_t>(0x7fc0) : rounded;
}

// A row is too short to pay for a call of memcpy.
inline void copy_row(const float* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
  for (; i < n; ++i) to[i] = from[i];
}

// n values of a row as floats, zeros up to `padded`.
inline void load_row(DType dtype, const void* base, int64_t offset, float* to, int64_t n, int64_t padded) {
  switch (dtype) {
    case DType::kFloat: copy_row(static_cast<const float*>(base) + offset, to, n); break;
    case DType::kBFloat16: {
      const uint16_t* from = static_cast<const uint16_t*>(base) + offset;
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) {
        const vi wide = __builtin_convertvector(*reinterpret_cast<const vh_memory*>(from + i), vi);
        store(to + i, reinterpret_cast<vf>(wide << 16));
      }
      for (; i < n; ++i) to[i] = from_bfloat16(from[i]);
      break;
    }
    case DType::kHalf: {
      const _Float16* from = static_cast<const _Float16*>(base) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
      break;
    }
  }
  for (int64_t i = n; i < padded; ++i) to[i] = 0.f;
}

inline void store_row(DType dtype, void* base, int64_t offset, const float* from, int64_t n) {
  switch (dtype) {
    case DType::kFloat: copy_row(from, static_cast<float*>(base) + offset, n); break;
    case DType::kBFloat16: {
      uint16_t* to = static_cast<uint16_t*>(base) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = to_bfloat16(from[i]);
      break;
    }
    case DType::kHalf: {
      _Float16* to = static_cast<_Float16*>(base) + offset;
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<_Float16>(from[i]);
      break;
    }
  }
}

// The unrolling is what keeps `sum` in registers: a loop over it that survives until register allocation spills it all.
template <int kRows, int kVectors>
inline void product_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b, int64_t b_depth,
                         float* c, int64_t c_row, bool accumulate) {
  vf sum[kRows][kVectors] = {};
  if (accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = load(c + i * c_row + j * kLanes);
  }
  for (int64_t t = 0; t < depth; ++t) {
    vf column[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) column[j] = load(b + t * b_depth + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const vf factor = splat(a[i * a_row + t * a_depth]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * column[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + i * c_row + j * kLanes, sum[i][j]);
}

template <int kVectors, typename Meanwhile>
inline void product_columns(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_depth, const float* b,
                            int64_t b_depth, float* c, int64_t c_row, bool accumulate, Meanwhile& meanwhile) {
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    meanwhile();
    product_tile<4, kVectors>(depth, a + i * a_row, a_row, a_depth, b, b_depth, c + i * c_row, c_row, accumulate);
  }
  for (; i < rows; ++i)
    product_tile<1, kVectors>(depth, a + i * a_row, a_row, a_depth, b, b_depth, c + i * c_row, c_row, accumulate);
}

// c[i][j] (+)= sum over t < depth of a[i * a_row + t * a_depth] * b[t][j]; columns are a multiple of kLanes. Calls
// meanwhile() now and then: for requests to memory, which has time to answer while this computes.
template <typename Meanwhile>
inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                    const float* b, int64_t b_depth, float* c, int64_t c_row, bool accumulate, Meanwhile&& meanwhile) {
  // Four rows of kWide sums, their columns and a factor: 32 registers hold four vectors across, 16 only two.
  constexpr int kWide = kLanes >= 16 ? 4 : 2;
  int64_t j = 0;
  for (; j + kWide * kLanes <= columns; j += kWide * kLanes)
    product_columns<kWide>(rows, depth, a, a_row, a_depth, b + j, b_depth, c + j, c_row, accumulate, meanwhile);
  for (; j < columns; j += kLanes)
    product_columns<1>(rows, depth, a, a_row, a_depth, b + j, b_depth, c + j, c_row, accumulate, meanwhile);
}

inline void product(int64_t rows, int64_t columns, int64_t depth, const float* a, int64_t a_row, int64_t a_depth,
                    const float* b, int64_t b_depth, float* c, int64_t c_row, bool accumulate) {
  product(rows, columns, depth, a, a_row, a_depth, b, b_depth, c, c_row, accumulate, [] {});
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
