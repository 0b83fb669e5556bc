// Gradients of the rows of sglu, all in one pass over x and grad_out; u, v and the hidden rows are computed again.
// With y = r x, u = y up^T, v = y gate^T and gh = grad_out down:
//   hidden = u v, grad_up_rows = r gh v, grad_gate_rows = r gh u,
//   t = grad_up_rows up + grad_gate_rows gate, grad_x = t - x r^2 <t, x> / dim, plus grad_out with a residual.
//
// A block has 64 rows (32 at D = 128). Two warps share 16 of them: both keep the whole rows of x and grad_out in
// registers, as left operands; each computes half of a chunk's hidden columns, and accumulates half of the columns of
// t. The half chunks meet in shared memory, from where they are operands for both warps, and leave for global memory in
// whole sectors. The weights' chunks pass through a ring; the rows of up and gate alternate by eights in it, so that
// one operand holds the same hidden columns of both.
#include "launch.cuh"
#include "rows.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct BackwardShape {
  using T = typename Math::T;
  static constexpr int kRows = D == 128 ? 32 : 64, kThreads = kRows * 4;
  static constexpr int kChunk = 16, kHalf = 8;  // hidden columns in a stage, and of a warp
  static constexpr int kStages = 3;
  static constexpr int kPitch = padded<T>(D), kUpGate = 2 * kChunk * kPitch, kStage = 3 * kChunk * kPitch;
  static constexpr int kRing = kStages * kStage, kTiles = 2 * kRows * kPitch;  // rows pass through the ring's memory
  // Of each row 8 columns at a time: grad_up_rows, grad_gate_rows, the next of both, hidden, nothing, the next of it.
  static constexpr int kMeetingPitch = padded<T>(8 * kHalf), kMeeting = kRows * kMeetingPitch;
  static constexpr int kMemory = kRing > kTiles ? kRing : kTiles;
  static constexpr int kSharedBytes = (kMemory + kMeeting) * static_cast<int>(sizeof(T));
  static constexpr int kBlocks = D == 256 ? 1 : (D == 128 ? 3 : 2);
};

// acc += A B^T, B [8][K]
template <class T, int K, int kPitch>
__device__ inline void times_eight(float (&acc)[4], const Fragments<K>& a, const T* b) {
  const uint32_t from = shared_address(b + lane_id() % 8 * kPitch + lane_id() / 8 * 8);
#pragma unroll
  for (int k = 0; k < K / 32; ++k) {
    uint32_t columns[4];
    load_matrices(columns, from + k * 32 * sizeof(T));
    mma(acc, a[2 * k], columns[0], columns[1], T{});
    mma(acc, a[2 * k + 1], columns[2], columns[3], T{});
  }
}

// The two warps that share rows, and nobody else.
__device__ inline void meet(int pair) { asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory"); }

template <class Math, int D>
__global__ void __launch_bounds__(BackwardShape<Math, D>::kThreads, BackwardShape<Math, D>::kBlocks)
    sglu_backward(const SgluParams p) {
  using Shape = BackwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kChunk = Shape::kChunk, kHalf = Shape::kHalf, kPitch = Shape::kPitch, kThreads = Shape::kThreads;
  constexpr int kMeetingPitch = Shape::kMeetingPitch, kColumns = D / 2;
  const int dim = static_cast<int>(p.dim), hidden = static_cast<int>(p.hidden);
  const int thread = threadIdx.x, pair = thread / 64, half = thread / 32 % 2, own_row = pair * 16;
  const RowTile<Shape::kRows> tile(p);

  extern __shared__ uint4 shared[];
  T* ring = reinterpret_cast<T*>(shared);
  T* meeting = ring + Shape::kMemory + own_row * kMeetingPitch;

  Fragments<D> x, grad;
  const int64_t first = tile.begin * dim;
  T* second_tile = ring + Shape::kRows * kPitch;
  copy_rows<T, Shape::kRows, D, kPitch, kThreads>(ring, static_cast<const T*>(p.x) + first, dim, tile.rows, dim,
                                                  thread);
  copy_rows<T, Shape::kRows, D, kPitch, kThreads>(second_tile, static_cast<const T*>(p.grad_out) + first, dim,
                                                  tile.rows, dim, thread);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
  Math::template load<D, kPitch>(x, ring + own_row * kPitch);
  Math::template load<D, kPitch>(grad, second_tile + own_row * kPitch);
  __syncthreads();

  const int steps = (hidden + kChunk - 1) / kChunk;
  const auto stage_of = [&](int step) { return ring + step % Shape::kStages * Shape::kStage; };
  const auto copy_step = [&](int step) {
    if (step < steps) {
      T* stage = stage_of(step);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int begin = step * kChunk + i / 2 * kHalf;
        const T* from = static_cast<const T*>(i % 2 == 0 ? p.up : p.gate) + static_cast<int64_t>(begin) * dim;
        copy_rows<T, kHalf, D, kPitch, kThreads>(stage + i * kHalf * kPitch, from, dim, hidden - begin, dim, thread);
      }
      const int begin = step * kChunk;
      copy_rows<T, kChunk, D, kPitch, kThreads>(stage + Shape::kUpGate,
                                                static_cast<const T*>(p.down_t) + static_cast<int64_t>(begin) * dim,
                                                dim, hidden - begin, dim, thread);
    }
    commit_copies();
  };
  for (int step = 0; step < Shape::kStages - 1; ++step) copy_step(step);

  // Lane i stores the columns 8 (i % 2) of a row; of rows that are four apart, neighbours meet no bank twice.
  const int lane = lane_id(), stored_row = lane / 16 * 8 + lane / 4 % 4 + lane / 2 % 2 * 4, stored_half = lane % 2;
  const auto store = [&](void* to, int column, int begin) {
    if (own_row + stored_row < tile.rows && begin + stored_half * kHalf < hidden)
      write_vector(static_cast<T*>(to) + (tile.begin + own_row + stored_row) * hidden + begin + stored_half * kHalf,
                   load_vector(meeting + stored_row * kMeetingPitch + column + stored_half * 2 * kHalf));
  };

  float inverse[2];
  inverse_roots<T, D>(inverse, x, p);
  Accumulator<kColumns> t;
  clear<kColumns>(t);
  for (int step = 0; step < steps; ++step) {
    wait_copies<Shape::kStages - 2>();
    __syncthreads();  // the chunk is there for all, and nobody reads the stage before it any more
    copy_step(step + Shape::kStages - 1);
    const T* stage = stage_of(step);
    Accumulator<2 * kHalf> both;  // u and v
    clear<2 * kHalf>(both);
    Math::template nt<D, 2 * kHalf, kPitch>(both, x, stage + half * 2 * kHalf * kPitch);
    float of_hidden[1][4] = {};  // grad_out down
    times_eight<T, D, kPitch>(of_hidden[0], grad, stage + Shape::kUpGate + half * kHalf * kPitch);

    float product[1][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float r = inverse[i / 2], u = r * both[0][i], v = r * both[1][i], g = r * of_hidden[0][i];
      both[0][i] = g * v;
      both[1][i] = g * u;
      product[0][i] = u * v;
    }
    store_accumulator<T, 2 * kHalf, kMeetingPitch>(meeting + half * 2 * kHalf, both);
    store_accumulator<T, kHalf, kMeetingPitch>(meeting + (4 + half * 2) * kHalf, product);
    meet(pair);
    Fragments<4 * kHalf> gradients;
    Math::template load<4 * kHalf, kMeetingPitch>(gradients, meeting);
    Math::template nn<4 * kHalf, kColumns, kPitch>(t, gradients, stage + half * kColumns);
    if (half == 0) {
      store(p.grad_up_rows, 0, step * kChunk);
      store(p.hidden_rows, 4 * kHalf, step * kChunk);
    } else {
      store(p.grad_gate_rows, kHalf, step * kChunk);
    }
  }
  wait_copies<0>();
  __syncthreads();  // the ring and the meeting place have served

  // The columns of this warp, of operands that hold all.
  const auto own_pair = [&](const Fragments<D>& rows, int j, int upper) {
    const float2 low = pair_of<T, D>(rows, j, upper), high = pair_of<T, D>(rows, j + kColumns / 8, upper);
    return half == 0 ? low : high;
  };
  if (p.norm) {
    float along[2] = {0.f, 0.f};
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const float2 two = own_pair(x, j, upper);
        along[upper] = fmaf(t[j][2 * upper], two.x, fmaf(t[j][2 * upper + 1], two.y, along[upper]));
      }
    sum_lanes(along);
    float* sums = reinterpret_cast<float*>(meeting);
    const int row = lane / 4;
    if (lane % 4 == 0)
      for (int upper = 0; upper < 2; ++upper) sums[(row + 8 * upper) * 2 + half] = along[upper];
    meet(pair);
#pragma unroll
    for (int upper = 0; upper < 2; ++upper) {
      const float2 parts = load_pair(sums + (row + 8 * upper) * 2);
      const float factor = inverse[upper] * inverse[upper] * (parts.x + parts.y) / static_cast<float>(dim);
#pragma unroll
      for (int j = 0; j < kColumns / 8; ++j) {
        const float2 two = own_pair(x, j, upper);
        t[j][2 * upper] = fmaf(-factor, two.x, t[j][2 * upper]);
        t[j][2 * upper + 1] = fmaf(-factor, two.y, t[j][2 * upper + 1]);
      }
    }
  }
  if (p.residual)
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j)
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const float2 two = own_pair(grad, j, upper);
        t[j][2 * upper] += two.x;
        t[j][2 * upper + 1] += two.y;
      }
  T* own_tile = ring + own_row * kPitch + half * kColumns;
  store_accumulator<T, kColumns, kPitch>(own_tile, t);
  __syncwarp();
  store_rows<T, 16, kColumns, kPitch, 32>(own_tile,
                                          static_cast<T*>(p.grad_x) + (tile.begin + own_row) * dim + half * kColumns,
                                          dim, tile.rows - own_row, dim - half * kColumns, lane);
}

}  // namespace

int launch_sglu_backward(const SgluParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    return launch_rows<BackwardShape<Math, D>>(sglu_backward<Math, D>, params, stream);
  });
}

}  // namespace vista::cuda
