// The pass of ../apply_backward.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A warpgroup makes 64 columns of queries anew and gets as many of dO with each tile. dQ = phi1'(Q) * (dO P^T) needs no
// more; for W = phi1(Q)^T dO the queries go to shared memory row by row, where both operands are read across. That
// product runs on under the next tile's.
#include "../parts.h"
#include "matrices.cuh"

namespace vista::cuda::sm90 {
namespace {

constexpr int kStages = 8, kGrads = 2;
constexpr int kColumns = 64;               // of a warpgroup
constexpr int kQueries = kTileRows * 128;  // bytes of a warpgroup's tile of queries, or of dO
constexpr int kGradBytes = kConsumers * kQueries;
constexpr int kFixedBytes =
    kStages * kPanel + kGrads * kGradBytes + kConsumers * (kQueries + kMatrix + 4 * kRowsOfWarp);

struct ApplyBackwardMaps {
  CUtensorMap x, weight_q, grad_out;
};

// The producer's loop: a tile of dO before the panels of x.
__device__ void bring_tiles(const ApplyBackwardMaps& maps, const Work& w, int column, int panels, uint8_t* stages,
                            uint8_t* grad_stages, Barriers<kStages>& here, Ring<kGrads>& grads) {
  Turn<kStages> turn;
  Turn<kGrads> grad_turn;
  for (int begin = 0; begin < w.rows; begin += kTileRows, grad_turn.next()) {
    const int row = static_cast<int>(w.begin) + begin;
    grads.acquire(grad_turn, kGradBytes);
    for (int i = 0; i < kConsumers; ++i)
      load_tile(grad_stages + grad_turn.stage * kGradBytes + i * kQueries, maps.grad_out, row, column + i * kColumns,
                grads.full[grad_turn.stage]);
    bring_tile(maps.x, row, panels, stages, here, turn);
  }
}

// Zeros for the rows of a tile that belong to the next sequence, by a warpgroup: a product adds them up.
__device__ void clear_rows(uint8_t* tile, int from) {
  for (int i = from * 8 + threadIdx.x % 128; i < kTileRows * 8; i += 128)
    *reinterpret_cast<uint4*>(tile + i * 16) = uint4{0, 0, 0, 0};
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    projected_qla_apply_backward(const __grid_constant__ ApplyBackwardMaps maps, const ProjectedQlaParams p) {
  constexpr int kHeads = kColumns / D;  // of a warpgroup
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barriers<kStages> here;
  __shared__ Ring<kGrads> grads;
  Work w;
  if (!find_heads<kHeads>(p.qla, w)) return;
  const int64_t left = (p.qla.heads - w.head) * D;  // columns that exist from the block's first on
  T* grad_q = static_cast<T*>(p.qla.grad_q);
  if (w.padding)
    return zero_rows<T>(grad_q, p.qla, w, 0, w.rows, D, 0, left < kConsumers * kColumns ? left : kConsumers * kColumns);
  const int panels = panels_of(p), warpgroup = threadIdx.x / 128;
  uint8_t* grad_stages = shared + kStages * kPanel;
  uint8_t* queries = grad_stages + kGrads * kGradBytes;
  uint8_t* matrices = queries + kConsumers * kQueries;
  uint8_t* weights = shared + kFixedBytes;
  if (threadIdx.x == 0) grads.init(kConsumers * 4);
  here.init();

  if (warpgroup == kConsumers) {
    keep_registers<40>();
    if (threadIdx.x != kConsumerThreads || w.rows == 0) return;
    here.weights.arrive_expecting(kConsumers * panels * kColumns * 128);
    for (int panel = 0; panel < kConsumers * panels; ++panel)
      load_tile(weights + panel * kColumns * 128, maps.weight_q, w.head * D + panel / panels * kColumns,
                panel % panels * kBoxColumns, here.weights);
    return bring_tiles(maps, w, w.head * D, panels, shared, grad_stages, here, grads);
  }

  claim_registers<232>();
  const int warp = threadIdx.x / 32;
  uint8_t* corner = matrices + kConsumers * kMatrix + warp * kRowsOfWarp;
  const uint8_t* matrix = matrices + warpgroup * kMatrix;
  queries += warpgroup * kQueries;
  if (w.rows > 0) {
    make_matrices<T, D, kConsumers>(matrices, p.qla, w, false);
    here.weights.wait(0);
  }
  w.head += warpgroup * kHeads;
  const int64_t stride = p.qla.heads * D;
  T* to = rows_at(grad_q, p.qla, w.begin + warp % 4 * 16, w.head, D);
  Consumer<T, kStages, kColumns> consumer{p, here, shared, weights + warpgroup * panels * kColumns * 128, panels};
  const int row = consumer.row, column = lane_id() % 4 * 2;
  Accumulator<kColumns> acc, of_queries;
  Accumulator<64> sum;
  clear<kColumns>(acc);
  clear<kColumns>(of_queries);
  clear<64>(sum);
  Turn<kGrads> turn;
  for (int begin = 0; begin < w.rows; begin += kTileRows, turn.next()) {
    float factors[2];
    consumer.multiply_tile(acc, factors);
    wait_products<0>(sum);  // nobody reads queries or the last tile of dO any more
    if (begin > 0) {
      __syncwarp();
      if (lane_id() == 0) grads.empty[turn.stage ^ 1].arrive();
    }
    with_activation(p.qla.activation, [&](auto phi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = begin + row + 8 * half < w.rows;
#pragma unroll
        for (int j = 0; j < kColumns / 8; ++j) {
          float* q = acc[j] + 2 * half;
          float2 query{factors[half] * q[0], factors[half] * q[1]};
          q[0] = factors[half] * phi.template slope<T>(query.x);
          q[1] = factors[half] * phi.template slope<T>(query.y);
          put_pair<T>(queries, row + 8 * half, 8 * j + column, exists ? query.x : 0.f, exists ? query.y : 0.f);
        }
      }
    });
    uint8_t* grad = grad_stages + turn.stage * kGradBytes + warpgroup * kQueries;
    grads.full[turn.stage].wait(turn.parity);
    if (w.rows - begin < kTileRows) clear_rows(grad, w.rows - begin);
    publish_stores();
    sync_some(1 + warpgroup, 128);
    begin_products(of_queries, sum);
    multiply<T, 64>(of_queries, Operand<Major::kK, kTileRows>(grad), Operand<Major::kK, 64>(matrix), false);
    commit_products();
    multiply<T, kTileRows>(sum, Operand<Major::kMN, kTileRows>(queries), Operand<Major::kMN, kTileRows>(grad), true);
    commit_products();
    wait_products<1>(of_queries);
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) of_queries[j][i] *= acc[j][i];
    write_result<T>(corner, of_queries, to + begin * stride, stride, w.rows - begin - warp % 4 * 16,
                    left - warpgroup * kColumns);
  }
  wait_products<0>(sum);
  store_sums<D>(p.qla, w, sum, true);
}

template <class T, int D>
int launch(const ProjectedQlaParams& p, Stream stream) {
  ApplyBackwardMaps maps;
  const int64_t inner = p.qla.heads * p.qla.d;
  for (cudaError_t error : {encode_rows(maps.x, p), encode_weight(maps.weight_q, p, p.weight_q, kColumns),
                            encode(maps.grad_out, {p.qla.grad_out, p.qla.dtype, p.qla.total, inner, inner}, kTileRows)})
    if (error != cudaSuccess) return error;
  return launch_blocks<kColumns / D>(projected_qla_apply_backward<T, D>, maps, kFixedBytes, p, stream, kColumns * 128);
}

}  // namespace

int launch_projected_qla_apply_backward(const ProjectedQlaParams& p, Stream stream) {
  return dispatch_sm90(p, [&](auto element, auto dim) { return launch<decltype(element), dim.value>(p, stream); });
}

}  // namespace vista::cuda::sm90
