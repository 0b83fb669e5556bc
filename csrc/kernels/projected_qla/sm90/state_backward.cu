// The pass of ../state_backward.cu for compute capability 9.0: wgmma, operands by TMA.
//
// A warpgroup makes 64 columns of keys and of values anew, as in state.cu. Both stay in registers, where they are the
// left operands of the products with dZ: dV = phi1(K) dZ reads it across, dK = phi1'(K) * (V dZ^T) along.
#include "../parts.h"
#include "matrices.cuh"

namespace vista::cuda::sm90 {
namespace {

constexpr int kStages = 8;
constexpr int kFixedBytes = kStages * kPanel + kConsumers * (kMatrix + 4 * kRowsOfWarp);  // beside the weights

template <class T, int D>
__global__ void __launch_bounds__(kThreads, 1)
    projected_qla_state_backward(const __grid_constant__ KeyValueMaps maps, const ProjectedQlaParams p) {
  constexpr int kHeads = 64 / D;  // of a warpgroup
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ Barriers<kStages> here;
  Work w;
  if (!find_heads<kHeads>(p.qla, w)) return;
  const int64_t left = (p.qla.heads - w.head) * D;  // columns that exist from the block's first on
  T *grad_k = static_cast<T*>(p.qla.grad_k), *grad_v = static_cast<T*>(p.qla.grad_v);
  if (w.padding) {
    const int64_t columns = left < kConsumers * 64 ? left : kConsumers * 64;
    zero_rows<T>(grad_k, p.qla, w, 0, w.rows, D, 0, columns);
    return zero_rows<T>(grad_v, p.qla, w, 0, w.rows, D, 0, columns);
  }
  if (w.rows == 0) return;
  const int panels = panels_of(p), warpgroup = threadIdx.x / 128;
  uint8_t *matrices = shared + kStages * kPanel, *weights = shared + kFixedBytes;
  here.init();

  if (warpgroup == kConsumers) {
    keep_registers<40>();
    if (threadIdx.x != kConsumerThreads) return;
    bring_keys_and_values(maps, w.head * D, panels, weights, here);
    return bring_rows(maps.x, w, panels, shared, here);
  }

  claim_registers<232>();
  make_matrices<T, D, kConsumers>(matrices, p.qla, w, true);
  const int warp = threadIdx.x / 32;
  uint8_t* corner = matrices + kConsumers * kMatrix + warp * kRowsOfWarp;
  const uint8_t* matrix = matrices + warpgroup * kMatrix;
  const int64_t stride = p.qla.heads * D;
  const int64_t first = w.begin + warp % 4 * 16;
  T* to_k = rows_at(grad_k, p.qla, first, w.head + warpgroup * kHeads, D);
  T* to_v = rows_at(grad_v, p.qla, first, w.head + warpgroup * kHeads, D);
  Consumer<T, kStages, kOwnColumns> consumer{p, here, shared, weights + warpgroup * panels * kWeightPanel, panels};
  Accumulator<kOwnColumns> acc;
  clear<kOwnColumns>(acc);
  here.weights.wait(0);
  for (int begin = 0; begin < w.rows; begin += kTileRows) {
    float factors[2];
    consumer.multiply_tile(acc, factors);
    Fragment keys[4], values[4];
    // Of keys the slope times the factor stays.
    with_activation(p.qla.activation, [&](auto phi) {
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float *k = acc[j] + 2 * half, *v = acc[j + 8] + 2 * half;
          float2 key{factors[half] * k[0], factors[half] * k[1]};
          k[0] = factors[half] * phi.template slope<T>(key.x);
          k[1] = factors[half] * phi.template slope<T>(key.y);
          keys[j / 2][j % 2 * 2 + half] = pack2(key.x, key.y, T{});
          values[j / 2][j % 2 * 2 + half] = pack2(factors[half] * v[0], factors[half] * v[1], T{});
        }
    });
    Accumulator<64> of_keys, of_values;
    clear<64>(of_keys);
    clear<64>(of_values);
    begin_products(of_keys, of_values);
    multiply<T>(of_keys, values, Operand<Major::kK, 64>(matrix), false);
    multiply<T>(of_values, keys, Operand<Major::kMN, 64>(matrix), false);
    commit_products();
    wait_products<0>(of_keys, of_values);
#pragma unroll
    for (int j = 0; j < 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of_keys[j][i] *= acc[j][i];
        of_values[j][i] *= factors[i / 2];
      }
    const int rows = w.rows - begin - warp % 4 * 16;
    write_result<T>(corner, of_keys, to_k + begin * stride, stride, rows, left - warpgroup * 64);
    write_result<T>(corner, of_values, to_v + begin * stride, stride, rows, left - warpgroup * 64);
  }
}

template <class T, int D>
int launch(const ProjectedQlaParams& p, Stream stream) {
  return launch_keys_and_values<64 / D>(projected_qla_state_backward<T, D>, kFixedBytes, p, stream);
}

}  // namespace

int launch_projected_qla_state_backward(const ProjectedQlaParams& p, Stream stream) {
  return dispatch_sm90(p, [&](auto element, auto dim) { return launch<decltype(element), dim.value>(p, stream); });
}

}  // namespace vista::cuda::sm90
