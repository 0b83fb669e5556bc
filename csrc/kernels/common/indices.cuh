// Index arrays on the device, and what plan kernels do with them.
#pragma once

#include <cuda_runtime.h>

#include "vista/cuda/launch.h"

namespace vista::cuda {

constexpr int kPlanThreads = 1024;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ inline int64_t index_at(const Indices& indices, int64_t i) {
  return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i] : static_cast<const int32_t*>(indices.data)[i];
}

// The largest i in [0, n) with is_before(i), which holds for 0 and never again once it fails. By the whole warp, 32
// probes a step.
template <class F>
__device__ inline int64_t last_before(int64_t n, F is_before) {
  int64_t low = 0;
  while (n > 1) {
    const int64_t step = ceil_div(n, 32), at = static_cast<int64_t>(threadIdx.x % 32) * step;
    const bool before = at < n && is_before(low + at);
    const int64_t skipped = (31 - __clz(__ballot_sync(0xffffffffu, before))) * step;
    low += skipped;
    n = n - skipped < step ? n - skipped : step;
  }
  return low;
}

// Exclusive sum over the block, of at most 1024 threads. A barrier must come before the next call.
__device__ inline uint64_t sum_before(uint64_t own) {
  __shared__ uint64_t warp_sums[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint64_t sum = own;
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t below = __shfl_up_sync(0xffffffffu, sum, step);
    if (lane >= step) sum += below;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  for (int w = 0; w < warp; ++w) sum += warp_sums[w];
  return sum - own;
}

}  // namespace vista::cuda
