// Z = phi1(K)^T V over the rows of a chunk, of keys and values that are never anywhere but on chip.
//
// A block streams tiles of x past the weights of its heads. What comes out, the tile's keys and values, is activated in
// fp32, rounded and laid into shared memory, where it is an operand of the sum, which stays in accumulators.
#include "../qla/parts.cuh"
#include "launch.cuh"
#include "parts.h"

namespace vista::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) projected_qla_state(const ProjectedQlaParams p) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  constexpr int kHalf = S::kColumns / 2;  // keys before, values behind
  Work w;
  if (!find_group<S>(p.qla, w) || w.padding) return;
  const int first_row = w.slice / S::kParts * S::kPart, first_column = w.slice % S::kParts * S::kPart;

  Rows rows(p, w, shared_memory(), S::kOwnBytes);
  T* tile_rows = reinterpret_cast<T*>(shared_memory() + kFactorBytes + kRingBytes);
  if (rows.tiles > 0) {
    rows.template copy_weights<kHalf>(0, p.weight_k, weight_rows<S>(p.qla, w, first_row));
    rows.template copy_weights<kHalf>(kHalf, p.weight_v, weight_rows<S>(p.qla, w, first_column));
    rows.start();
  }

  // This warp's part of the sum: 16 rows of a head's, or half of their columns.
  const int warp = threadIdx.x / 32, block = warp % (kHalf / 16);
  const int head = block * 16 / S::kPart, sum_row = block * 16 % S::kPart, sum_column = warp / (kHalf / 16) * S::kSum;
  Accumulator<S::kSum> sum;
  clear<S::kSum>(sum);
  for (int tile = 0; tile < rows.tiles; ++tile) {
    Tall<Rows::kTall, Rows::kWide> acc;
    rows.multiply(tile, acc, [] {});
    store_product<false, T, Rows::kTall, Rows::kWide>(
        acc, rows.factors + rows.own_row, rows.own_column < kHalf ? p.qla.activation : Activation::kIdentity,
        tile_rows + rows.own_row * S::kPitch + rows.own_column, S::kPitch);
    __syncthreads();
    MmaMath<T>::template tn<kTileRows, S::kSum, S::kPitch, S::kPitch>(sum, tile_rows + block * 16,
                                                                      tile_rows + kHalf + head * S::kPart + sum_column);
  }
  if (head >= heads_of<S>(p.qla, w)) return;
  w.head += head;
  store_sum<S::kSum>(p.qla, w, sum, false, first_row + sum_row, first_column + sum_column);
}

}  // namespace

int launch_projected_qla_state(const ProjectedQlaParams& params, Stream stream) {
  const int error = launch_instance<StateInstances>(params, [&](auto shape) {
    using S = decltype(shape);
    return sm90::serves(params) ? sm90::launch_projected_qla_state(params, stream)
                                : launch_groups<S>(projected_qla_state<S>, params, stream);
  });
  return error != cudaSuccess ? error : launch_reduce(params.qla, false, stream);
}

}  // namespace vista::cuda
