// Rows of values of any dtype as vectors of float, without a detour through a buffer.
#pragma once

#include "lanes.h"
#include "row_vectors.h"

namespace vista::cpu {
namespace VISTA_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// kLanes float16 values; the compiler's own conversion goes value by value.
inline vf widen_half(const uint16_t* from) {
#if VISTA_LANES == 16
  return (vf)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif VISTA_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  alignas(16) float wide[kLanes];
  load_row(DType::kHalf, from, 0, wide, kLanes, kLanes);
  return load(wide);
#endif
}

// A row of any dtype, kLanes values at a time; what lies beyond its end reads as zeros and is not written.
template <DType kDType, typename Value>
struct ValueRow {
  Value* base;
  int64_t n;

  vf at(int64_t i) const {
    if constexpr (kDType == DType::kFloat) {
      if (i + kLanes <= n) return load(static_cast<const float*>(base) + i);
    } else if constexpr (kDType == DType::kHalf) {
      if (i + kLanes <= n) return widen_half(static_cast<const uint16_t*>(base) + i);
    } else {
      if (i + kLanes <= n) {
        const uint16_t* from = static_cast<const uint16_t*>(base) + i;
        return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_memory*>(from), vi) << 16);
      }
    }
    float part[kLanes];
    load_row(kDType, base, i, part, least(n - i, kLanes), kLanes);
    return load(part);
  }

  void put_at(int64_t i, vf x) const {
    if (i + kLanes <= n) return put<kDType>(static_cast<char*>(base) + i * kBytes, x, false);
    float part[kLanes];
    store(part, x);
    store_row(kDType, base, i, part, n - i);
  }

  static constexpr int64_t kBytes = kDType == DType::kFloat ? 4 : 2;
};

template <DType kDType>
ValueRow<kDType, const void> row_of(const void* base, int64_t row, int64_t dim) {
  return {static_cast<const char*>(base) + row * dim * ValueRow<kDType, const void>::kBytes, dim};
}
template <DType kDType>
ValueRow<kDType, void> row_of(void* base, int64_t row, int64_t dim) {
  return {static_cast<char*>(base) + row * dim * ValueRow<kDType, void>::kBytes, dim};
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
