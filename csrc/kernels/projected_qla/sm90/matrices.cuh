// The d x e matrices of the heads of a block as operands of 64 x 64, and results on their way out.
#pragma once

#include "projection.cuh"

namespace vista::cuda::sm90 {

constexpr int kMatrix = 64 * 128;      // bytes of a head of 64, or of two of 32 on the diagonal
constexpr int kRowsOfWarp = 16 * 128;  // bytes of a warp's results

// P of the block's heads from the state, or dZ from its gradient, by the consumers: zeros beside the diagonal and for
// heads that are not there.
template <class T, int D, int kMatrices>
__device__ inline void make_matrices(uint8_t* matrices, const QlaParams& p, const Work& w, bool gradient) {
  const float* from = gradient ? p.grad_state : p.state;
  const float scale = gradient ? 1.f : w.scale;
  with_activation(gradient ? Activation::kIdentity : p.state_activation, [&](auto phi) {
    for (int i = threadIdx.x; i < kMatrices * 64 * 16; i += kConsumerThreads) {
      const int matrix = i / (64 * 16), row = i / 16 % 64, column = i % 16 * 4;
      const int head = w.head + matrix * (64 / D) + row / D;
      float x[4] = {0.f, 0.f, 0.f, 0.f};
      if (row / D == column / D && head < p.heads) {
        const int64_t at = ((static_cast<int64_t>(w.sequence) * p.heads + head) * D + row % D) * D + column % D;
        const float4 z = *reinterpret_cast<const float4*>(from + at);
        x[0] = scale * z.x, x[1] = scale * z.y, x[2] = scale * z.z, x[3] = scale * z.w;
        phi.template apply<float>(x);
      }
      store_four(reinterpret_cast<T*>(matrices + matrix * kMatrix + swizzled(row, column)), x);
    }
  });
  publish_stores();
  sync_some(1 + kConsumers, kConsumerThreads);
}

// 64 columns of a warp's 16 rows, of which `rows` and `columns` exist, through its corner of shared memory.
template <class T>
__device__ inline void write_result(uint8_t* corner, const Accumulator<64>& result, T* to, int64_t stride, int rows,
                                    int64_t columns) {
  const int row = lane_id() / 4, column = lane_id() % 4 * 2;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      put_pair<T>(corner, row + 8 * half, 8 * j + column, result[j][2 * half], result[j][2 * half + 1]);
  __syncwarp();
  const int first = lane_id() % 8 * 8;
#pragma unroll
  for (int i = lane_id() / 8; i < 16; i += 4)
    if (i < rows && first < columns)
      write_vector(to + i * stride + first, load_vector(reinterpret_cast<const T*>(corner + swizzled(i, first))));
}

// The 64 x 64 sum of a warpgroup as the states of its heads, or, as gradient, as what they add to dZ.
template <int D>
__device__ inline void store_sums(const QlaParams& p, Work w, const Accumulator<64>& sum, bool gradient) {
  const int row = threadIdx.x % 128 / 32 * 16;
  w.head += row / D;
  if (w.head >= p.heads) return;
  if constexpr (D == 64) {
    store_sum<64>(p, w, sum, gradient, row, 0);
  } else {
    Accumulator<32> own;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) own[j][i] = row < 32 ? sum[j][i] : sum[j + 4][i];
    store_sum<32>(p, w, own, gradient, row % 32, 0);
  }
}

}  // namespace vista::cuda::sm90
