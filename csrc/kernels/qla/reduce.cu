// Adds the partial sums of a sequence's chunks in a fixed order. A warp reads 512 bytes of one chunk; the eight warps
// of a block take every eighth chunk of the same elements, so that 490 chunks (1M rows) are 61 reads deep, and the
// eight results are added in order. As gradient, W turns into dZ on the way.
#include "matrix.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

constexpr int kGroups = 8;
constexpr int kElements = 32 * 4;

__device__ void add(float (&sum)[4], float4 x) { sum[0] += x.x, sum[1] += x.y, sum[2] += x.z, sum[3] += x.w; }

__global__ void __launch_bounds__(kGroups * 32, 8) qla_reduce(const QlaParams p, bool gradient) {
  __shared__ float4 sums[kGroups][32];
  const int lane = threadIdx.x % 32, group = threadIdx.x / 32;
  const int64_t matrix = p.heads * p.d * p.e;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kElements + lane * 4;
  for (int64_t sequence = blockIdx.y; sequence < p.batch; sequence += gridDim.y) {
    const int64_t length = index_at(p.seq_offsets, sequence + 1) - index_at(p.seq_offsets, sequence);
    const int64_t sources = length - targets_of(p, sequence);
    const int64_t summed = gradient ? length : sources;
    if (summed <= p.chunk_rows) continue;  // written by its only chunk
    const float* partials = partials_of(p) + plan_of(p)[sequence].slot * matrix + element;
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
    if (element < matrix) {
      const int64_t chunks = ceil_div(summed, p.chunk_rows);
#pragma unroll 4
      for (int64_t c = group; c < chunks; c += kGroups)
        add(sum, *reinterpret_cast<const float4*>(partials + c * matrix));
    }
    sums[group][lane] = {sum[0], sum[1], sum[2], sum[3]};
    __syncthreads();
    if (group == 0 && element < matrix) {
      for (int other = 1; other < kGroups; ++other) add(sum, sums[other][lane]);
      const int64_t at = sequence * matrix + element;
      if (gradient) {
        const float4 z = *reinterpret_cast<const float4*>(p.state + at);
        const float scale = scale_of(p, sequence, sources);
        with_activation(p.state_activation, [&](auto phi) {
          sum[0] = state_gradient(phi, scale, z.x, sum[0]), sum[1] = state_gradient(phi, scale, z.y, sum[1]);
          sum[2] = state_gradient(phi, scale, z.z, sum[2]), sum[3] = state_gradient(phi, scale, z.w, sum[3]);
        });
        if (p.grad_state != nullptr) add(sum, *reinterpret_cast<const float4*>(p.grad_state + at));
      }
      float* to = (gradient ? p.grad_state_out : p.state_out) + at;
      __stcg(reinterpret_cast<float4*>(to), float4{sum[0], sum[1], sum[2], sum[3]});
    }
    __syncthreads();
  }
}

}  // namespace

int launch_reduce(const QlaParams& params, bool gradient, Stream stream) {
  const int64_t matrix = params.heads * params.d * params.e;
  if (most_slots(params) * matrix == 0) return cudaSuccess;
  const dim3 blocks(static_cast<unsigned>(ceil_div(matrix, kElements)),
                    static_cast<unsigned>(params.batch < 65535 ? params.batch : 65535));
  qla_reduce<<<blocks, kGroups * 32, 0, static_cast<cudaStream_t>(stream)>>>(params, gradient);
  return cudaGetLastError();
}

}  // namespace vista::cuda
