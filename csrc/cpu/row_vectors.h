// Vectors of row codes: codes to numbers and back, and numbers to an output of any dtype, past the caches if wanted.
#pragma once

#include "lanes.h"
#include "vista/row_layout.h"

namespace vista::cpu {
namespace VISTA_ISA {

typedef uint64_t pairs_v __attribute__((vector_size(VISTA_LANES * 4)));

constexpr float kRoundMagic = 12582912.f;  // added to |x| < 2^22, it leaves the nearest integer, ties to even

// What each instruction set says in its own words. widen: kLanes bytes, or kLanes / 2 to pairs; narrow: the lowest
// byte (two bytes) of each lane. The compiler's own conversions between these vectors go value by value.
#if VISTA_LANES == 16
inline vi widen_signed(const uint8_t* from) {
  return reinterpret_cast<vi>(
      _mm512_maskz_cvtepi8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline vu widen(const uint8_t* from) {
  return reinterpret_cast<vu>(
      _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
}
inline pairs_v widen_pairs(const uint8_t* from) {
  return reinterpret_cast<pairs_v>(_mm512_maskz_cvtepu8_epi64(0xff, _mm_loadu_si64(from)));
}
inline void narrow(uint8_t* to, vu x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_maskz_cvtepi32_epi8(kAll, reinterpret_cast<__m512i>(x)));
}
inline void narrow_pairs(uint8_t* to, pairs_v x) {
  _mm_storeu_si64(to, _mm512_maskz_cvtepi64_epi8(0xff, reinterpret_cast<__m512i>(x)));
}
inline void put_shorts(void* to, __m256i x, bool past) {
  past ? _mm256_stream_si256(static_cast<__m256i*>(to), x) : _mm256_storeu_si256(static_cast<__m256i*>(to), x);
}
inline void put_bfloat16(void* to, vf x, bool past) {
  put_shorts(to, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)), past);
}
inline void put_half(void* to, vf x, bool past) {
  put_shorts(to, _mm512_maskz_cvtps_ph(kAll, x, _MM_FROUND_TO_NEAREST_INT), past);
}
#elif VISTA_LANES == 8
inline vi widen_signed(const uint8_t* from) { return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadu_si64(from))); }
inline vu widen(const uint8_t* from) { return reinterpret_cast<vu>(_mm256_cvtepu8_epi32(_mm_loadu_si64(from))); }
inline pairs_v widen_pairs(const uint8_t* from) {
  return reinterpret_cast<pairs_v>(_mm256_cvtepu8_epi64(_mm_loadu_si32(from)));
}
// The low half of each lane of 32 bits, which must be below 2^16.
inline __m128i low_shorts(vu x) {
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(x));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 8));
}
inline void narrow(uint8_t* to, vu x) {
  const __m128i shorts = low_shorts(x & 0xff);
  _mm_storeu_si64(to, _mm_packus_epi16(shorts, shorts));
}
inline void narrow_pairs(uint8_t* to, pairs_v x) {
  const __m128i shorts = low_shorts(reinterpret_cast<vu>(x & 0xff));  // each second one is zero
  const __m128i every = _mm_shuffle_epi8(shorts, _mm_set1_epi32(0x0c080400));
  _mm_storeu_si32(to, every);
}
inline void put_shorts(void* to, __m128i x, bool past) {
  past ? _mm_stream_si128(static_cast<__m128i*>(to), x) : _mm_storeu_si128(static_cast<__m128i*>(to), x);
}
inline void put_bfloat16(void* to, vf x, bool past) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  put_shorts(to, low_shorts(x == x ? rounded : vu{} + 0x7fc0), past);
}
inline void put_half(void* to, vf x, bool past) { put_shorts(to, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT), past); }
#else
template <typename Vector, typename Narrow>
inline Vector widened(const uint8_t* from) {
  Vector wide;
  for (size_t i = 0; i < sizeof wide / sizeof wide[0]; ++i) wide[i] = static_cast<Narrow>(from[i]);
  return wide;
}
inline vi widen_signed(const uint8_t* from) { return widened<vi, int8_t>(from); }
inline vu widen(const uint8_t* from) { return widened<vu, uint8_t>(from); }
inline pairs_v widen_pairs(const uint8_t* from) { return widened<pairs_v, uint8_t>(from); }
inline void narrow(uint8_t* to, vu x) {
  for (int64_t i = 0; i < kLanes; ++i) to[i] = static_cast<uint8_t>(x[i]);
}
inline void narrow_pairs(uint8_t* to, pairs_v x) {
  for (int64_t i = 0; i < kLanes / 2; ++i) to[i] = static_cast<uint8_t>(x[i]);
}
inline void put_bfloat16(void* to, vf x, bool) {
  store_row(DType::kBFloat16, to, 0, reinterpret_cast<const float*>(&x), kLanes);
}
inline void put_half(void* to, vf x, bool) {
  store_row(DType::kHalf, to, 0, reinterpret_cast<const float*>(&x), kLanes);
}
#endif

// x / unit as the division rounds it, for a unit that is a float16 and quotients from 2^-25 to 2^22 (smaller ones stay
// small), in less than half of the time of a vector's division. The product is a unit or two in the last place off; its
// remainder is exact, and the correction by it misses by 2^-22 of such a place. No quotient by 11 bits is that near to
// the middle between two floats.
inline vf divide(vf x, vf unit, vf inverse) {
#if VISTA_LANES >= 8
  vf quotient = x * inverse;
  quotient = fma_v(fma_v(-quotient, unit, x), inverse, quotient);
  return reinterpret_cast<vf>(reinterpret_cast<vu>(quotient) | (reinterpret_cast<vu>(x) & 0x80000000));  // zero's too
#else
  (void)inverse;
  return x / unit;
#endif
}

inline vf limit(vf x, float low, float high) { return min_v(max_v(x, splat(low)), splat(high)); }

inline void prefetch(const void* at, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(at) + i, 0, 2);
}

// kLanes codes as numbers, before the scale.
template <RowScheme kScheme>
inline vf numbers(const uint8_t* from) {
  if constexpr (kScheme == RowScheme::kInt4) {
    pairs_v pairs = widen_pairs(from);
    pairs = (pairs | pairs << 28) & 0x0000000f0000000full;  // two codes a byte: the low one first
    return __builtin_convertvector(reinterpret_cast<vi>(pairs), vf);
  } else if constexpr (kScheme == RowScheme::kInt8) {
    return __builtin_convertvector(widen_signed(from), vf);
  } else {
    const vu code = widen(from);
    const vu rest = code & 0x7f;
    const vf small = __builtin_convertvector(reinterpret_cast<vi>(rest), vf) * 0.001953125f;
    const vf normal = reinterpret_cast<vf>((rest << 20) + ((127u - 7u) << 23));
    const vf magnitude = rest < 8 ? small : normal;
    return reinterpret_cast<vf>(reinterpret_cast<vu>(magnitude) | (code & 0x80) << 24);
  }
}

// kLanes quotients, clamped and rounded to codes.
template <RowScheme kScheme>
inline void write_codes(uint8_t* to, vf x) {
  if constexpr (kScheme == RowScheme::kInt8) {
    const vu rounded = reinterpret_cast<vu>(limit(x, -127.f, 127.f) + kRoundMagic);
    narrow(to, rounded);
  } else if constexpr (kScheme == RowScheme::kInt4) {
    const pairs_v pairs = reinterpret_cast<pairs_v>(reinterpret_cast<vu>(limit(x, 0.f, 15.f) + kRoundMagic) & 15);
    narrow_pairs(to, pairs | pairs >> 28);
  } else {
    const vu bits = reinterpret_cast<vu>(x);
    const vf positive = reinterpret_cast<vf>(bits & 0x7fffffff);
    const vf magnitude = positive > 448.f ? splat(448.f) : positive;
    const vu small = reinterpret_cast<vu>(magnitude * 512.f + kRoundMagic);  // subnormal: 2^-9 steps
    const vu near = reinterpret_cast<vu>(magnitude);
    const vu normal = ((near + 0x7ffff + (near >> 20 & 1)) >> 20) - ((127u - 7u) << 3);  // 3 mantissa bits
    const vu code = (magnitude < 0.015625f ? small : normal) & 0x7f;
    narrow(to, code | (bits >> 24 & 0x80));
  }
}

// kLanes numbers to `to`, values of the dtype; past the caches (see stream in vector_math.h).
template <DType kDType>
inline void put(void* to, vf x, bool past) {
  switch (kDType) {
    case DType::kFloat: return past ? stream(static_cast<float*>(to), x) : store(static_cast<float*>(to), x);
    case DType::kBFloat16: return put_bfloat16(to, x, past);
    case DType::kHalf: return put_half(to, x, past);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
