// out = phi1(Q) P, of queries that never leave the registers.
//
// A warp multiplies its rows of a tile of x by the weights of one head, in accumulators. Activated and rounded they are
// the left operand of the product with P as they lie. The result takes its way through a corner of shared memory that
// is the warp's own, 32 columns at a time, so that memory is written in whole sectors.
#include "launch.cuh"
#include "parts.h"

namespace vista::cuda {
namespace {

template <class S>
__global__ void __launch_bounds__(S::kThreads, S::kBlocks) projected_qla_apply(const ProjectedQlaParams p) {
  using T = typename S::T;
  using Rows = typename S::Rows;
  Work w;
  if (!find_group<S>(p.qla, w)) return;
  const int heads = heads_of<S>(p.qla, w);
  T* out = static_cast<T*>(p.qla.out);
  if (w.padding) return zero_rows<T>(out, p.qla, w, 0, w.rows, S::kDim, 0, heads * S::kDim);
  if (w.rows == 0) return;

  Rows rows(p, w, shared_memory(), S::kOwnBytes);
  const int warp = threadIdx.x / 32, head = rows.own_column / S::kDim;
  T* matrices = reinterpret_cast<T*>(shared_memory() + kFactorBytes + kRingBytes);
  T* slice = matrices + S::kHeads * S::kDim * S::kMatrixPitch + warp * 16 * S::kSlicePitch;
  rows.template copy_weights<S::kColumns>(0, p.weight_q, weight_rows<S>(p.qla, w, 0));
  rows.start();
  load_matrices_of<S>(matrices, p.qla, w, false);

  const T* matrix = matrices + head * S::kDim * S::kMatrixPitch;
  const int64_t stride = p.qla.heads * S::kDim;
  for (int tile = 0; tile < rows.tiles; ++tile) {
    Tall<Rows::kTall, S::kDim> acc;
    rows.multiply(tile, acc, [] {});
    const int row = tile * kTileRows + rows.own_row;
    if (head >= heads || row >= w.rows) continue;
    TallFragments<Rows::kTall, S::kDim> queries;
    activate_product<T, Rows::kTall, S::kDim>(queries, acc, rows.factors + rows.own_row, p.qla.activation);
    T* to = rows_at(out, p.qla, w.begin + row, w.head + head, S::kDim);
#pragma unroll
    for (int column = 0; column < S::kDim; column += S::kSlice) {
      Tall<Rows::kTall, S::kSlice> result;
#pragma unroll
      for (int i = 0; i < Rows::kTall; ++i) clear<S::kSlice>(result[i]);
      multiply_fragments<T, Rows::kTall, S::kDim, S::kSlice, S::kMatrixPitch>(result, queries, matrix + column);
#pragma unroll
      for (int i = 0; i < Rows::kTall; ++i) {
        __syncwarp();
        store_accumulator<T, S::kSlice, S::kSlicePitch>(slice, result[i]);
        __syncwarp();
        store_rows<T, 16, S::kSlice, S::kSlicePitch, 32>(slice, to + 16 * i * stride + column, stride,
                                                         w.rows - row - 16 * i, S::kSlice, lane_id());
      }
    }
  }
}

}  // namespace

int launch_projected_qla_apply(const ProjectedQlaParams& params, Stream stream) {
  return launch_instance<ApplyInstances>(params, [&](auto shape) {
    using S = decltype(shape);
    return sm90::serves(params) ? sm90::launch_projected_qla_apply(params, stream)
                                : launch_groups<S>(projected_qla_apply<S>, params, stream);
  });
}

}  // namespace vista::cuda
