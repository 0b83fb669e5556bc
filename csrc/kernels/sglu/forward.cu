// out = ((y up^T) * (y gate^T)) down^T, plus x with a residual, where y is x with each row divided by its root mean
// square.
//
// A block has 128 rows (64 at D = 128), a warp 16 of them, kept in registers as the left operand of both first
// products. The weights pass through a ring in shared memory, kChunk of the hidden columns at a time, each chunk read
// from L2 once for the block. The product of a chunk is where an operand has to be: it goes into the third product from
// registers. The norm factor of a row is applied to it in fp32. So x is read once, out is written once, and nothing
// else leaves the SM.
#include "launch.cuh"
#include "rows.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct ForwardShape {
  using T = typename Math::T;
  static constexpr int kRows = D == 128 ? 64 : 128, kThreads = kRows * 2;
  static constexpr int kChunk = D == 64 ? 32 : 16;  // hidden columns in a stage
  static constexpr int kStages = 3;
  static constexpr int kPitch = padded<T>(D), kDownPitch = padded<T>(kChunk);
  static constexpr int kUpGate = 2 * kChunk * kPitch, kStage = kUpGate + D * kDownPitch;
  static constexpr int kRing = kStages * kStage, kTile = kRows * kPitch;  // the rows pass through the ring's memory
  static constexpr int kSharedBytes = (kRing > kTile ? kRing : kTile) * static_cast<int>(sizeof(T));
  static constexpr int kBlocks = D == 256 ? 1 : (D == 128 ? 3 : 2);
};

// The product of two halves of an accumulator, times factor[0] in the rows g and factor[1] in the rows g + 8, as an
// operand.
template <class T, int N>
__device__ inline void multiply_halves(Fragments<N / 2>& product, const Accumulator<N>& acc, const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < N / 16; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float *u = acc[j] + 2 * half, *v = acc[j + N / 16] + 2 * half;
      product[j / 2][j % 2 * 2 + half] = pack2(factor[half] * u[0] * v[0], factor[half] * u[1] * v[1], T{});
    }
}

template <class Math, int D>
__global__ void __launch_bounds__(ForwardShape<Math, D>::kThreads, ForwardShape<Math, D>::kBlocks)
    sglu_forward(const SgluParams p) {
  using Shape = ForwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kChunk = Shape::kChunk, kPitch = Shape::kPitch, kThreads = Shape::kThreads;
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  const int thread = threadIdx.x, own_row = thread / 32 * 16;
  const RowTile<Shape::kRows> tile(p);

  extern __shared__ uint4 shared[];
  T* ring = reinterpret_cast<T*>(shared);
  T* own_tile = ring + own_row * kPitch;

  Fragments<D> x;
  copy_rows<T, Shape::kRows, D, kPitch, kThreads>(ring, static_cast<const T*>(p.x) + tile.begin * dim, dim, tile.rows,
                                                  dim, thread);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  Math::template load<D, kPitch>(x, own_tile);
  __syncthreads();

  const int steps = (hidden + kChunk - 1) / kChunk;
  const auto stage_of = [&](int step) { return ring + step % Shape::kStages * Shape::kStage; };
  const auto copy_step = [&](int step) {
    const int begin = step * kChunk;
    if (step < steps) {
      T* stage = stage_of(step);
      const int64_t offset = static_cast<int64_t>(begin) * dim;
      copy_rows<T, kChunk, D, kPitch, kThreads>(stage, static_cast<const T*>(p.up) + offset, dim, hidden - begin, dim,
                                                thread);
      copy_rows<T, kChunk, D, kPitch, kThreads>(stage + kChunk * kPitch, static_cast<const T*>(p.gate) + offset, dim,
                                                hidden - begin, dim, thread);
      copy_rows<T, D, kChunk, Shape::kDownPitch, kThreads>(
          stage + Shape::kUpGate, static_cast<const T*>(p.down) + begin, hidden, dim, hidden - begin, thread);
    }
    commit_copies();
  };
  for (int step = 0; step < Shape::kStages - 1; ++step) copy_step(step);

  float inverse[2];
  inverse_roots<T, D>(inverse, x, p);
  const float factor[2] = {inverse[0] * inverse[0], inverse[1] * inverse[1]};
  Accumulator<D> out;
  clear<D>(out);
  for (int step = 0; step < steps; ++step) {
    wait_copies<Shape::kStages - 2>();
    __syncthreads();  // the chunk is there for all, and nobody reads the stage before it any more
    copy_step(step + Shape::kStages - 1);
    const T* stage = stage_of(step);
    Accumulator<2 * kChunk> both;
    clear<2 * kChunk>(both);
    Math::template nt<D, 2 * kChunk, kPitch>(both, x, stage);
    Fragments<kChunk> product;
    multiply_halves<T, 2 * kChunk>(product, both, factor);
    Math::template nt<kChunk, D, Shape::kDownPitch>(out, product, stage + Shape::kUpGate);
  }
  wait_copies<0>();
  __syncthreads();  // the ring has served

  if (p.residual)
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 two = pair_of<T, D>(x, j, half);
        out[j][2 * half] += two.x;
        out[j][2 * half + 1] += two.y;
      }
  store_accumulator<T, D, kPitch>(own_tile, out);
  __syncwarp();
  store_rows<T, 16, D, kPitch, 32>(own_tile, static_cast<T*>(p.out) + (tile.begin + own_row) * dim, dim,
                                   tile.rows - own_row, dim, lane_id());
}

}  // namespace

int launch_sglu(const SgluParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    return launch_rows<ForwardShape<Math, D>>(sglu_forward<Math, D>, params, stream);
  });
}

}  // namespace vista::cuda
