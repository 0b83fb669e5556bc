// dK = phi1'(K) * (V dZ^T) and dV = phi1(K) dZ, of keys and values that are made anew, both divided as the norm divides
// x: what the products with x and with the weights need.
//
// As in state.cu four warps have keys and four values. They meet in shared memory: the warps of keys leave phi1(K)
// there and keep the slopes, those of values leave V; each then multiplies what the others left by dZ.
#include "launch.cuh"
#include "parts.h"

namespace vista::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) projected_qla_state_backward(const ProjectedQlaParams p) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Math = MmaMath<T>;
  constexpr int kHalf = S::kColumns / 2;
  Work w;
  if (!find_group<S>(p.qla, w)) return;
  const int heads = heads_of<S>(p.qla, w);
  T *grad_k = static_cast<T*>(p.qla.grad_k), *grad_v = static_cast<T*>(p.qla.grad_v);
  if (w.padding) {
    zero_rows<T>(grad_k, p.qla, w, 0, w.rows, S::kDim, 0, heads * S::kDim);
    return zero_rows<T>(grad_v, p.qla, w, 0, w.rows, S::kDim, 0, heads * S::kDim);
  }
  if (w.rows == 0) return;

  Rows rows(p, w, shared_memory(), S::kOwnBytes);
  T* tile_rows = reinterpret_cast<T*>(shared_memory() + kFactorBytes + kRingBytes);
  T* matrices = tile_rows + kTileRows * S::kPitch;
  rows.template copy_weights<kHalf>(0, p.weight_k, weight_rows<S>(p.qla, w, 0));
  rows.template copy_weights<kHalf>(kHalf, p.weight_v, weight_rows<S>(p.qla, w, 0));
  rows.start();
  load_matrices_of<S>(matrices, p.qla, w, true);

  const bool of_keys = rows.own_column < kHalf;
  T* own = tile_rows + rows.own_row * S::kPitch + rows.own_column;
  for (int tile = 0; tile < rows.tiles; ++tile) {
    Tall<2, S::kWide> acc;
    rows.multiply(tile, acc, [] {});
    store_product<true, T, 2, S::kWide>(acc, rows.factors + rows.own_row,
                                        of_keys ? p.qla.activation : Activation::kIdentity, own, S::kPitch);
    __syncthreads();
    // acc is the slope times the factor, for values the factor alone.
#pragma unroll
    for (int piece = 0; piece < S::kWide / S::kPiece; ++piece) {
      const int column = rows.own_column % kHalf + piece * S::kPiece;
      const int head = column / S::kDim, within = column % S::kDim;
      if (head >= heads) break;
      const T* matrix = matrices + head * S::kDim * S::kMatrixPitch;
      const T* left = tile_rows + rows.own_row * S::kPitch + (of_keys ? kHalf : 0) + head * S::kDim;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Accumulator<S::kPiece> result;
        clear<S::kPiece>(result);
        if (of_keys)
          Math::template nt<S::kDim, S::kPiece, S::kPitch, S::kMatrixPitch>(result, left + 16 * i * S::kPitch,
                                                                            matrix + within * S::kMatrixPitch);
        else
          Math::template nn<S::kDim, S::kPiece, S::kPitch, S::kMatrixPitch>(result, left + 16 * i * S::kPitch,
                                                                            matrix + within);
#pragma unroll
        for (int j = 0; j < S::kPiece / 8; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[i][piece * S::kPiece / 8 + j][k] *= result[j][k];
      }
    }
    __syncthreads();  // nobody reads keys or values any more: the results take their place
    store_accumulator<T, S::kWide, S::kPitch>(own, acc[0]);
    store_accumulator<T, S::kWide, S::kPitch>(own + 16 * S::kPitch, acc[1]);
    __syncthreads();
    const int row = tile * kTileRows;
    const int64_t stride = p.qla.heads * S::kDim;
    store_rows<T, kTileRows, kHalf, S::kPitch, S::kThreads>(tile_rows,
                                                            rows_at(grad_k, p.qla, w.begin + row, w.head, S::kDim),
                                                            stride, w.rows - row, heads * S::kDim, threadIdx.x);
    store_rows<T, kTileRows, kHalf, S::kPitch, S::kThreads>(tile_rows + kHalf,
                                                            rows_at(grad_v, p.qla, w.begin + row, w.head, S::kDim),
                                                            stride, w.rows - row, heads * S::kDim, threadIdx.x);
  }
}

}  // namespace

int launch_projected_qla_state_backward(const ProjectedQlaParams& params, Stream stream) {
  return launch_instance<StateBackwardInstances>(params, [&](auto shape) {
    using S = decltype(shape);
    return sm90::serves(params) ? sm90::launch_projected_qla_state_backward(params, stream)
                                : launch_groups<S>(projected_qla_state_backward<S>, params, stream);
  });
}

}  // namespace vista::cuda
