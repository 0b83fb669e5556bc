// phi and phi', with the kind uniform over the launch: one branch for a whole vector of values.
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

template <class T, int N>
__device__ inline void activate(Activation kind, float (&x)[N]) {
  switch (kind) {
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] *= reciprocal(1.f + exponential<T>(-x[i]));
      break;
    case Activation::kShiftedElu:
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] >= 1.f ? x[i] : exponential<T>(x[i] - 1.f);
      break;
    case Activation::kRelu:  // NaN stays NaN
#pragma unroll
      for (int i = 0; i < N; ++i) x[i] = x[i] < 0.f ? 0.f : x[i];
      break;
    case Activation::kIdentity:
      break;
  }
}

template <class T, int N>
__device__ inline void activate_with_slope(Activation kind, float (&x)[N], float (&slope)[N]) {
  switch (kind) {
    case Activation::kSilu:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float sigmoid = reciprocal(1.f + exponential<T>(-x[i]));
        const float value = x[i] * sigmoid;
        slope[i] = sigmoid + value * (1.f - sigmoid);
        x[i] = value;
      }
      break;
    case Activation::kShiftedElu:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const bool linear = x[i] >= 1.f;
        x[i] = linear ? x[i] : exponential<T>(x[i] - 1.f);
        slope[i] = linear ? 1.f : x[i];
      }
      break;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < N; ++i) {
        slope[i] = x[i] > 0.f ? 1.f : 0.f;
        x[i] = x[i] < 0.f ? 0.f : x[i];
      }
      break;
    case Activation::kIdentity:
#pragma unroll
      for (int i = 0; i < N; ++i) slope[i] = 1.f;
      break;
  }
}

}  // namespace vista::cuda
