// Vectors of row codes: codes to numbers and back, and numbers to an output of any dtype, past the caches if wanted.
#pragma once

#include "lanes.h"
#include "vista/row_layout.h"

namespace vista::cpu {
namespace VISTA_ISA {

typedef uint64_t pairs_v __attribute__((vector_size(VISTA_LANES * 4)));

constexpr float kRoundMagic = 12582912.f;  // added to |x| < 2^22, it leaves the nearest integer, ties to even

constexpr int64_t kQuad = 4 * kLanes;  // values whose codes fill a vector of bytes

// What each instruction set says in its own words. widen: kLanes bytes, or kLanes / 2 to pairs. nearest: ties to even.
// put_signed, put_unsigned: kQuad integers, between -2^15 and 2^15 or limited to that, as bytes within the limits;
// put_nibbles: the same, two a byte, the first one low. The compiler's own conversions go value by value.
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
inline vi nearest(vf x) { return reinterpret_cast<vi>(_mm512_maskz_cvtps_epi32(kAll, x)); }
inline __m512i shorts(const vi* x) {
  return _mm512_packs_epi32(reinterpret_cast<__m512i>(x[0]), reinterpret_cast<__m512i>(x[1]));
}
// Packs work within 128 bits: four bytes of each vector in turn.
inline __m512i in_order(__m512i packed) {
  const __m512i from = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_maskz_permutexvar_epi32(kAll, from, packed);
}
inline void put_bytes(uint8_t* to, __m512i x, bool past) {
  past ? _mm512_stream_si512(reinterpret_cast<__m512i*>(to), x) : _mm512_storeu_si512(to, x);
}
inline void put_signed(uint8_t* to, const vi* x, int8_t low, bool past) {
  const __m512i bytes = in_order(_mm512_packs_epi16(shorts(x), shorts(x + 2)));
  put_bytes(to, _mm512_max_epi8(bytes, _mm512_set1_epi8(low)), past);
}
inline void put_unsigned(uint8_t* to, const vi* x, bool past) {
  put_bytes(to, in_order(_mm512_packus_epi16(shorts(x), shorts(x + 2))), past);
}
inline void put_nibbles(uint8_t* to, const vi* x, bool past) {
  const __m512i bytes = in_order(_mm512_packus_epi16(shorts(x), shorts(x + 2)));
  const __m512i codes = _mm512_min_epu8(bytes, _mm512_set1_epi8(15));
  const __m256i pairs = _mm512_maskz_cvtepi16_epi8(~0u, _mm512_maddubs_epi16(codes, _mm512_set1_epi16(0x1001)));
  past ? _mm256_stream_si256(reinterpret_cast<__m256i*>(to), pairs)
       : _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), pairs);
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
inline vf halves(const void* from) {
  return _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(static_cast<const __m256i*>(from)));
}
inline vi shorts_at(const void* from) {
  return reinterpret_cast<vi>(_mm512_maskz_cvtepu16_epi32(kAll, _mm256_loadu_si256(static_cast<const __m256i*>(from))));
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
inline vi nearest(vf x) { return reinterpret_cast<vi>(_mm256_cvtps_epi32(x)); }
inline __m256i shorts(const vi* x) {
  return _mm256_packs_epi32(reinterpret_cast<__m256i>(x[0]), reinterpret_cast<__m256i>(x[1]));
}
// Packs work within 128 bits: four bytes of each vector in turn.
inline __m256i in_order(__m256i packed) {
  return _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
inline void put_bytes(uint8_t* to, __m256i x, bool past) {
  past ? _mm256_stream_si256(reinterpret_cast<__m256i*>(to), x)
       : _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), x);
}
inline void put_signed(uint8_t* to, const vi* x, int8_t low, bool past) {
  const __m256i bytes = in_order(_mm256_packs_epi16(shorts(x), shorts(x + 2)));
  put_bytes(to, _mm256_max_epi8(bytes, _mm256_set1_epi8(low)), past);
}
inline void put_unsigned(uint8_t* to, const vi* x, bool past) {
  put_bytes(to, in_order(_mm256_packus_epi16(shorts(x), shorts(x + 2))), past);
}
inline void put_nibbles(uint8_t* to, const vi* x, bool past) {
  const __m256i bytes = in_order(_mm256_packus_epi16(shorts(x), shorts(x + 2)));
  const __m256i codes = _mm256_min_epu8(bytes, _mm256_set1_epi8(15));
  const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x1001));
  const __m128i two = _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
  past ? _mm_stream_si128(reinterpret_cast<__m128i*>(to), two) : _mm_storeu_si128(reinterpret_cast<__m128i*>(to), two);
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
inline vf halves(const void* from) { return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(from))); }
inline vi shorts_at(const void* from) {
  return reinterpret_cast<vi>(_mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
}
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
inline vi nearest(vf x) {
  x = min_v(max_v(x, splat(-32768.f)), splat(32767.f));
  return reinterpret_cast<vi>(x + kRoundMagic) - reinterpret_cast<vi>(splat(kRoundMagic));
}
inline int32_t within(int32_t x, int32_t low, int32_t high) { return x < low ? low : (x > high ? high : x); }
inline void put_signed(uint8_t* to, const vi* x, int8_t low, bool) {
  for (int64_t i = 0; i < kQuad; ++i) to[i] = static_cast<uint8_t>(within(x[i / kLanes][i % kLanes], low, 127));
}
inline void put_unsigned(uint8_t* to, const vi* x, bool) {
  for (int64_t i = 0; i < kQuad; ++i) to[i] = static_cast<uint8_t>(x[i / kLanes][i % kLanes]);
}
inline void put_nibbles(uint8_t* to, const vi* x, bool) {
  const auto code = [&](int64_t i) { return within(x[i / kLanes][i % kLanes], 0, 15); };
  for (int64_t i = 0; i < kQuad; i += 2) to[i / 2] = static_cast<uint8_t>(code(i) | code(i + 1) << 4);
}
inline void put_bfloat16(void* to, vf x, bool) {
  store_row(DType::kBFloat16, to, 0, reinterpret_cast<const float*>(&x), kLanes);
}
inline void put_half(void* to, vf x, bool) {
  store_row(DType::kHalf, to, 0, reinterpret_cast<const float*>(&x), kLanes);
}
inline vf halves(const void* from) {
  vf x;
  load_row(DType::kHalf, from, 0, reinterpret_cast<float*>(&x), kLanes, kLanes);
  return x;
}
inline vi shorts_at(const void* from) { return __builtin_convertvector(*static_cast<const vh_memory*>(from), vi); }
#endif

// x / unit as the division rounds it, for a unit that is a float16 and quotients from 2^-25 to 2^22 (smaller ones stay
// small), in less than half of the time of a vector's division. The product is a unit or two in the last place off; its
// remainder is exact, and the correction by it misses by 2^-22 of such a place. No quotient by 11 bits is that near to
// the middle between two floats. The sign of a zero is left open.
inline vf divide(vf x, vf unit, vf inverse) {
#if VISTA_LANES >= 8
  vf quotient = x * inverse;
  return fma_v(fma_v(-quotient, unit, x), inverse, quotient);
#else
  (void)inverse;
  return x / unit;
#endif
}

inline vf with_sign_of(vf x, vf magnitude) {
  return reinterpret_cast<vf>(reinterpret_cast<vu>(magnitude) | (reinterpret_cast<vu>(x) & 0x80000000));
}

constexpr int64_t kLine = 64, kPage = 4096;
inline void prefetch(const void* at) { __builtin_prefetch(at, 0, 2); }  // into the second-level cache

constexpr int64_t value_bytes(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

// kLanes values of the dtype.
template <DType kDType>
inline vf read(const void* from) {
  if constexpr (kDType == DType::kFloat) return load(static_cast<const float*>(from));
  if constexpr (kDType == DType::kHalf) return halves(from);
  return reinterpret_cast<vf>(shorts_at(from) << 16);
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

// A quotient's code of eight bits, 4 of them exponent and 3 fraction.
inline vi e4m3(vf x) {
  const vu bits = reinterpret_cast<vu>(x);
  const vf positive = reinterpret_cast<vf>(bits & 0x7fffffff);
  const vf magnitude = positive > 448.f ? splat(448.f) : positive;
  const vu small = reinterpret_cast<vu>(magnitude * 512.f + kRoundMagic);  // subnormal: 2^-9 steps
  const vu near = reinterpret_cast<vu>(magnitude);
  const vu normal = ((near + 0x7ffff + (near >> 20 & 1)) >> 20) - ((127u - 7u) << 3);  // 3 mantissa bits
  const vu code = (magnitude < 0.015625f ? small : normal) & 0x7f;
  return reinterpret_cast<vi>(code | (bits >> 24 & 0x80));
}

// kQuad quotients, rounded and limited to codes.
template <RowScheme kScheme>
inline void write_codes(uint8_t* to, const vf* quotients, bool past) {
  vi codes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) codes[i] = kScheme == RowScheme::kFp8E4M3 ? e4m3(quotients[i]) : nearest(quotients[i]);
  switch (kScheme) {
    case RowScheme::kInt8: return put_signed(to, codes, -127, past);
    case RowScheme::kInt4: return put_nibbles(to, codes, past);
    case RowScheme::kFp8E4M3: return put_unsigned(to, codes, past);
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
