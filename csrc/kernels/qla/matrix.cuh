// The d x e matrices of a head: the map P = phi2(scale * Z) or the gradient dZ in shared memory as T, and sums over rows
// on their way out of the accumulators.
#pragma once

#include "rows.cuh"

namespace vista::cuda {

// Matrix kRows x kColumns from (first_row, first_column) of state (as P) or grad_state (as it is). Zeros beyond d and e,
// which phi2(0) need not be.
template <class T, int kRows, int kColumns, int kPitch>
__device__ inline void load_matrix(T* shared, const QlaParams& p, const Work& w, bool gradient, int first_row,
                                   int first_column) {
  const float scale = gradient ? 1.f : scale_of(p, w.sequence, w.source_end - w.first);
  const Activation kind = gradient ? Activation::kIdentity : p.state_activation;
  const float* from = (gradient ? p.grad_state : p.state) + (w.sequence * p.heads + w.head) * p.d * p.e;
  constexpr int kVectors = kColumns / kPerVector<T>;
  for (int i = threadIdx.x; i < kRows * kVectors; i += blockDim.x) {
    const int row = i / kVectors, column = i % kVectors * kPerVector<T>;
    uint4 bits = {0, 0, 0, 0};
    if (first_row + row < p.d && first_column + column < p.e) {
      const float* at = from + (first_row + row) * p.e + first_column + column;
      float x[kPerVector<T>];
#pragma unroll
      for (int j = 0; j < kPerVector<T>; j += 4) {
        const float4 four = *reinterpret_cast<const float4*>(at + j);
        x[j] = scale * four.x, x[j + 1] = scale * four.y, x[j + 2] = scale * four.z, x[j + 3] = scale * four.w;
      }
      activate<float>(kind, x);
      bits = pack_vector<T>(x);
    }
    store_vector(shared + row * kPitch + column, bits);
  }
}

// dZ from W: scale * phi2'(scale * z) * w, N neighbours
template <int N>
__device__ inline void to_state_gradient(Activation kind, float scale, const float (&z)[N], float (&w)[N]) {
  float x[N], slope[N];
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = scale * z[i];
  activate_with_slope<float>(kind, x, slope);
#pragma unroll
  for (int i = 0; i < N; ++i) w[i] *= scale * slope[i];
}

// A warp's 16 x N sum over the rows of a chunk, at (row, column) of its head's matrix: to the workspace if the sequence
// has more chunks, else to where it belongs, W as dZ.
template <int N>
__device__ inline void store_sum(const QlaParams& p, const Work& w, const Accumulator<N>& acc, bool gradient,
                                 bool only_chunk, int row, int column) {
  const int64_t matrix = p.d * p.e;
  const int64_t at = (w.sequence * p.heads + w.head) * matrix;
  float* to = only_chunk ? (gradient ? p.grad_state_out : p.state_out) + at
                         : partials_of(p) + (w.slot * p.heads + w.head) * matrix;
  const float scale = gradient ? scale_of(p, w.sequence, w.source_end - w.first) : 1.f;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + lane_id() / 4 + 8 * half, c = column + 8 * j + lane_id() % 4 * 2;
      if (r >= p.d || c >= p.e) continue;
      const int64_t element = r * p.e + c;
      float sum[2] = {acc[j][2 * half], acc[j][2 * half + 1]};
      if (gradient && only_chunk) {
        const float2 z = load_pair(p.state + at + element);
        to_state_gradient(p.state_activation, scale, {z.x, z.y}, sum);
        if (p.grad_state != nullptr) {
          const float2 extra = load_pair(p.grad_state + at + element);
          sum[0] += extra.x, sum[1] += extra.y;
        }
      }
      store_pair(to + element, {sum[0], sum[1]});
    }
}

}  // namespace vista::cuda
