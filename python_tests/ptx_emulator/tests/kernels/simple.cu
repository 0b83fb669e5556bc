// Small kernels of the kinds that the product has: a reduction, a scatter, a quantisation, and some that are wrong.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int kThreads = 128;

// One row of floats per block, summed: strided loads, shuffles, then the warps' sums through shared memory.
__global__ void __launch_bounds__(kThreads) row_sums(const float* x, float* sums, int columns) {
  __shared__ float of_warp[kThreads / 32];
  float sum = 0;
  for (int i = threadIdx.x; i < columns; i += kThreads) sum += x[static_cast<int64_t>(blockIdx.x) * columns + i];
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffff, sum, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) sum += of_warp[warp];
    sums[blockIdx.x] = sum;
  }
}

// How often each value occurs: in shared memory first, then added to the grid's counts.
__global__ void __launch_bounds__(kThreads) histogram(const int* values, int* counts, int n, int bins) {
  extern __shared__ int local[];
  for (int i = threadIdx.x; i < bins; i += kThreads) local[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < n; i += gridDim.x * kThreads) {
    if (values[i] < 0 || values[i] >= bins) asm volatile("trap;");
    atomicAdd(&local[values[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += kThreads) {
    if (local[i] != 0) atomicAdd(&counts[i], local[i]);
  }
}

// A warp per row of bf16: int8 by the row's largest magnitude.
__global__ void __launch_bounds__(kThreads)
    quantize(const __nv_bfloat16* x, int8_t* codes, float* scales, int rows, int columns) {
  const int row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= rows) return;
  const __nv_bfloat16* from = x + static_cast<int64_t>(row) * columns;
  float largest = 0;
  for (int i = lane; i < columns; i += 32) largest = fmaxf(largest, fabsf(__bfloat162float(from[i])));
  for (int offset = 16; offset > 0; offset /= 2) {
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffff, largest, offset));
  }
  const float scale = largest / 127;
  if (lane == 0) scales[row] = scale;
  for (int i = lane; i < columns; i += 32) {
    const float value = scale > 0 ? __bfloat162float(from[i]) / scale : 0;
    codes[static_cast<int64_t>(row) * columns + i] = static_cast<int8_t>(__float2int_rn(value));
  }
}

// y[target[i]] += x[i] without atomics: right only if no two blocks have the same target.
__global__ void __launch_bounds__(kThreads) scatter(const int* target, const int* x, int* y, int n) {
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < n) y[target[i]] += x[i];
}

// Wrong for every n but multiples of the block: the barrier is in a branch.
__global__ void __launch_bounds__(kThreads) torn_barrier(float* x, int n) {
  __shared__ float row[kThreads];
  if (threadIdx.x < n) {
    row[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = row[n - 1 - threadIdx.x];
  }
}

// Half of the warps wait for a barrier that the other half does not reach in time.
__global__ void __launch_bounds__(kThreads) crossed_barriers(int* x) {
  if (threadIdx.x < kThreads / 2) {
    asm volatile("bar.sync 1, 128;" ::: "memory");
    x[0] = 1;
  } else {
    asm volatile("bar.sync 2, 128;" ::: "memory");
    x[1] = 1;
  }
}

// Producer and consumer warps over named barriers: 1 is "full", 2 is "empty".
__global__ void __launch_bounds__(64) handover(const int* x, int* y, int rounds) {
  __shared__ int box[32];
  const int lane = threadIdx.x % 32;
  y += blockIdx.x * rounds * 32;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if (threadIdx.x < 32) {
      if (round > 0) asm volatile("bar.sync 2, 64;" ::: "memory");
      box[lane] = x[round * 32 + lane];
      asm volatile("bar.arrive 1, 64;" ::: "memory");
    } else {
      asm volatile("bar.sync 1, 64;" ::: "memory");
      y[round * 32 + lane] = box[31 - lane];
      if (round + 1 < rounds) asm volatile("bar.arrive 2, 64;" ::: "memory");
    }
  }
}

}  // namespace

extern "C" {
int run_row_sums(const float* x, float* sums, int rows, int columns) {
  row_sums<<<rows, kThreads>>>(x, sums, columns);
  return cudaGetLastError();
}
int run_histogram(const int* values, int* counts, int n, int bins, int blocks) {
  int error = cudaMemsetAsync(counts, 0, bins * sizeof(int));
  histogram<<<blocks, kThreads, bins * sizeof(int)>>>(values, counts, n, bins);
  return error != 0 ? error : cudaGetLastError();
}
int run_quantize(const __nv_bfloat16* x, int8_t* codes, float* scales, int rows, int columns) {
  quantize<<<(rows + 3) / 4, kThreads>>>(x, codes, scales, rows, columns);
  return cudaGetLastError();
}
int run_scatter(const int* target, const int* x, int* y, int n) {
  scatter<<<(n + kThreads - 1) / kThreads, kThreads>>>(target, x, y, n);
  return cudaGetLastError();
}
int run_torn_barrier(float* x, int n) {
  torn_barrier<<<1, kThreads>>>(x, n);
  return cudaGetLastError();
}
int run_crossed_barriers(int* x) {
  crossed_barriers<<<1, kThreads>>>(x);
  return cudaGetLastError();
}
int run_handover(const int* x, int* y, int rounds) {
  handover<<<2, 64>>>(x, y, rounds);
  return cudaGetLastError();
}
}
