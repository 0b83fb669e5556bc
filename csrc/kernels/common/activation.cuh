// phi and phi'. The kind is a runtime argument, uniform over a launch.
#pragma once

#include "dtype.cuh"
#include "vista/types.h"

namespace vista::cuda {

__device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16-bit rows hide the error of the bare ex2 (relative 2^-22 and |x| 2^-24 of its argument); fp32 rows do not.
// tanh.approx would save one of the two special function operations of a SiLU, but its error of 2^-11 is that of bf16
// itself, has a sign, and adds up over the rows of a state.
template <class T>
__device__ inline float exponential(float x) {
  if constexpr (sizeof(T) == 4)
    return expf(x);
  else
    return exp2_approx(1.4426950408889634f * x);
}

template <Activation kKind>
struct Phi {
  template <class T>
  static __device__ float value(float x) {
    if constexpr (kKind == Activation::kSilu) return x * reciprocal(1.f + exponential<T>(-x));
    if constexpr (kKind == Activation::kShiftedElu) return x >= 1.f ? x : exponential<T>(x - 1.f);
    if constexpr (kKind == Activation::kRelu) return x < 0.f ? 0.f : x;  // NaN stays NaN
    if constexpr (kKind == Activation::kIdentity) return x;
  }

  // x becomes its value
  template <class T>
  static __device__ float slope(float& x) {
    const float before = x;
    if constexpr (kKind == Activation::kSilu) {
      const float sigmoid = reciprocal(1.f + exponential<T>(-x));
      x *= sigmoid;
      return sigmoid + x * (1.f - sigmoid);
    }
    x = value<T>(x);
    if constexpr (kKind == Activation::kShiftedElu) return before >= 1.f ? 1.f : x;
    if constexpr (kKind == Activation::kRelu) return before > 0.f ? 1.f : 0.f;
    if constexpr (kKind == Activation::kIdentity) return 1.f;
  }

  template <class T, int N>
  static __device__ void apply(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = value<T>(x[i]);
  }
};

// f(Phi<kind>{}): one branch, the same for all threads, around a whole tile of work. No switch, which could become a
// jump table.
template <class F>
__device__ inline void with_activation(Activation kind, F f) {
  if (kind == Activation::kSilu)
    f(Phi<Activation::kSilu>{});
  else if (kind == Activation::kShiftedElu)
    f(Phi<Activation::kShiftedElu>{});
  else if (kind == Activation::kRelu)
    f(Phi<Activation::kRelu>{});
  else
    f(Phi<Activation::kIdentity>{});
}

}  // namespace vista::cuda
