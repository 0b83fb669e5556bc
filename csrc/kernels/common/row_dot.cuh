// Dot products of rows, by 8 lanes each.
#pragma once

#include "activation.cuh"
#include "mma.cuh"

namespace vista::cuda {

// <phi(a), phi(b)> in all 8 lanes; 0 where n is 0.
template <class T>
__device__ inline float row_dot(Activation kind, const T* a, const T* b, int64_t n) {
  float sum = 0.f;
#pragma unroll 1
  for (int64_t i = lane_id() % 8 * kPerVector<T>; i < n; i += 8 * kPerVector<T>) {
    float x[kPerVector<T>], y[kPerVector<T>];
    unpack_vector<T>(load_vector(a + i), x);
    unpack_vector<T>(load_vector(b + i), y);
    with_activation(kind, [&](auto phi) {
      phi.template apply<T>(x);
      phi.template apply<T>(y);
    });
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) sum = fmaf(x[j], y[j], sum);
  }
  for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

}  // namespace vista::cuda
