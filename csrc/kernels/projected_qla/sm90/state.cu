// The pass of ../state.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A warpgroup has 64 columns of keys and as many of values, one head of 64 or two of 32, from one product. Activated
// and rounded they go to shared memory row by row, where the second product reads keys across: Z of a head of 64, or,
// on its diagonal, of two of 32. It runs on while the next tile is multiplied.
#include "../parts.h"
#include "matrices.cuh"

namespace vista::cuda::sm90 {
namespace {

constexpr int kStages = 8;
constexpr int kKeys = kTileRows * 128;                                  // bytes of a tile's keys, or values
constexpr int kFixedBytes = kStages * kPanel + kConsumers * 2 * kKeys;  // beside the weights

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    projected_qla_state(const __grid_constant__ KeyValueMaps maps, const ProjectedQlaParams p) {
  constexpr int kHeads = 64 / D;  // of a warpgroup
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barriers<kStages> here;
  Work w;
  if (!find_heads<kHeads>(p.qla, w) || w.padding) return;
  const int panels = panels_of(p), warpgroup = threadIdx.x / 128;
  uint8_t *keys = shared + kStages * kPanel, *weights = shared + kFixedBytes;
  here.init();

  if (warpgroup == kConsumers) {
    keep_registers<40>();
    if (threadIdx.x != kConsumerThreads || w.rows == 0) return;
    bring_keys_and_values(maps, w.head * D, panels, weights, here);
    return bring_rows(maps.x, w, panels, shared, here);
  }

  claim_registers<232>();
  keys += warpgroup * 2 * kKeys;
  uint8_t* values = keys + kKeys;
  w.head += warpgroup * kHeads;
  Consumer<T, kStages, kOwnColumns> consumer{p, here, shared, weights + warpgroup * panels * kWeightPanel, panels};
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
  store_sums<D>(p.qla, w, sum, false);
}

template <class T, int D>
int launch(const ProjectedQlaParams& p, Stream stream) {
  return launch_keys_and_values<64 / D>(projected_qla_state<T, D>, kFixedBytes, p, stream);
}

}  // namespace

int launch_projected_qla_state(const ProjectedQlaParams& p, Stream stream) {
  return dispatch_sm90(p, [&](auto element, auto dim) { return launch<decltype(element), dim.value>(p, stream); });
}

}  // namespace vista::cuda::sm90
