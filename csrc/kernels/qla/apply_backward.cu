// dQ = phi1'(Q) * (dO P^T + own term) and W = phi1(Q)^T dO in one pass over Q and dO, and the targets' dK and dV.
//
// A block streams tiles of Q and dO of one chunk and head. For dQ a warp owns 16 rows (and a share of the columns), for
// W 16 of d and all of e, as in state.cu. Between the two phi1(Q) replaces Q in shared memory, so that each value is
// activated once and in fp32. Three row passes over memory: reads Q, dO, writes dQ.
#include "launch.cuh"
#include "matrix.cuh"
#include "own_term.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct ApplyBackwardShape {
  using T = typename Math::T;
  static constexpr int kWarps = D / 16;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kRows = D * sizeof(T) == 128 && kWarps >= 4 ? 64 : 32;
  static constexpr int kColumns = D * (kRows / 16) / kWarps;  // of dQ that a warp owns
  static constexpr int kStages = 3;
  // Blocks per SM that the registers are cut for. More would spill, and each has two tiles under way.
  static constexpr int kBlocks = D < 64 ? 6 : (D < 128 ? 3 : 1);
  static constexpr int kPitch = padded<T>(D);
  static constexpr int kTile = kRows * kPitch;
  // P, the ring of Q and dO, dQ on its way out, and 32 floats a warp
  static constexpr int kSharedBytes = (D * kPitch + (2 * kStages + 1) * kTile) * sizeof(T) + kWarps * 32 * 4;
};

template <class Math, int D>
__global__ void __launch_bounds__(ApplyBackwardShape<Math, D>::kThreads, ApplyBackwardShape<Math, D>::kBlocks)
    qla_apply_backward(const QlaParams p) {
  using Shape = ApplyBackwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kTile = Shape::kTile, kRows = Shape::kRows, kColumns = Shape::kColumns;
  constexpr int kThreads = Shape::kThreads;
  Work w;
  if (!find_work<1>(p, w)) return;
  if (w.padding) return zero_rows<T>(p.grad_q, p, w, 0, w.rows, p.d, 0, p.d);

  extern __shared__ uint4 shared[];
  T* matrix = reinterpret_cast<T*>(shared);
  T* queries = matrix + D * kPitch;
  T* grads = queries + Shape::kStages * kTile;
  T* results = grads + Shape::kStages * kTile;
  const int lane = lane_id(), warp = threadIdx.x / 32;
  float* pulls = reinterpret_cast<float*>(results + kTile) + warp * 32;
  // This warp's part of a tile of dQ
  const int own_row = warp % (kRows / 16) * 16, own_column = warp / (kRows / 16) * kColumns;
  const int own = own_row * kPitch + own_column;

  const int64_t stride_d = p.heads * p.d, stride_e = p.heads * p.e;
  const T* q = rows_at(static_cast<const T*>(p.q), p, w.begin, w.head, p.d);
  const T* grad = rows_at(static_cast<const T*>(p.grad_out), p, w.begin, w.head, p.e);
  const int tiles = static_cast<int>(ceil_div(w.rows, kRows));
  const auto copy_tile = [&](int tile) {
    if (tile < tiles) {
      const int row = tile * kRows, stage = tile % Shape::kStages;
      copy_rows<T, kRows, D, kPitch, kThreads>(queries + stage * kTile, q + row * stride_d, stride_d, w.rows - row, p.d,
                                               threadIdx.x);
      copy_rows<T, kRows, D, kPitch, kThreads>(grads + stage * kTile, grad + row * stride_e, stride_e, w.rows - row,
                                               p.e, threadIdx.x);
    }
    commit_copies();
  };

  for (int tile = 0; tile < Shape::kStages - 1; ++tile) copy_tile(tile);
  if (tiles > 0) load_matrix<T, D, D, kPitch>(matrix, p, w, false, 0, 0);
  Accumulator<D> sum;
  clear<D>(sum);
  for (int tile = 0; tile < tiles; ++tile) {
    T* query_tile = queries + tile % Shape::kStages * kTile;
    const T* grad_tile = grads + tile % Shape::kStages * kTile;
    wait_copies<Shape::kStages - 2>();
    __syncthreads();  // the tile and the matrix are there for all, and nobody reads the stage before it any more
    copy_tile(tile + Shape::kStages - 1);
    const int row = tile * kRows + own_row;
    if (row < w.rows) {
      const TargetTile targets(w, row);
      const bool has_own = p.own_term && targets.any();
      if (has_own)
        own_term_backward<T, kColumns, kPitch>(p, w, targets, own_column, own_column == 0, results + own, pulls);
      Accumulator<kColumns> acc;
      clear<kColumns>(acc);
      Math::template nt<D, kColumns, kPitch, kPitch>(acc, grad_tile + own_row * kPitch, matrix + own_column * kPitch);
      if (has_own) add_pull<T, kColumns, kPitch>(acc, p.activation, results + own, pulls);
      through_activation<T, kColumns, kPitch, true>(acc, p.activation, query_tile + own);
      store_accumulator<T, kColumns, kPitch>(results + own, acc);
      __syncwarp();
      store_rows<T, 16, kColumns, kPitch, 32>(
          results + own, rows_at(static_cast<T*>(p.grad_q), p, w.begin + row, w.head, p.d) + own_column, stride_d,
          w.rows - row, p.d - own_column, lane);
    }
    __syncthreads();  // phi1(Q) is there for all
    Math::template tn<kRows, D, kPitch, kPitch>(sum, query_tile + warp * 16, grad_tile);
  }
  store_sum<D>(p, w, sum, true, warp * 16, 0);
}

}  // namespace

int launch_qla_apply_backward(const QlaParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    int error;
    if constexpr (kFusedBackward<Math, D>) {
      using Shape = ApplyBackwardShape<Math, D>;
      error = launch_items<Shape>(qla_apply_backward<Math, D>, params, 1, stream);
      return error != cudaSuccess ? error : launch_reduce(params, true, stream);
    } else {
      error = launch_pull(params, false, stream);
      return error != cudaSuccess ? error : launch_sum(params, true, stream);
    }
  });
}

}  // namespace vista::cuda
