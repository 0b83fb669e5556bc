// The pass of ../state.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A warpgroup has 64 columns of keys and as many of values, one head of 64 or two of 32, from one product. Activated
// and rounded they go to shared memory row by row, where the second product reads keys across: Z of a head of 64, or,
// on its diagonal, of two of 32. It runs on while the next tile is multiplied.
#include "../parts.h"
#include "projection.cuh"

namespace vista::cuda::sm90 {
namespace {

constexpr int kStages = 8;
constexpr int kKeys = kTileRows * 128;                                  // bytes of a tile's keys, or values
constexpr int kFixedBytes = kStages * kPanel + kConsumers * 2 * kKeys;  // beside the weights

struct StateMaps {
  CUtensorMap x, weight_k, weight_v;
};

// The 64 x 64 sum of a warpgroup as the states of its heads.
template <int D>
__device__ void store_states(const QlaParams& p, Work w, const Accumulator<64>& sum) {
  const int row = threadIdx.x % 128 / 32 * 16;
  w.head += row / D;
  if (w.head >= p.heads) return;
  if constexpr (D == 64) {
    store_sum<64>(p, w, sum, false, row, 0);
  } else {
    Accumulator<32> own;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) own[j][i] = row < 32 ? sum[j][i] : sum[j + 4][i];
    store_sum<32>(p, w, own, false, row % 32, 0);
  }
}

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    projected_qla_state(const __grid_constant__ StateMaps maps, const ProjectedQlaParams p) {
  constexpr int kHeads = 64 / D;  // of a warpgroup
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barriers<kStages> here;
  Work w;
  const int64_t groups = ceil_div(p.qla.heads, kConsumers * kHeads);
  if (!find_item(p.qla, static_cast<int32_t>(blockIdx.x / groups), w) || w.padding) return;
  w.head = static_cast<int>(blockIdx.x % groups) * kConsumers * kHeads;
  const int panels = static_cast<int>(ceil_div(p.dim, kBoxColumns)), warpgroup = threadIdx.x / 128;
  uint8_t *keys = shared + kStages * kPanel, *weights = shared + kFixedBytes;
  here.init();

  if (warpgroup == kConsumers) {
    keep_registers<40>();
    if (threadIdx.x != kConsumerThreads || w.rows == 0) return;
    here.weights.arrive_expecting(kConsumers * panels * kWeightPanel);
    for (int panel = 0; panel < kConsumers * panels; ++panel) {
      uint8_t* to = weights + panel * kWeightPanel;
      const int row = w.head * D + panel / panels * 64, column = panel % panels * kBoxColumns;
      load_tile(to, maps.weight_k, row, column, here.weights);
      load_tile(to + 64 * 128, maps.weight_v, row, column, here.weights);
    }
    return bring_rows(maps.x, w, panels, shared, here);
  }

  claim_registers<232>();
  keys += warpgroup * 2 * kKeys;
  uint8_t* values = keys + kKeys;
  w.head += warpgroup * kHeads;
  Consumer<T, kStages> consumer{p, here, shared, weights + warpgroup * panels * kWeightPanel, panels};
  const int row = consumer.row, column = lane_id() % 4 * 2;
  Accumulator<64> sum;
  Accumulator<kOwnColumns> acc;
  clear<64>(sum);
  clear<kOwnColumns>(acc);
  if (w.rows > 0) here.weights.wait(0);
  for (int begin = 0; begin < w.rows; begin += kTileRows) {
    float factors[2];
    consumer.multiply_tile(acc, factors);
    wait_products<0>(sum);  // nobody reads keys and values any more
    with_activation(p.qla.activation, [&](auto phi) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const bool exists = begin + row + 8 * half < w.rows;
        const auto value = [&](float x) { return exists ? factors[half] * x : 0.f; };
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float *k = acc[j] + 2 * half, *v = acc[j + 8] + 2 * half;
          put_pair<T>(keys, row + 8 * half, 8 * j + column, phi.template value<T>(value(k[0])),
                      phi.template value<T>(value(k[1])));
          put_pair<T>(values, row + 8 * half, 8 * j + column, value(v[0]), value(v[1]));
        }
      }
    });
    publish_stores();
    sync_some(1 + warpgroup, 128);
    begin_products(sum);
    multiply<T, kTileRows>(sum, Operand<Major::kMN, kTileRows>(keys), Operand<Major::kMN, kTileRows>(values), true);
    commit_products();
  }
  wait_products<0>(sum);
  store_states<D>(p.qla, w, sum);
}

template <class T, int D>
int launch(const ProjectedQlaParams& p, Stream stream) {
  const int64_t blocks = most_items(p.qla) * ceil_div(p.qla.heads, kConsumers * 64 / D);
  check_blocks(p, blocks);
  const int bytes = kFixedBytes + kConsumers * panels_of(p) * kWeightPanel;
  StateMaps maps;
  for (cudaError_t error :
       {encode_rows(maps.x, p), encode_weight(maps.weight_k, p, p.weight_k, 64),
        encode_weight(maps.weight_v, p, p.weight_v, 64), allow_shared(projected_qla_state<T, D>, bytes)})
    if (error != cudaSuccess) return error;
  projected_qla_state<T, D>
      <<<static_cast<unsigned>(blocks), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(maps, p);
  return cudaGetLastError();
}

}  // namespace

int launch_projected_qla_state(const ProjectedQlaParams& p, Stream stream) {
  return dispatch_sm90(p, [&](auto element, auto dim) { return launch<decltype(element), dim.value>(p, stream); });
}

}  // namespace vista::cuda::sm90
