// Sums over rows: Z = phi1(K)^T V over source rows, and, where the fused backward does not fit, W = phi1(Q)^T dO over
// all.
//
// A block streams the two tensors of one chunk and head through a ring of row tiles in shared memory and keeps the sum
// in accumulators: warp w owns 16 of its d rows and all its e columns. Each row is read once (at D = 256 twice: a block
// owns 128 x 128 of the sum) and nothing else crosses memory but the sum of the chunk, 1/16 of its rows at d = e = 64,
// bf16.
#include "launch.cuh"
#include "matrix.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct StateShape {
  using T = typename Math::T;
  static constexpr int kPart = D < 128 ? D : 128;  // rows and columns of the sum that a block owns
  static constexpr int kParts = D / kPart;
  static constexpr int kThreads = kPart / 16 * 32;
  static constexpr int kPitch = padded<T>(kPart);
  // About 8 KB of either tensor a stage: enough under way to cover the latency of memory with 2 to 4 blocks per SM.
  static constexpr int kRows = kPart * sizeof(T) <= 128 ? 64 : 8192 / (kPart * static_cast<int>(sizeof(T)));
  static constexpr int kStages = 3;
  static constexpr int kTile = kRows * kPitch;
  static constexpr int kSharedBytes = 2 * kStages * kTile * sizeof(T);
  static constexpr int kBlocks = kPart < 128 ? 4 : 2;
};

template <class Math, int D>
__global__ void __launch_bounds__(StateShape<Math, D>::kThreads, StateShape<Math, D>::kBlocks)
    qla_state(const QlaParams p, bool gradient) {
  using Shape = StateShape<Math, D>;
  using T = typename Shape::T;
  Work w;
  if (!find_work<Shape::kParts * Shape::kParts>(p, w) || w.padding) return;
  const int rows = gradient ? w.rows : w.sources;
  if (rows == 0 && !w.first) return;  // nothing but targets; the reduction does not look here
  const int first_row = w.slice / Shape::kParts * Shape::kPart, first_column = w.slice % Shape::kParts * Shape::kPart;
  if (first_row >= p.d || first_column >= p.e) return;

  extern __shared__ uint4 shared[];
  T* left_ring = reinterpret_cast<T*>(shared);
  T* right_ring = left_ring + Shape::kStages * Shape::kTile;
  const T* left = rows_at(static_cast<const T*>(gradient ? p.q : p.k), p, w.begin, w.head, p.d) + first_row;
  const T* right = rows_at(static_cast<const T*>(gradient ? p.grad_out : p.v), p, w.begin, w.head, p.e) + first_column;
  const int64_t stride_d = p.heads * p.d, stride_e = p.heads * p.e;
  const int tiles = static_cast<int>(ceil_div(rows, Shape::kRows));
  const auto copy_tile = [&](int tile) {
    if (tile < tiles) {
      const int row = tile * Shape::kRows, stage = tile % Shape::kStages;
      copy_rows<T, Shape::kRows, Shape::kPart, Shape::kPitch, Shape::kThreads>(
          left_ring + stage * Shape::kTile, left + row * stride_d, stride_d, rows - row, p.d - first_row, threadIdx.x);
      copy_rows<T, Shape::kRows, Shape::kPart, Shape::kPitch, Shape::kThreads>(
          right_ring + stage * Shape::kTile, right + row * stride_e, stride_e, rows - row, p.e - first_column,
          threadIdx.x);
    }
    commit_copies();
  };

  Accumulator<Shape::kPart> acc;
  clear<Shape::kPart>(acc);
  for (int tile = 0; tile < Shape::kStages - 1; ++tile) copy_tile(tile);
  const int own_row = threadIdx.x / 32 * 16;
  for (int tile = 0; tile < tiles; ++tile) {
    wait_copies<Shape::kStages - 2>();
    T* a = left_ring + tile % Shape::kStages * Shape::kTile;
    activate_rows<T, Shape::kRows, Shape::kPart, Shape::kPitch, Shape::kThreads>(a, p.activation, threadIdx.x);
    __syncthreads();  // the tile is there for all, and nobody reads the stage before it any more
    copy_tile(tile + Shape::kStages - 1);
    Math::template tn<Shape::kRows, Shape::kPart, Shape::kPitch, Shape::kPitch>(
        acc, a + own_row, right_ring + tile % Shape::kStages * Shape::kTile);
  }
  store_sum<Shape::kPart>(p, w, acc, gradient, first_row + own_row, first_column);
}

}  // namespace

int launch_sum(const QlaParams& params, bool gradient, Stream stream) {
  const int error = dispatch(params, [&](auto math, auto dim) {
    using Shape = StateShape<decltype(math), decltype(dim)::value>;
    return launch_items<Shape>(qla_state<decltype(math), decltype(dim)::value>, params, Shape::kParts * Shape::kParts,
                               stream, gradient);
  });
  return error != cudaSuccess ? error : launch_reduce(params, gradient, stream);
}

int launch_qla_state(const QlaParams& params, Stream stream) { return launch_sum(params, false, stream); }

}  // namespace vista::cuda
