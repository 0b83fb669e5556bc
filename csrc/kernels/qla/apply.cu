// Rows times a matrix: out = phi1(Q) P + own term, and, where the fused backward does not fit, dV = phi1(K) dZ.
//
// Each warp streams its own tiles of 16 rows through a ring in shared memory that no other warp touches, so the loop
// has no block barrier. The matrix is made from the fp32 state when the block starts and stays. Q is read once and out
// written once (where D x D does not fit, a block owns kSlice columns of out, and Q is read again from L2 for each
// slice).
#include "launch.cuh"
#include "matrix.cuh"
#include "own_term.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct ApplyShape {
  using T = typename Math::T;
  static constexpr int kSize = sizeof(T);
  static constexpr int kSlab = D * kSize <= 256 ? D : 256 / kSize;  // columns of Q in a stage
  static constexpr int kSlabs = D / kSlab;
  static constexpr int kSlice = D * D * kSize <= 32768 ? D : 32768 / (D * kSize);  // columns of out in a block
  static constexpr int kSlices = D / kSlice;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = kSlab * kSize <= 128 ? 3 : 2;
  static constexpr int kPitch = padded<T>(kSlab), kMatrixPitch = padded<T>(kSlice);
  static constexpr int kTile = 16 * kPitch;
  static constexpr int kSharedBytes = (D * kMatrixPitch + kWarps * kStages * kTile) * kSize + kWarps * 16 * 4;
  static constexpr int kBlocks = D * kSize <= 128 ? 4 : (D * kSize == 256 ? 3 : 2);
};

template <class Math, int D>
__global__ void __launch_bounds__(ApplyShape<Math, D>::kThreads, ApplyShape<Math, D>::kBlocks)
    qla_apply(const QlaParams p, bool gradient) {
  using Shape = ApplyShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kTile = Shape::kTile, kStages = Shape::kStages;
  Work w;
  if (!find_work<Shape::kSlices>(p, w)) return;
  const int first_column = w.slice * Shape::kSlice;
  if (first_column >= p.e) return;
  const int64_t columns = p.e - first_column < Shape::kSlice ? p.e - first_column : Shape::kSlice;
  void* out = gradient ? p.grad_v : p.out;
  const int rows = w.product_rows(gradient);
  zero_rows<T>(out, p, w, rows, w.zero_end(gradient, p.own_term), p.e, first_column, columns);
  if (rows == 0) return;

  extern __shared__ uint4 shared[];
  const int lane = lane_id(), warp = threadIdx.x / 32;
  T* matrix = reinterpret_cast<T*>(shared);
  T* rings = matrix + D * Shape::kMatrixPitch;
  T* ring = rings + warp * kStages * kTile;
  float* factors = reinterpret_cast<float*>(rings + Shape::kWarps * kStages * kTile) + warp * 16;

  const T* q = static_cast<const T*>(gradient ? p.k : p.q);
  const int64_t stride = p.heads * p.d;
  const int tiles = (static_cast<int>(ceil_div(rows, 16)) + Shape::kWarps - 1 - warp) / Shape::kWarps;
  const auto row_of = [&](int tile) { return (tile * Shape::kWarps + warp) * 16; };
  const auto copy_slab = [&](int step) {
    const int row = row_of(step / Shape::kSlabs), column = step % Shape::kSlabs * Shape::kSlab;
    if (step < tiles * Shape::kSlabs)
      copy_rows<T, 16, Shape::kSlab, kPitch, 32>(ring + step % kStages * kTile,
                                                 rows_at(q, p, w.begin + row, w.head, p.d) + column, stride, rows - row,
                                                 p.d - column, lane);
    commit_copies();
  };

  for (int step = 0; step < kStages - 1; ++step) copy_slab(step);
  load_matrix<T, D, Shape::kSlice, Shape::kMatrixPitch>(matrix, p, w, gradient, 0, first_column);
  __syncthreads();
  Accumulator<Shape::kSlice> acc;
  for (int step = 0; step < tiles * Shape::kSlabs; ++step) {
    const int slab = step % Shape::kSlabs;
    T* tile = ring + step % kStages * kTile;
    wait_copies<kStages - 2>();
    activate_rows<T, 16, Shape::kSlab, kPitch, 32>(tile, p.activation, lane);
    __syncwarp();
    copy_slab(step + kStages - 1);
    if (slab == 0) clear<Shape::kSlice>(acc);
    Math::template nn<Shape::kSlab, Shape::kSlice, kPitch, Shape::kMatrixPitch>(
        acc, tile, matrix + slab * Shape::kSlab * Shape::kMatrixPitch);
    if (slab < Shape::kSlabs - 1) continue;

    // The tile has served: values of targets, then the results take its place.
    __syncwarp();
    const int row = row_of(step / Shape::kSlabs);
    const TargetTile targets(w, row);
    if (p.own_term && !gradient && targets.any())
      add_own_term<T, Shape::kSlice, kPitch>(acc, p, w, targets, first_column, tile, factors);
    store_accumulator<T, Shape::kSlice, kPitch>(tile, acc);
    __syncwarp();
    store_rows<T, 16, Shape::kSlice, kPitch, 32>(
        tile, rows_at(static_cast<T*>(out), p, w.begin + row, w.head, p.e) + first_column, p.heads * p.e, rows - row,
        columns, lane);
  }
}

}  // namespace

int launch_map(const QlaParams& params, bool gradient, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Shape = ApplyShape<decltype(math), decltype(dim)::value>;
    return launch_items<Shape>(qla_apply<decltype(math), decltype(dim)::value>, params, Shape::kSlices, stream,
                               gradient);
  });
}

int launch_qla_apply(const QlaParams& params, Stream stream) { return launch_map(params, false, stream); }

}  // namespace vista::cuda
