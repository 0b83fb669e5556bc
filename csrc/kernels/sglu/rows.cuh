// Rows that a warp keeps in registers as the left operand of its products, 16 of them.
#pragma once

#include "../common/tiles.cuh"
#include "vista/cuda/sglu.h"

namespace vista::cuda {

// The rows of a block.
template <int kRows>
struct RowTile {
  int64_t begin;
  int rows;
  __device__ explicit RowTile(const SgluParams& p) : begin(static_cast<int64_t>(blockIdx.x) * kRows) {
    rows = static_cast<int>(p.total - begin < kRows ? p.total - begin : kRows);
  }
};

// The two elements at the columns 8 j + 2t and the next, of the row g (half 0) or g + 8 (half 1): where an accumulator
// has acc[j][2 * half].
template <class T, int K>
__device__ inline float2 pair_of(const Fragments<K>& rows, int j, int half) {
  return unpack2(rows[j / 2][j % 2 * 2 + half], T{});
}

// Over the four lanes that share the rows g and g + 8.
__device__ inline void sum_lanes(float (&x)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int step = 1; step < 4; step *= 2) x[half] += __shfl_xor_sync(0xffffffffu, x[half], step);
}

// 1 / root mean square of the rows g and g + 8; 1 without norm. Columns beyond dim are zeros.
template <class T, int K>
__device__ inline void inverse_roots(float (&inverse)[2], const Fragments<K>& rows, const SgluParams& p) {
  inverse[0] = inverse[1] = 1.f;
  if (!p.norm) return;
  float squares[2] = {0.f, 0.f};
#pragma unroll
  for (int j = 0; j < K / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 two = pair_of<T, K>(rows, j, half);
      squares[half] = fmaf(two.x, two.x, fmaf(two.y, two.y, squares[half]));
    }
  sum_lanes(squares);
#pragma unroll
  for (int half = 0; half < 2; ++half) inverse[half] = rsqrtf(squares[half] / static_cast<float>(p.dim) + p.eps);
}

}  // namespace vista::cuda
