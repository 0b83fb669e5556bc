// The d x e matrices of a head: the map P = phi2(scale * Z) or the gradient dZ in shared memory as T, and sums over
// rows on their way out of the accumulators.
#pragma once

#include "rows.cuh"

namespace vista::cuda {

// Matrix kRows x kColumns from (first_row, first_column) of state (as P) or grad_state (as it is). Zeros beyond d and
// e, which phi2(0) need not be.
template <class T, int kRows, int kColumns, int kPitch>
__device__ inline void load_matrix(T* shared, const QlaParams& p, const Work& w, bool gradient, int first_row,
                                   int first_column) {
  const float scale = gradient ? 1.f : w.scale;
  const Activation kind = gradient ? Activation::kIdentity : p.state_activation;
  const float* from =
      (gradient ? p.grad_state : p.state) + (static_cast<int64_t>(w.sequence) * p.heads + w.head) * p.d * p.e;
  for (int i = threadIdx.x; i < kRows * kColumns / 4; i += blockDim.x) {
    const int row = i / (kColumns / 4), column = i % (kColumns / 4) * 4;
    float x[4] = {0.f, 0.f, 0.f, 0.f};
    if (first_row + row < p.d && first_column + column < p.e) {
      const float4 four = *reinterpret_cast<const float4*>(from + (first_row + row) * p.e + first_column + column);
      x[0] = scale * four.x, x[1] = scale * four.y, x[2] = scale * four.z, x[3] = scale * four.w;
      with_activation(kind, [&](auto phi) { phi.template apply<float>(x); });
    }
    store_four(shared + row * kPitch + column, x);
  }
}

// dZ from W: scale * phi2'(scale * z) * w
template <class Phi>
__device__ inline float state_gradient(Phi phi, float scale, float z, float w) {
  float x = scale * z;
  return scale * phi.template slope<float>(x) * w;
}

// A warp's 16 x N sum over the rows of a chunk, at (row, column) of its head's matrix: to the workspace if the sequence
// has more chunks, else to where it belongs, W as dZ.
template <int N>
__device__ inline void store_sum(const QlaParams& p, const Work& w, const Accumulator<N>& acc, bool gradient, int row,
                                 int column) {
  const bool only_chunk = w.first && (gradient ? w.is_all : w.has_all_sources);
  float* sums = only_chunk ? (gradient ? p.grad_state_out : p.state_out) : partials_of(p);
  row += lane_id() / 4;
  column += lane_id() % 4 * 2;
  const int64_t heads_before = static_cast<int64_t>(only_chunk ? w.sequence : w.slot) * p.heads + w.head;
  const int64_t first = (heads_before * p.d + row) * p.e + column;
  const auto store = [&](auto finish) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t at = first + 8 * half * p.e;
#pragma unroll
      for (int j = 0; j < N / 8; ++j)
        if (row + 8 * half < p.d && column + 8 * j < p.e)
          __stcg(reinterpret_cast<float2*>(sums + at + 8 * j),
                 finish(at + 8 * j, acc[j][2 * half], acc[j][2 * half + 1]));
    }
  };
  if (!gradient || !only_chunk) return store([](int64_t, float even, float odd) { return float2{even, odd}; });
  with_activation(p.state_activation, [&](auto phi) {
    store([&](int64_t at, float even, float odd) {
      const float2 z = load_pair(p.state + at);
      const float2 extra = p.grad_state == nullptr ? float2{0.f, 0.f} : load_pair(p.grad_state + at);
      return float2{extra.x + state_gradient(phi, w.scale, z.x, even),
                    extra.y + state_gradient(phi, w.scale, z.y, odd)};
    });
  });
}

}  // namespace vista::cuda
