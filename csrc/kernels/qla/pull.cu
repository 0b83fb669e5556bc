// Gradients of activated rows, where the fused kernels do not fit into shared memory (rows wider than 256 bytes):
// dQ = phi1'(Q) * (dO P^T + own term), and dK = phi1'(K) * (V dZ^T). A block owns kSlice columns of the result; dO is
// read once for each slice, from L2 but for the first. Warps stream as in apply.cu.
#include "launch.cuh"
#include "matrix.cuh"
#include "own_term.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct PullShape {
  using T = typename Math::T;
  static constexpr int kSize = sizeof(T);
  static constexpr int kSlab = 256 / kSize;  // columns of dO in a stage
  static constexpr int kSlabs = D / kSlab;
  static constexpr int kSlice = 128 / kSize;  // columns of Q and dQ in a block
  static constexpr int kSlices = D / kSlice;
  static constexpr int kWarps = 4;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kStages = 2;
  static constexpr int kPitch = padded<T>(kSlab), kSlicePitch = padded<T>(kSlice), kMatrixPitch = padded<T>(D);
  static constexpr int kStage = 16 * (kPitch + kSlicePitch);
  static constexpr int kSharedBytes = (kSlice * kMatrixPitch + kWarps * kStages * kStage) * kSize + kWarps * 32 * 4;
};

template <class Math, int D>
__global__ void __launch_bounds__(PullShape<Math, D>::kThreads, 2) qla_pull(const QlaParams p, bool gradient) {
  using Shape = PullShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kSlice = Shape::kSlice, kSlicePitch = Shape::kSlicePitch;
  constexpr int kStage = Shape::kStage, kStages = Shape::kStages;
  Work w;
  if (!find_work<Shape::kSlices>(p, w)) return;
  const int first_column = w.slice * kSlice;
  if (first_column >= p.d) return;
  const int64_t columns = p.d - first_column < kSlice ? p.d - first_column : kSlice;
  T* out = static_cast<T*>(gradient ? p.grad_k : p.grad_q);
  const int rows = w.product_rows(gradient);
  zero_rows<T>(out, p, w, rows, w.zero_end(gradient, p.own_term), p.d, first_column, columns);
  if (rows == 0) return;

  extern __shared__ uint4 shared[];
  const int lane = lane_id(), warp = threadIdx.x / 32;
  T* matrix = reinterpret_cast<T*>(shared);
  T* rings = matrix + kSlice * Shape::kMatrixPitch;
  T* ring = rings + warp * kStages * kStage;  // a stage: 16 rows of a slab of dO, then of the slice of Q
  float* pulls = reinterpret_cast<float*>(rings + Shape::kWarps * kStages * kStage) + warp * 32;

  const T* inner = static_cast<const T*>(gradient ? p.k : p.q);
  const T* outer = static_cast<const T*>(gradient ? p.v : p.grad_out);
  const int64_t stride_d = p.heads * p.d, stride_e = p.heads * p.e;
  const int tiles = (static_cast<int>(ceil_div(rows, 16)) + Shape::kWarps - 1 - warp) / Shape::kWarps;
  const auto row_of = [&](int tile) { return (tile * Shape::kWarps + warp) * 16; };
  const auto copy_slab = [&](int step) {
    const int row = row_of(step / Shape::kSlabs), slab = step % Shape::kSlabs, column = slab * Shape::kSlab;
    T* stage = ring + step % kStages * kStage;
    if (step < tiles * Shape::kSlabs) {
      copy_rows<T, 16, Shape::kSlab, kPitch, 32>(stage, rows_at(outer, p, w.begin + row, w.head, p.e) + column,
                                                 stride_e, rows - row, p.e - column, lane);
      if (slab == Shape::kSlabs - 1)
        copy_rows<T, 16, kSlice, kSlicePitch, 32>(stage + 16 * kPitch,
                                                  rows_at(inner, p, w.begin + row, w.head, p.d) + first_column,
                                                  stride_d, rows - row, columns, lane);
    }
    commit_copies();
  };

  for (int step = 0; step < kStages - 1; ++step) copy_slab(step);
  load_matrix<T, kSlice, D, Shape::kMatrixPitch>(matrix, p, w, gradient, first_column, 0);
  __syncthreads();
  Accumulator<kSlice> acc;
  for (int step = 0; step < tiles * Shape::kSlabs; ++step) {
    const int slab = step % Shape::kSlabs;
    T* stage = ring + step % kStages * kStage;
    wait_copies<kStages - 2>();
    __syncwarp();
    copy_slab(step + kStages - 1);
    if (slab == 0) clear<kSlice>(acc);
    Math::template nt<Shape::kSlab, kSlice, kPitch, Shape::kMatrixPitch>(acc, stage, matrix + slab * Shape::kSlab);
    if (slab < Shape::kSlabs - 1) continue;

    __syncwarp();  // the slab has served: keys of targets take its place
    const int row = row_of(step / Shape::kSlabs);
    const TargetTile targets(w, row);
    if (p.own_term && !gradient && targets.any()) {
      own_term_backward<T, kSlice, kPitch>(p, w, targets, first_column, w.slice == 0, stage, pulls);
      add_pull<T, kSlice, kPitch>(acc, p.activation, stage, pulls);
    }
    T* slice = stage + 16 * kPitch;
    through_activation<T, kSlice, kSlicePitch, false>(acc, p.activation, slice);
    store_accumulator<T, kSlice, kSlicePitch>(slice, acc);
    __syncwarp();
    store_rows<T, 16, kSlice, kSlicePitch, 32>(slice, rows_at(out, p, w.begin + row, w.head, p.d) + first_column,
                                               stride_d, rows - row, columns, lane);
  }
}

}  // namespace

int launch_pull(const QlaParams& params, bool gradient, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) -> int {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    if constexpr (kFusedBackward<Math, D>) {
      return cudaErrorInvalidValue;  // never asked for
    } else {
      using Shape = PullShape<Math, D>;
      return launch_items<Shape>(qla_pull<Math, D>, params, Shape::kSlices, stream, gradient);
    }
  });
}

}  // namespace vista::cuda
