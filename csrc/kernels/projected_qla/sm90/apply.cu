// The pass of ../apply.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A warpgroup has 128 columns of queries: two heads of 64 or four of 32. Activated and rounded in registers, 64 of them
// are the left operand of the product with the P of a head, or of two on the diagonal of a matrix of 64. Each warp
// writes its own 16 rows, 128 bytes of each at a time.
#include "../parts.h"
#include "projection.cuh"

namespace vista::cuda::sm90 {
namespace {

constexpr int kStages = 6;
constexpr int kMatrix = 64 * 128;                         // bytes of P for 64 columns
constexpr int kMatrices = kConsumers * kOwnColumns / 64;  // of a block
constexpr int kRowsOfWarp = 16 * 128;                     // bytes of results on their way out
constexpr int kFixedBytes = kStages * kPanel + kMatrices * kMatrix + kConsumers * 4 * kRowsOfWarp;

struct ApplyMaps {
  CUtensorMap x, weight_q;
};

// P of the block's heads, by the consumers: zeros beside the diagonal and for heads that are not there.
template <class T, int D>
__device__ void make_matrices(uint8_t* matrices, const QlaParams& p, const Work& w) {
  with_activation(p.state_activation, [&](auto phi) {
    for (int i = threadIdx.x; i < kMatrices * 64 * 16; i += kConsumerThreads) {
      const int matrix = i / (64 * 16), row = i / 16 % 64, column = i % 16 * 4;
      const int head = w.head + matrix * (64 / D) + row / D;
      float x[4] = {0.f, 0.f, 0.f, 0.f};
      if (row / D == column / D && head < p.heads) {
        const int64_t at = ((static_cast<int64_t>(w.sequence) * p.heads + head) * D + row % D) * D + column % D;
        const float4 z = *reinterpret_cast<const float4*>(p.state + at);
        x[0] = w.scale * z.x, x[1] = w.scale * z.y, x[2] = w.scale * z.z, x[3] = w.scale * z.w;
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
__device__ void write_result(uint8_t* corner, const Accumulator<64>& result, T* to, int64_t stride, int rows,
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

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    projected_qla_apply(const __grid_constant__ ApplyMaps maps, const ProjectedQlaParams p) {
  constexpr int kHeads = kOwnColumns / D;  // of a warpgroup
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barriers<kStages> here;
  Work w;
  const int64_t groups = ceil_div(p.qla.heads, kConsumers * kHeads);
  if (!find_item(p.qla, static_cast<int32_t>(blockIdx.x / groups), w)) return;
  w.head = static_cast<int>(blockIdx.x % groups) * kConsumers * kHeads;
  const int64_t left = (p.qla.heads - w.head) * D;  // columns that exist from the block's first on
  T* out = static_cast<T*>(p.qla.out);
  if (w.padding)
    return zero_rows<T>(out, p.qla, w, 0, w.rows, D, 0,
                        left < kConsumers * kOwnColumns ? left : kConsumers * kOwnColumns);
  if (w.rows == 0) return;
  const int panels = static_cast<int>(ceil_div(p.dim, kBoxColumns)), warpgroup = threadIdx.x / 128;
  uint8_t *matrices = shared + kStages * kPanel, *weights = shared + kFixedBytes;
  here.init();

  if (warpgroup == kConsumers) {
    keep_registers<40>();
    if (threadIdx.x != kConsumerThreads) return;
    here.weights.arrive_expecting(kConsumers * panels * kWeightPanel);
    for (int panel = 0; panel < kConsumers * panels; ++panel)
      load_tile(weights + panel * kWeightPanel, maps.weight_q, w.head * D + panel / panels * kOwnColumns,
                panel % panels * kBoxColumns, here.weights);
    return bring_rows(maps.x, w, panels, shared, here);
  }

  claim_registers<232>();
  make_matrices<T, D>(matrices, p.qla, w);
  const int warp = threadIdx.x / 32;
  uint8_t* corner = matrices + kMatrices * kMatrix + warp * kRowsOfWarp;
  matrices += warpgroup * (kOwnColumns / 64) * kMatrix;
  const int64_t stride = p.qla.heads * D;
  T* to = rows_at(out, p.qla, w.begin + warp % 4 * 16, w.head + warpgroup * kHeads, D);
  Consumer<T, kStages> consumer{p, here, shared, weights + warpgroup * panels * kWeightPanel, panels};
  Accumulator<kOwnColumns> acc;
  clear<kOwnColumns>(acc);
  here.weights.wait(0);
  for (int begin = 0; begin < w.rows; begin += kTileRows) {
    float factors[2];
    consumer.multiply_tile(acc, factors);
    Fragment queries[kOwnColumns / 16];
    with_activation(p.qla.activation, [&](auto phi) {
#pragma unroll
      for (int j = 0; j < kOwnColumns / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          queries[j / 2][j % 2 * 2 + half] = pack2(phi.template value<T>(factors[half] * acc[j][2 * half]),
                                                   phi.template value<T>(factors[half] * acc[j][2 * half + 1]), T{});
    });
#pragma unroll
    for (int part = 0; part < kOwnColumns / 64; ++part) {
      Accumulator<64> result;
      clear<64>(result);
      Fragment own[4];
#pragma unroll
      for (int k = 0; k < 4; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) own[k][i] = queries[4 * part + k][i];
      begin_products(result);
      multiply<T>(result, own, Operand<Major::kMN, 64>(matrices + part * kMatrix), false);
      commit_products();
      wait_products<0>(result);
      write_result<T>(corner, result, to + begin * stride + part * 64, stride, w.rows - begin - warp % 4 * 16,
                      left - warpgroup * kOwnColumns - part * 64);
    }
  }
}

template <class T, int D>
int launch(const ProjectedQlaParams& p, Stream stream) {
  const int64_t blocks = most_items(p.qla) * ceil_div(p.qla.heads, kConsumers * kOwnColumns / D);
  check_blocks(p, blocks);
  const int bytes = kFixedBytes + kConsumers * panels_of(p) * kWeightPanel;
  ApplyMaps maps;
  for (cudaError_t error : {encode_rows(maps.x, p), encode_weight(maps.weight_q, p, p.weight_q, kOwnColumns),
                            allow_shared(projected_qla_apply<T, D>, bytes)})
    if (error != cudaSuccess) return error;
  projected_qla_apply<T, D>
      <<<static_cast<unsigned>(blocks), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace

int launch_projected_qla_apply(const ProjectedQlaParams& p, Stream stream) {
  return dispatch_sm90(p, [&](auto element, auto dim) { return launch<decltype(element), dim.value>(p, stream); });
}

}  // namespace vista::cuda::sm90
