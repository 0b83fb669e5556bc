// Online softmax of a warp's 16 rows, in fp32 (common/mma.cuh for who holds what).
#pragma once

#include "rows.cuh"

namespace vista::cuda {

// Running maximum and sum of the rows g and g + 8; the sum of this thread's columns only, until `join`. Scaled scores
// are in units in which T's exponential is one instruction: powers of two, but for fp32.
template <class T>
struct Softmax {
  static constexpr float kUnit = sizeof(T) == 4 ? 1.f : 1.4426950408889634f;

  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};

  static __device__ float power(float x) {
    if constexpr (sizeof(T) == 4)
      return expf(x);
    else
      return exp2_approx(x);
  }

  // What was accumulated relative to `top` is to be multiplied by the result. NaN is no maximum: the exponentials
  // carry it on.
  __device__ float raise(int half, float high) {
    const float keep = top[half] == high ? 1.f : power(top[half] - high);
    top[half] = high;
    total[half] *= keep;
    return keep;
  }

  // The raw scores of a tile become weights, of which those beyond `keys` are zero; `keep` is what they do to earlier
  // sums. `scale` includes kUnit.
  template <int N>
  __device__ void take(Accumulator<N>& scores, float scale, int keys, float (&keep)[2]) {
    if (scale < 0.f) {
      const float minus[2] = {-1.f, -1.f};
      scale_rows<N>(scores, minus);
    }
    scale = fmaxf(fabsf(scale), kLeastScale);  // the maximum of the raw scores is that of the scaled ones
    if (keys < N)
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (lane_id() % 4 * 2 + 8 * j + i % 2 >= keys) scores[j][i] = -INFINITY;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float high = scores[0][2 * half];
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) high = fmaxf(high, scores[j][i]);
      for (int step = 1; step < 4; step *= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
      keep[half] = raise(half, fmaxf(top[half], scale * high));
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[j][i] = power(fmaf(scores[j][i], scale, -top[half]));
          total[half] += scores[j][i];
        }
    }
  }

  __device__ void join() {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      for (int step = 1; step < 4; step *= 2) total[half] += __shfl_xor_sync(0xffffffffu, total[half], step);
  }

  __device__ float log_sum_exp(int half) const { return top[half] / kUnit + logf(total[half]); }

 private:
  static constexpr float kLeastScale = 1e-37f;  // as good as 0, and minus infinity stays what it is
};

// acc += weights * values, where the weights are an accumulator of K columns.
template <class Math, int K, int N, int kPitch>
struct Weighted {
  static constexpr int kSharedPitch = padded<float>(K);
  static constexpr int kSharedBytes = 16 * kSharedPitch * sizeof(float);

  // Through shared memory, the warp's own.
  static __device__ void add(Accumulator<N>& acc, const Accumulator<K>& weights, const float* values, float* shared) {
    __syncwarp();
    store_accumulator<float, K, kSharedPitch>(shared, weights);
    __syncwarp();
    Math::template nn<K, N, kSharedPitch, kPitch>(acc, shared, values);
  }
};

// An accumulator of 16 columns is, pair by pair, what a 16-bit mma takes as its left operand.
template <class T, int K, int N, int kPitch>
struct Weighted<MmaMath<T>, K, N, kPitch> {
  static constexpr int kSharedBytes = 16 * sizeof(float);  // for the scores of own items

  static __device__ void add(Accumulator<N>& acc, const Accumulator<K>& weights, const T* values, float*) {
    const int lane = lane_id();
    const uint32_t from = shared_address(values + lane % 16 * kPitch + lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
      uint32_t left[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* two = weights[2 * k + i / 2] + i % 2 * 2;
        left[i] = pack2(two[0], two[1], T{});
      }
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        uint32_t right[4];
        load_matrices_transposed(right, from + (k * 16 * kPitch + n * 16) * sizeof(T));
        mma(acc[2 * n], left, right[0], right[1], T{});
        mma(acc[2 * n + 1], left, right[2], right[3], T{});
      }
    }
  }
};

}  // namespace vista::cuda
