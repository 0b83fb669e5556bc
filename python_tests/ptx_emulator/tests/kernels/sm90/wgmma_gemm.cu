// What the primitives of common/sm90 are tried on.
//
// gemm: C = A B^T in float for bf16 or fp16 A (m x k) and B (n x k), each stored along k or along m and n. One producer
// thread, two consumer warpgroups of 64 rows, a ring of three stages.
// chain: C = T(A B^T) D, where the first product's accumulators become the second's A operand. A [64][k], B [64][k],
// D [64][n].
// copy: a matrix, by TMA loads and stores.
#include <stdexcept>

#include "kernels/common/sm90/tensor_map.h"
#include "kernels/common/sm90/tma.cuh"
#include "kernels/common/sm90/wgmma.cuh"
#include "vista/cuda/launch.h"

using namespace vista;
using namespace vista::cuda;
using namespace vista::cuda::sm90;

namespace {

constexpr int kDepth = 64, kStages = 3, kPanel = 64 * 128;

template <Major kMajor, int kExtent>
__device__ void load_operand(uint8_t* tile, const CUtensorMap& map, int first, int k, Barrier& done) {
  if constexpr (kMajor == Major::kK) {
    load_tile(tile, map, first, k, done);
  } else {
    for (int panel = 0; panel < kExtent / 64; ++panel)
      load_tile(tile + panel * kPanel, map, k, first + panel * 64, done);
  }
}

template <Major kMajor, int kExtent>
constexpr int kLines = kMajor == Major::kK ? kExtent : kDepth;

template <int N>
__device__ void write_rows(float* c, const Accumulator<N>& acc, int row, int column, int m, int n) {
  const int first = row + threadIdx.x % 128 / 32 * 16 + lane_id() / 4;
  for (int j = 0; j < N / 8; ++j)
    for (int i = 0; i < 4; ++i) {
      const int r = first + i / 2 * 8, q = column + 8 * j + lane_id() % 4 * 2 + i % 2;
      if (r < m && q < n) c[static_cast<int64_t>(r) * n + q] = acc[j][i];
    }
}

template <class T, int N, Major kMajorA, Major kMajorB>
__global__ void __launch_bounds__(384, 1)
    gemm(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b, float* c, int m, int n,
         int k) {
  constexpr int kBytesA = 128 * 128, kBytes = kBytesA + N * 128;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Ring<kStages> ring;
  const int warpgroup = threadIdx.x / 128, row = blockIdx.x * 128, column = blockIdx.y * N;
  const int steps = (k + kDepth - 1) / kDepth;
  if (threadIdx.x == 0) {
    ring.init(2);
    publish_barriers();
  }
  __syncthreads();

  Turn<kStages> turn;
  if (warpgroup == 2) {
    keep_registers<40>();
    if (threadIdx.x == 256) {
      prefetch(map_a);
      for (int step = 0; step < steps; ++step, turn.next()) {
        uint8_t* stage = shared + turn.stage * kBytes;
        ring.acquire(turn, kBytes);
        load_operand<kMajorA, 128>(stage, map_a, row, step * kDepth, ring.full[turn.stage]);
        load_operand<kMajorB, N>(stage + kBytesA, map_b, column, step * kDepth, ring.full[turn.stage]);
      }
    }
    return;
  }
  claim_registers<232>();
  Accumulator<N> acc;
  clear<N>(acc);
  int release = 0;
  for (int step = 0; step < steps; ++step, turn.next()) {
    const uint8_t* stage = shared + turn.stage * kBytes;
    ring.full[turn.stage].wait(turn.parity);
    begin_products(acc);
    multiply<T, kDepth>(acc, Operand<kMajorA, kLines<kMajorA, 128>>(stage + warpgroup * kPanel),
                        Operand<kMajorB, kLines<kMajorB, N>>(stage + kBytesA), true);
    commit_products();
    wait_products<1>();
    if (step > 0 && threadIdx.x % 128 == 0) ring.empty[release].arrive();
    release = turn.stage;
  }
  wait_products<0>(acc);
  write_rows<N>(c, acc, row + warpgroup * 64, column, m, n);
}

template <class T, int N>
__global__ void __launch_bounds__(128, 1)
    chain(const __grid_constant__ CUtensorMap map_a, const __grid_constant__ CUtensorMap map_b,
          const __grid_constant__ CUtensorMap map_d, float* c, int m, int n) {
  extern __shared__ __align__(1024) uint8_t shared[];
  uint8_t *a = shared, *b = a + kPanel, *d = b + kPanel;
  __shared__ Barrier loaded;
  if (threadIdx.x == 0) {
    loaded.init(1);
    publish_barriers();
    loaded.arrive_expecting(2 * kPanel + N * 128);
    load_tile(a, map_a, 0, 0, loaded);
    load_tile(b, map_b, 0, 0, loaded);
    for (int panel = 0; panel < N / 64; ++panel) load_tile(d + panel * kPanel, map_d, 0, panel * 64, loaded);
  }
  __syncthreads();
  loaded.wait(0);
  Accumulator<64> first;
  begin_products(first);
  multiply<T, 64>(first, Operand<Major::kK, 64>(a), Operand<Major::kK, 64>(b), false);
  commit_products();
  wait_products<0>(first);
  Fragment rounded[4];
  for (int k = 0; k < 4; ++k) to_fragment<T>(rounded[k], first, k);
  Accumulator<N> acc;
  begin_products(acc);
  multiply<T>(acc, rounded, Operand<Major::kMN, 64>(d), false);
  commit_products();
  wait_products<0>(acc);
  write_rows<N>(c, acc, 0, 0, m, n);
}

__global__ void __launch_bounds__(128, 1)
    copy(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to) {
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barrier loaded;
  const int row = blockIdx.x * 64, column = blockIdx.y * 64;
  if (threadIdx.x == 0) {
    loaded.init(1);
    publish_barriers();
    loaded.arrive_expecting(kPanel);
    load_tile(shared, from, row, column, loaded);
  }
  __syncthreads();
  loaded.wait(0);
  uint8_t* copied = shared + kPanel;
  for (int i = threadIdx.x; i < 64 * 64; i += 128) {
    const int place = swizzled(i / 64, i % 64);
    *reinterpret_cast<uint16_t*>(copied + place) = *reinterpret_cast<const uint16_t*>(shared + place);
  }
  publish_stores();
  __syncthreads();
  if (threadIdx.x == 0) {
    store_tile(to, row, column, copied);
    commit_stores();
    wait_stores_read<0>();
  }
}

CUtensorMap map(const void* data, DType dtype, int64_t rows, int64_t columns, int box_rows) {
  CUtensorMap result;
  if (encode(result, {data, dtype, rows, columns, columns}, box_rows) != cudaSuccess)
    throw std::runtime_error("no tensor map");
  return result;
}

template <class T, int N, Major kMajorA, Major kMajorB>
int run_gemm(const void* a, const void* b, float* c, int m, int n, int k, DType dtype) {
  const auto operand = [&](Major major, const void* data, int extent, int tile) {
    return major == Major::kK ? map(data, dtype, extent, k, tile) : map(data, dtype, k, extent, kDepth);
  };
  constexpr int bytes = kStages * (128 + N) * 128;
  auto kernel = gemm<T, N, kMajorA, kMajorB>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  kernel<<<dim3((m + 127) / 128, (n + N - 1) / N), 384, bytes>>>(operand(kMajorA, a, m, 128), operand(kMajorB, b, n, N),
                                                                 c, m, n, k);
  return cudaGetLastError();
}

template <class T, int N>
int run_chain(const void* a, const void* b, const void* d, float* c, int m, int n, int k, DType dtype) {
  constexpr int bytes = (2 + N / 64) * kPanel;
  cudaFuncSetAttribute(chain<T, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  chain<T, N><<<1, 128, bytes>>>(map(a, dtype, m, k, 64), map(b, dtype, 64, k, 64), map(d, dtype, 64, n, 64), c, m, n);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

// majors: bit 0 for an A stored along m, bit 1 for a B stored along n.
int run_wgmma_gemm(const void* a, const void* b, float* c, int m, int n, int k, int half, int majors) {
  constexpr Major kK = Major::kK, kMN = Major::kMN;
  if (half) return run_gemm<Half, 256, kK, kK>(a, b, c, m, n, k, DType::kHalf);
  switch (majors) {
    case 1: return run_gemm<BFloat16, 64, kMN, kK>(a, b, c, m, n, k, DType::kBFloat16);
    case 2: return run_gemm<BFloat16, 128, kK, kMN>(a, b, c, m, n, k, DType::kBFloat16);
    case 3: return run_gemm<BFloat16, 192, kMN, kMN>(a, b, c, m, n, k, DType::kBFloat16);
    default: return run_gemm<BFloat16, 128, kK, kK>(a, b, c, m, n, k, DType::kBFloat16);
  }
}

int run_wgmma_chain(const void* a, const void* b, const void* d, float* c, int m, int n, int k, int half) {
  return half ? run_chain<Half, 128>(a, b, d, c, m, n, k, DType::kHalf)
              : run_chain<BFloat16, 64>(a, b, d, c, m, n, k, DType::kBFloat16);
}

// -1: no tensor map for such a matrix.
int run_tma_copy(const void* from, void* to, int rows, int columns) try {
  copy<<<dim3((rows + 63) / 64, (columns + 63) / 64), 128, 2 * kPanel>>>(map(from, DType::kHalf, rows, columns, 64),
                                                                         map(to, DType::kHalf, rows, columns, 64));
  return cudaGetLastError();
} catch (const std::invalid_argument&) {
  return -1;
}

int is_sm90() { return device_is_sm90(); }

}  // extern "C"
