// What the two passes of the backward share. In each a block keeps one tile of two tensors (Q and dO, or K and V) and
// streams tiles of the other two past it, twice buffered; a warp owns 16 of the kept rows. With kept rows down and
// streamed rows across, P = exp(scale * S - lse) and dS = P (dP - delta) come from two products, and pass through
// shared memory (the warp's own rows) to become left operands.
#pragma once

#include "launch.cuh"
#include "rows.cuh"

namespace vista::cuda {

// fp32 corrects delta on the way (backward_queries.cu), so that own items' gradients have to wait for it.
template <class T>
constexpr bool kCorrectDelta = sizeof(T) == 4;

template <class Math, int D>
struct BackwardShape {
  using T = typename Math::T;
  static constexpr int kSize = sizeof(T);
  static constexpr int kRows = D * kSize <= 256 ? kTileRows : kTileRows / 2;            // kept
  static constexpr int kColumns = D * kSize <= 256 ? 32 : (D * kSize <= 512 ? 16 : 8);  // streamed
  static constexpr int kSlice = D <= 128 ? D : 128;  // columns of dK and dV for which the registers of a warp do
  static constexpr int kThreads = kRows * 2;
  static constexpr int kPlaces = 2;
  static constexpr int kBlocks = D * kSize <= 128 ? 3 : (D * kSize <= 256 ? 2 : 1);
  static constexpr int kPitch = padded<T>(D), kWeightPitch = padded<T>(kColumns);
  static constexpr int kTile = kColumns * kPitch;
  static constexpr int kSharedBytes = (2 * kRows * kPitch + kPlaces * 2 * kTile + kRows * kWeightPitch) * kSize;
};

// scores and mean gradients of a tile become P and dS. `lse` and `delta` by kept row (half) or streamed row (j, i);
// columns from `columns` on become zero.
template <class T, int N, class F>
__device__ inline void probabilities(Accumulator<N>& scores, Accumulator<N>& grads, float scale, int columns,
                                     F lse_and_delta) {
  const int first = lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int column = first + 8 * j + i % 2;
      const float2 row = lse_and_delta(i / 2, column);
      const float weight = column < columns ? exponential<T>(scale * scores[j][i] - row.x) : 0.f;
      scores[j][i] = weight;
      grads[j][i] = column < columns ? weight * (grads[j][i] - row.y) : 0.f;
    }
}

}  // namespace vista::cuda
