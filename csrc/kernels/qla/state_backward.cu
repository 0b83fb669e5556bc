// dK = phi1'(K) * (V dZ^T) and dV = phi1(K) dZ in one pass over K and V. Warps stream their own rows as in apply.cu; dK
// waits in registers while phi1(K), which replaces K in shared memory, is multiplied by dZ. Four row passes over
// memory: reads K, V, writes dK, dV.
#include "launch.cuh"
#include "matrix.cuh"
#include "own_term.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct StateBackwardShape {
  using T = typename Math::T;
  static constexpr int kStages = 2;
  static constexpr int kPitch = padded<T>(D);
  static constexpr int kTile = 16 * kPitch;
  static constexpr int kWarps = D < 128 ? 4 : 3;  // four do not fit into 99 KB at D = 128
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kSharedBytes = (D * kPitch + kWarps * kStages * 2 * kTile) * sizeof(T);
  static constexpr int kBlocks = D * sizeof(T) <= 128 ? 4 : 2;
};

template <class Math, int D>
__global__ void __launch_bounds__(StateBackwardShape<Math, D>::kThreads, StateBackwardShape<Math, D>::kBlocks)
    qla_state_backward(const QlaParams p) {
  using Shape = StateBackwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kTile = Shape::kTile, kStages = Shape::kStages;
  Work w;
  if (!find_work<1>(p, w)) return;
  const int rows = w.product_rows(true);
  zero_rows<T>(p.grad_k, p, w, rows, w.zero_end(true, p.own_term), p.d, 0, p.d);
  zero_rows<T>(p.grad_v, p, w, rows, w.zero_end(true, p.own_term), p.e, 0, p.e);
  if (rows == 0) return;

  extern __shared__ uint4 shared[];
  const int lane = lane_id(), warp = threadIdx.x / 32;
  T* matrix = reinterpret_cast<T*>(shared);
  T* ring = matrix + D * kPitch + warp * kStages * 2 * kTile;  // a stage: 16 rows of K, then of V

  const int64_t stride_d = p.heads * p.d, stride_e = p.heads * p.e;
  const int tiles = (static_cast<int>(ceil_div(rows, 16)) + Shape::kWarps - 1 - warp) / Shape::kWarps;
  const auto row_of = [&](int tile) { return (tile * Shape::kWarps + warp) * 16; };
  const auto copy_tile = [&](int tile) {
    if (tile < tiles) {
      const int row = row_of(tile);
      T* stage = ring + tile % kStages * 2 * kTile;
      copy_rows<T, 16, D, kPitch, 32>(stage, rows_at(static_cast<const T*>(p.k), p, w.begin + row, w.head, p.d),
                                      stride_d, rows - row, p.d, lane);
      copy_rows<T, 16, D, kPitch, 32>(stage + kTile, rows_at(static_cast<const T*>(p.v), p, w.begin + row, w.head, p.e),
                                      stride_e, rows - row, p.e, lane);
    }
    commit_copies();
  };

  copy_tile(0);
  load_matrix<T, D, D, kPitch>(matrix, p, w, true, 0, 0);
  __syncthreads();
  for (int tile = 0; tile < tiles; ++tile) {
    T* keys = ring + tile % kStages * 2 * kTile;
    T* values = keys + kTile;
    wait_copies<0>();
    __syncwarp();
    copy_tile(tile + 1);
    Accumulator<D> grad_keys;
    clear<D>(grad_keys);
    Math::template nt<D, D, kPitch, kPitch>(grad_keys, values, matrix);
    through_activation<T, D, kPitch, true>(grad_keys, p.activation, keys);
    __syncwarp();
    Accumulator<D> grad_values;
    clear<D>(grad_values);
    Math::template nn<D, D, kPitch, kPitch>(grad_values, keys, matrix);
    __syncwarp();
    store_accumulator<T, D, kPitch>(keys, grad_keys);
    store_accumulator<T, D, kPitch>(values, grad_values);
    __syncwarp();
    const int row = row_of(tile);
    store_rows<T, 16, D, kPitch, 32>(keys, rows_at(static_cast<T*>(p.grad_k), p, w.begin + row, w.head, p.d), stride_d,
                                     rows - row, p.d, lane);
    store_rows<T, 16, D, kPitch, 32>(values, rows_at(static_cast<T*>(p.grad_v), p, w.begin + row, w.head, p.e),
                                     stride_e, rows - row, p.e, lane);
  }
}

}  // namespace

int launch_qla_state_backward(const QlaParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    if constexpr (kFusedBackward<Math, D>) {
      using Shape = StateBackwardShape<Math, D>;
      return launch_items<Shape>(qla_state_backward<Math, D>, params, 1, stream);
    } else {
      const int error = launch_pull(params, true, stream);
      return error != cudaSuccess ? error : launch_map(params, true, stream);
    }
  });
}

}  // namespace vista::cuda
