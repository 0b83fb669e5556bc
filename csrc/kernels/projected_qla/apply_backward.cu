// dQ = phi1'(Q) * (dO P^T), divided as the norm divides x, and W = phi1(Q)^T dO, of queries that are made anew.
//
// Tiles of dO come beside those of x. A warp has 32 columns of the queries of 32 rows: it leaves phi1(Q) in shared
// memory and keeps the slopes for its part of dQ; of W it owns 16 rows of one head.
#include "../qla/parts.cuh"
#include "launch.cuh"
#include "parts.h"

namespace vista::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) projected_qla_apply_backward(const ProjectedQlaParams p) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  using Math = MmaMath<T>;
  Work w;
  if (!find_group<S>(p.qla, w)) return;
  const int heads = heads_of<S>(p.qla, w), columns = heads * S::kDim;
  T* grad_q = static_cast<T*>(p.qla.grad_q);
  if (w.padding) return zero_rows<T>(grad_q, p.qla, w, 0, w.rows, S::kDim, 0, columns);

  constexpr int kTile = kTileRows * S::kPitch;
  Rows rows(p, w, shared_memory(), S::kOwnBytes);
  T* queries = reinterpret_cast<T*>(shared_memory() + kFactorBytes + kRingBytes);
  T* grads = queries + kTile;
  T* matrices = grads + S::kGrads * kTile;
  const T* grad_out = rows_at(static_cast<const T*>(p.qla.grad_out), p.qla, w.begin, w.head, S::kDim);
  const int64_t stride = p.qla.heads * S::kDim;
  const auto copy_grads = [&](int tile) {
    const int row = tile * kTileRows;
    if (tile < rows.tiles)
      copy_rows<T, kTileRows, S::kColumns, S::kPitch, S::kThreads>(
          grads + tile % S::kGrads * kTile, grad_out + row * stride, stride, w.rows - row, columns, threadIdx.x);
  };
  if (rows.tiles > 0) {
    rows.template copy_weights<S::kColumns>(0, p.weight_q, weight_rows<S>(p.qla, w, 0));
    copy_grads(0);
    rows.start();
    load_matrices_of<S>(matrices, p.qla, w, false);
  }

  const int warp = threadIdx.x / 32;
  const int head = rows.own_column / S::kDim, within = rows.own_column % S::kDim;
  const int sum_head = warp * 16 / S::kDim;
  T* own = queries + rows.own_row * S::kPitch + rows.own_column;
  Accumulator<S::kDim> sum;
  clear<S::kDim>(sum);
  for (int tile = 0; tile < rows.tiles; ++tile) {
    const T* grad = grads + tile % S::kGrads * kTile;
    Tall<2, S::kWide> acc;
    rows.multiply(tile, acc, [&] { copy_grads(tile + 1); });
    store_product<true, T, 2, S::kWide>(acc, rows.factors + rows.own_row, p.qla.activation, own, S::kPitch);
    __syncthreads();
    Math::template tn<kTileRows, S::kDim, S::kPitch, S::kPitch>(sum, queries + warp * 16, grad + sum_head * S::kDim);
    if (head < heads) {
      const T* matrix = matrices + (head * S::kDim + within) * S::kMatrixPitch;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Accumulator<S::kWide> result;
        clear<S::kWide>(result);
        Math::template nt<S::kDim, S::kWide, S::kPitch, S::kMatrixPitch>(
            result, grad + (rows.own_row + 16 * i) * S::kPitch + head * S::kDim, matrix);
#pragma unroll
        for (int j = 0; j < S::kWide / 8; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) acc[i][j][k] *= result[j][k];
      }
    }
    __syncthreads();  // nobody reads the queries any more: their gradients take their place
    store_accumulator<T, S::kWide, S::kPitch>(own, acc[0]);
    store_accumulator<T, S::kWide, S::kPitch>(own + 16 * S::kPitch, acc[1]);
    __syncthreads();
    const int row = tile * kTileRows;
    store_rows<T, kTileRows, S::kColumns, S::kPitch, S::kThreads>(
        queries, rows_at(grad_q, p.qla, w.begin + row, w.head, S::kDim), stride, w.rows - row, columns, threadIdx.x);
  }
  if (sum_head >= heads) return;
  w.head += sum_head;
  store_sum<S::kDim>(p.qla, w, sum, true, warp * 16 % S::kDim, 0);
}

}  // namespace

int launch_projected_qla_apply_backward(const ProjectedQlaParams& params, Stream stream) {
  const int error = launch_instance<ApplyBackwardInstances>(params, [&](auto shape) {
    using S = decltype(shape);
    return sm90::serves(params) ? sm90::launch_projected_qla_apply_backward(params, stream)
                                : launch_groups<S>(projected_qla_apply_backward<S>, params, stream);
  });
  return error != cudaSuccess ? error : launch_reduce(params.qla, true, stream);
}

}  // namespace vista::cuda
