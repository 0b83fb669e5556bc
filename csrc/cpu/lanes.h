// Lane by lane and over the lanes of a vector: what vector_math.h leaves to intrinsics.
#pragma once

#include "vector_math.h"

#if VISTA_LANES >= 8
#include <immintrin.h>
#endif

namespace vista::cpu {
namespace VISTA_ISA {

typedef uint32_t vu __attribute__((vector_size(VISTA_LANES * 4)));

// min_v and max_v return their second operand where one is NaN.
#if VISTA_LANES == 16
inline vf fma_v(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline vf min_v(vf a, vf b) { return _mm512_maskz_min_ps(kAll, a, b); }
inline vf max_v(vf a, vf b) { return _mm512_maskz_max_ps(kAll, a, b); }
#elif VISTA_LANES == 8
inline vf fma_v(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline vf min_v(vf a, vf b) { return _mm256_min_ps(a, b); }
inline vf max_v(vf a, vf b) { return _mm256_max_ps(a, b); }
#else
inline vf fma_v(vf a, vf b, vf c) { return a * b + c; }
inline vf min_v(vf a, vf b) { return a < b ? a : b; }
inline vf max_v(vf a, vf b) { return a > b ? a : b; }
#endif

alignas(64) constexpr int32_t kCount[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};

// Over the lanes: halves against each other, in the order of a butterfly.
template <typename Pair>
inline float fold(vf x, const Pair& pair) {
#pragma GCC unroll 4
  for (int64_t step = kLanes / 2; step > 0; step /= 2) {
    vi from;  // counted modulo the lanes
    std::memcpy(&from, kCount + step, sizeof from);
    x = pair(x, __builtin_shuffle(x, from));
  }
  return x[0];
}

inline float sum_lanes(vf x) {
  return fold(x, [](vf a, vf b) { return a + b; });
}

// Zeros in the lanes from n on.
inline vf first_lanes(vf x, int64_t n) {
  vi lane;
  std::memcpy(&lane, kCount, sizeof lane);
  return lane < static_cast<int32_t>(n) ? x : vf{};
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
