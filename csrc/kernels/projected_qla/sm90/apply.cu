// The pass of ../apply.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A warpgroup has 128 columns of queries: two heads of 64 or four of 32. Activated and rounded in registers, 64 of them
// are the left operand of the product with the P of a head, or of two on the diagonal of a matrix of 64. Each warp
// writes its own 16 rows, 128 bytes of each at a time.
#include "../parts.h"
#include "matrices.cuh"

namespace vista::cuda::sm90 {
namespace {

constexpr int kStages = 6;
constexpr int kMatrices = kConsumers * kOwnColumns / 64;  // of a block
constexpr int kFixedBytes = kStages * kPanel + kMatrices * kMatrix + kConsumers * 4 * kRowsOfWarp;

struct ApplyMaps {
  CUtensorMap x, weight_q;
};

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    projected_qla_apply(const __grid_constant__ ApplyMaps maps, const ProjectedQlaParams p) {
  constexpr int kHeads = kOwnColumns / D;  // of a warpgroup
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barriers<kStages> here;
  Work w;
  if (!find_heads<kHeads>(p.qla, w)) return;
  const int64_t left = (p.qla.heads - w.head) * D;  // columns that exist from the block's first on
  T* out = static_cast<T*>(p.qla.out);
  if (w.padding)
    return zero_rows<T>(out, p.qla, w, 0, w.rows, D, 0,
                        left < kConsumers * kOwnColumns ? left : kConsumers * kOwnColumns);
  if (w.rows == 0) return;
  const int panels = panels_of(p), warpgroup = threadIdx.x / 128;
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
  make_matrices<T, D, kMatrices>(matrices, p.qla, w, false);
  const int warp = threadIdx.x / 32;
  uint8_t* corner = matrices + kMatrices * kMatrix + warp * kRowsOfWarp;
  matrices += warpgroup * (kOwnColumns / 64) * kMatrix;
  const int64_t stride = p.qla.heads * D;
  T* to = rows_at(out, p.qla, w.begin + warp % 4 * 16, w.head + warpgroup * kHeads, D);
  Consumer<T, kStages, kOwnColumns> consumer{p, here, shared, weights + warpgroup * panels * kWeightPanel, panels};
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
  ApplyMaps maps;
  for (cudaError_t error : {encode_rows(maps.x, p), encode_weight(maps.weight_q, p, p.weight_q, kOwnColumns)})
    if (error != cudaSuccess) return error;
  return launch_blocks<kOwnColumns / D>(projected_qla_apply<T, D>, maps, kFixedBytes, p, stream);
}

}  // namespace

int launch_projected_qla_apply(const ProjectedQlaParams& p, Stream stream) {
  return dispatch_sm90(p, [&](auto element, auto dim) { return launch<decltype(element), dim.value>(p, stream); });
}

}  // namespace vista::cuda::sm90
