// C = A B^T for row-major bf16 A (m x k) and B (n x k), float C: a 64 x 64 tile per block of 4 warps, two stages of
// cp.async, ldmatrix from XOR-swizzled shared memory, mma.sync. m and n are multiples of 8, k of 32.
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int kTile = 64, kDepth = 32, kThreads = 128;
constexpr int kChunks = kDepth / 8;  // 16-byte pieces of a row
constexpr int kStage = kTile * kDepth;

// Rows are 64 bytes, two to a line of all 32 banks: the row's upper bits choose the piece.
__device__ int swizzled(int row, int chunk) {
#ifdef PLAIN_ROWS
  return row * kDepth + chunk * 8;
#else
  return row * kDepth + ((chunk ^ (row >> 1)) & (kChunks - 1)) * 8;
#endif
}

__device__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ void copy_async(const void* target, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(target)), "l"(source),
               "r"(valid ? 16 : 0));
}

__device__ void load_matrices(uint32_t (&out)[4], const void* source) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
               : "r"(shared_address(source)));
}

__device__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ void load_tile(__nv_bfloat16* target, const __nv_bfloat16* source, int rows, int first, int k, int column) {
  for (int i = threadIdx.x; i < kTile * kChunks; i += kThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = first + row < rows;
    copy_async(target + swizzled(row, chunk),
               source + (valid ? static_cast<int64_t>(first + row) * k + column + chunk * 8 : 0), valid);
  }
}

__global__ void __launch_bounds__(kThreads)
    tile_gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  extern __shared__ __align__(128) unsigned char shared[];
  auto* tile_a = reinterpret_cast<__nv_bfloat16*>(shared);
  auto* tile_b = tile_a + 2 * kStage;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.x * kTile, first_column = blockIdx.y * kTile;
  float sums[8][4] = {};

  const int steps = k / kDepth;
  load_tile(tile_a, a, m, first_row, k, 0);
  load_tile(tile_b, b, n, first_column, k, 0);
  asm volatile("cp.async.commit_group;");
  for (int step = 0; step < steps; ++step) {
    const int stage = step & 1;
    if (step + 1 < steps) {
      load_tile(tile_a + (stage ^ 1) * kStage, a, m, first_row, k, (step + 1) * kDepth);
      load_tile(tile_b + (stage ^ 1) * kStage, b, n, first_column, k, (step + 1) * kDepth);
    }
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
#pragma unroll
    for (int inner = 0; inner < kDepth / 16; ++inner) {
      uint32_t left[4], right[4];
      load_matrices(left, tile_a + stage * kStage + swizzled(warp * 16 + lane % 16, inner * 2 + lane / 16));
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        load_matrices(right, tile_b + stage * kStage + swizzled(pair * 16 + lane % 16, inner * 2 + lane / 16));
        multiply(sums[2 * pair], left, right[0], right[2]);
        multiply(sums[2 * pair + 1], left, right[1], right[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int block = 0; block < 8; ++block) {
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + warp * 16 + lane / 4 + 8 * (i / 2);
      const int column = first_column + block * 8 + lane % 4 * 2 + i % 2;
      if (row < m && column < n) c[static_cast<int64_t>(row) * n + column] = sums[block][i];
    }
  }
}

}  // namespace

extern "C" int run_tile_gemm(const __nv_bfloat16* a, const __nv_bfloat16* b, float* c, int m, int n, int k) {
  constexpr int bytes = 4 * kStage * sizeof(__nv_bfloat16);
  tile_gemm<<<dim3((m + kTile - 1) / kTile, (n + kTile - 1) / kTile), kThreads, bytes>>>(a, b, c, m, n, k);
  return cudaGetLastError();
}
