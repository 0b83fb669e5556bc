// From values to codes and back, in the arithmetic of csrc/cpu/cache_rows_kernels.h: each result has the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <limits>

#include "vista/row_layout.h"

namespace vista::cuda::rows {

template <RowScheme kScheme>
constexpr int kValuesPerByte = kScheme == RowScheme::kInt4 ? 2 : 1;

constexpr float kMaxHalf = 65504.f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr uint16_t kNanHalf = 0x7e00;
constexpr float kToInteger = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr uint32_t kToIntegerBits = 0x4b400000;

// fminf and fmaxf drop a NaN; these keep it.
__device__ inline float min_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ inline float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// What the codes of a group depend on. int8 and fp8 are symmetric: `high` alone, of magnitudes.
template <RowScheme kScheme>
struct Extremes {
  static constexpr bool kBothEnds = kScheme == RowScheme::kInt4;
  float low = kInfinity, high = kBothEnds ? -kInfinity : 0.f;

  __device__ void add(float x) {
    high = max_or_nan(high, kBothEnds ? x : fabsf(x));
    if constexpr (kBothEnds) low = min_or_nan(low, x);
  }

  // With the lane `step` away, a power of two; all of the warp take part.
  __device__ void exchange(int step) {
    high = max_or_nan(high, __shfl_xor_sync(0xffffffff, high, step));
    if constexpr (kBothEnds) low = min_or_nan(low, __shfl_xor_sync(0xffffffff, low, step));
  }
};

// How a group is coded, and what its row says of it.
template <RowScheme kScheme>
struct GroupCode {
  float unit;     // the scale as stored; 0 where every code is zero
  float inverse;  // 1 / unit, rounded
  float shift;    // the bias as stored
  uint16_t scale_bits, bias_bits;

  GroupCode() = default;
  __device__ explicit GroupCode(const Extremes<kScheme>& extremes) {
    constexpr float kSteps = kScheme == RowScheme::kInt8 ? 127.f : kScheme == RowScheme::kInt4 ? 15.f : 448.f;
    float span = extremes.high;
    bool usable = span < kInfinity;  // false for NaN
    bias_bits = 0;
    if constexpr (kScheme == RowScheme::kInt4) {
      // + 0: a zero has no sign here, whichever of the group's zeros came first.
      const float low = __fadd_rn(extremes.low, 0.f), high = __fadd_rn(extremes.high, 0.f);
      usable = fabsf(low) <= kMaxHalf && fabsf(high) <= kMaxHalf;
      span = __fsub_rn(high, low);
      if (usable) bias_bits = __half_as_ushort(__float2half_rn(low));
    }
    const float scale = __fdiv_rn(span, kSteps);
    usable = usable && scale <= kMaxHalf;
    scale_bits = usable ? __half_as_ushort(__float2half_rn(scale)) : kNanHalf;
    shift = __half2float(__ushort_as_half(bias_bits));
    unit = usable ? __half2float(__ushort_as_half(scale_bits)) : 0.f;
    inverse = __frcp_rn(unit);
  }

  // What `encode` needs of the code that another lane has.
  __device__ GroupCode from_lane(int lane) const {
    GroupCode code;
    code.unit = __shfl_sync(0xffffffff, unit, lane);
    code.inverse = __shfl_sync(0xffffffff, inverse, lane);
    if constexpr (kScheme == RowScheme::kInt4) code.shift = __shfl_sync(0xffffffff, shift, lane);
    return code;
  }

  // value / unit, rounded once. `unit` has 11 bits, so the remainder of the first quotient is exact, and no quotient of
  // a float by 11 bits is so near to the middle of two floats that the second rounding could go astray. (A result
  // that underflows may differ: its code is zero all the same.)
  __device__ float divide(float value) const {
    const float quotient = __fmul_rn(value, inverse);
    return __fmaf_rn(__fmaf_rn(-quotient, unit, value), inverse, quotient);
  }

  // The code in the low bits (int8: 8, fp8: 7, its magnitude), anything above; int4: kToIntegerBits + the code.
  __device__ uint32_t encode(float x) const {
    if constexpr (kScheme == RowScheme::kInt8) {
      return __float_as_uint(__fadd_rn(fminf(fmaxf(divide(x), -127.f), 127.f), kToInteger));
    } else if constexpr (kScheme == RowScheme::kInt4) {
      return __float_as_uint(__fadd_rn(fminf(fmaxf(divide(__fsub_rn(x, shift)), 0.f), 15.f), kToInteger));
    } else {
      const float magnitude = fminf(divide(fabsf(x)), 448.f);
      const uint32_t bits = __float_as_uint(magnitude);
      const uint32_t normal = (bits + 0x7ffff + ((bits >> 20) & 1) - ((127 - 7) << 23)) >> 20;
      const uint32_t subnormal = __float_as_uint(__fadd_rn(magnitude, kToInteger / 512.f));  // 2^-9 steps
      return magnitude < 0.015625f ? subnormal : normal;
    }
  }

  // The codes of kCount values, at most four bytes of them, as a word.
  template <int kCount>
  __device__ uint32_t encode_word(const float* x) const {
    uint32_t word = 0, rest = 0;
#pragma unroll
    for (int i = kCount - 1; i >= 0; --i) {
      if constexpr (kScheme == RowScheme::kInt4) {
        word = (word << 4) + encode(x[i]);  // one instruction: what lies above the codes is subtracted at last
        rest = (rest << 4) + kToIntegerBits;
      } else {
        word = word << 8 | (encode(x[i]) & 0xff);
        rest = rest << 8 | __float_as_uint(x[i]) >> 24;
      }
    }
    if constexpr (kScheme == RowScheme::kInt4) word -= rest;
    if constexpr (kScheme == RowScheme::kFp8E4M3) word = (word & 0x7f7f7f7f) | (rest & 0x80808080);  // with the signs
    return unit > 0.f ? word : 0;
  }
};

// The value of the code at place `i` of a word.
template <RowScheme kScheme>
__device__ inline float decode(uint32_t word, int i, float scale, float bias) {
  constexpr uint32_t kTwo23 = 0x4b000000;  // the bits of 2^23: an integer below them reads as 2^23 + integer
  if constexpr (kScheme == RowScheme::kInt8) {
    const uint32_t biased = __byte_perm(word ^ 0x80808080, kTwo23, 0x7650 + i);
    return __fmul_rn(scale, __fsub_rn(__uint_as_float(biased), 8388608.f + 128.f));
  } else if constexpr (kScheme == RowScheme::kInt4) {
    const float code = __fsub_rn(__uint_as_float(kTwo23 | ((word >> (4 * i)) & 15)), 8388608.f);
    return __fmaf_rn(scale, code, bias);  // the product has 15 bits: exact either way
  } else {
    // The code's fields in those of a float: 2^-120 times the value, subnormals too.
    const uint32_t byte = word >> (8 * i);
    const float small = __uint_as_float((byte & 0x80) << 24 | (byte & 0x7f) << 20);
    return __fmul_rn(scale, __fmul_rn(small, 0x1p120f));
  }
}

}  // namespace vista::cuda::rows
