// What a norm divides rows by that lie in shared memory as TMA lays them: a thread has the rows of its accumulators,
// `row` and `row` + 8, and shares them with three other lanes.
#pragma once

#include "../mma.cuh"
#include "tma.cuh"

namespace vista::cuda::sm90 {

// This lane's part of the squares of a panel of 64 columns: two vectors, of which neighbouring lanes' lie in different
// banks.
template <class T>
__device__ inline void add_squares(float (&squares)[2], const uint8_t* panel, int row) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = lane_id() % 4 * 16 + i * 8;
      float x[8];
      unpack_vector<T>(load_vector(reinterpret_cast<const T*>(panel + swizzled(row + 8 * half, column))), x);
#pragma unroll
      for (int j = 0; j < 8; ++j) squares[half] = fmaf(x[j], x[j], squares[half]);
    }
}

// 1 / root mean square, from all four parts.
__device__ inline void inverse_roots(float (&inverse)[2], float (&squares)[2], int64_t dim, float eps) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 1; step < 4; step *= 2) squares[half] += __shfl_xor_sync(0xffffffffu, squares[half], step);
    inverse[half] = rsqrtf(squares[half] / static_cast<float>(dim) + eps);
  }
}

}  // namespace vista::cuda::sm90
