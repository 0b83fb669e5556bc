// out = softmax(scale Q K^T) V, with the own item of each row as one more key, and the log-sum-exp.
//
// A block has one tile of queries of one head; a warp 16 rows of it. Tiles of keys and values take turns in one ring of
// three stages, so that two copies are under way. Online softmax in fp32: the maximum so far, the sum and the output
// relative to it. The weights pass through shared memory (the warp's own rows) to become the left operand of the second
// product. Reads Q and writes O once; K and V once for each 64 queries, from L2 but for the first.
#include "launch.cuh"
#include "rows.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
struct ForwardShape {
  using T = typename Math::T;
  static constexpr int kSize = sizeof(T);
  static constexpr int kRows = D * kSize <= 512 ? kTileRows : kTileRows / 2;  // queries
  static constexpr int kKeys = D * kSize <= 128 ? 64 : (D * kSize <= 512 ? 32 : 16);
  static constexpr int kThreads = kRows * 2;
  static constexpr int kStages = 3;
  static constexpr int kPitch = padded<T>(D), kWeightPitch = padded<T>(kKeys);
  static constexpr int kSharedBytes = ((kRows + kStages * kKeys) * kPitch + kRows * kWeightPitch) * kSize;
  static constexpr int kBlocks = D * kSize <= 128 ? 4 : (D * kSize <= 256 ? 3 : 2);
};

// Running maximum and sum of the rows g and g + 8; the sum of this thread's columns only, until `join`.
struct Softmax {
  float top[2] = {-INFINITY, -INFINITY}, total[2] = {0.f, 0.f};

  // What was accumulated relative to `top` is to be multiplied by the result. NaN is no maximum: the exponentials
  // carry it on.
  template <class T>
  __device__ float raise(int half, float high) {
    const float keep = top[half] == high ? 1.f : exponential<T>(top[half] - high);
    top[half] = high;
    total[half] *= keep;
    return keep;
  }

  __device__ void join() {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      for (int step = 1; step < 4; step *= 2) total[half] += __shfl_xor_sync(0xffffffffu, total[half], step);
  }
};

// scores become weights, of which those beyond `keys` are zero; `keep` what they do to earlier sums.
template <class T, int N>
__device__ inline void take_scores(Softmax& softmax, Accumulator<N>& scores, float scale, int keys, float (&keep)[2]) {
  const int first = lane_id() % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float high = softmax.top[half];
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[j][i] = first + 8 * j + i % 2 < keys ? scale * scores[j][i] : -INFINITY;
        high = fmaxf(high, scores[j][i]);
      }
    for (int step = 1; step < 4; step *= 2) high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, step));
    keep[half] = softmax.raise<T>(half, high);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        scores[j][i] = exponential<T>(scores[j][i] - high);
        softmax.total[half] += scores[j][i];
      }
  }
}

template <class Math, int D>
__global__ void __launch_bounds__(ForwardShape<Math, D>::kThreads, ForwardShape<Math, D>::kBlocks)
    cross_attn_forward(const CrossAttnParams p) {
  using Shape = ForwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  constexpr int kSlices = kTileRows / Shape::kRows;
  const int head = static_cast<int>(blockIdx.x % p.q_heads);
  const int64_t rest = blockIdx.x / p.q_heads;
  Tile tile;
  if (!find_tile(Plan(p, false).query_tiles, p.q_offsets, p.groups, p.total_q, rest / kSlices,
                 static_cast<int>(rest % kSlices) * Shape::kRows, Shape::kRows, tile))
    return;
  const Rows<T> out = results_of<T>(p.out, p.q_heads, p.e, tile.begin, head);
  float* lse = p.lse + tile.begin * p.q_heads + head;
  if (tile.padding) {
    zero_rows(out, tile.rows);
    for (int row = threadIdx.x; row < tile.rows; row += kThreads) lse[row * p.q_heads] = 0.f;
    return;
  }

  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / 32, own_row = warp * 16;
  T* queries = reinterpret_cast<T*>(shared);
  T* ring = queries + Shape::kRows * kPitch;
  T* weights = ring + Shape::kStages * kKeys * kPitch + own_row * Shape::kWeightPitch;  // the warp's own
  T* own_queries = queries + own_row * kPitch;

  const int64_t sequence = sequence_of(p, tile.part), kv_head = head / (p.q_heads / p.kv_heads);
  const int64_t kv_begin = index_at(p.kv_offsets, sequence);
  const int64_t keys = index_at(p.kv_offsets, sequence + 1) - kv_begin;
  const Rows<const T> k = rows_of<T>(p.k, p.kv_heads, p.d, kv_begin, kv_head);
  const Rows<const T> v = rows_of<T>(p.v, p.kv_heads, p.e, kv_begin, kv_head);
  const int64_t steps = ceil_div(keys, kKeys) * 2;
  // Step 2 i brings the keys of tile i, step 2 i + 1 its values.
  const auto stage_of = [&](int64_t step) { return ring + step % Shape::kStages * kKeys * kPitch; };
  const auto copy_step = [&](int64_t step) {
    const int64_t row = step / 2 * kKeys;
    if (step < steps) {
      const int left = static_cast<int>(keys - row < kKeys ? keys - row : kKeys);
      Rows<const T> from = step % 2 == 0 ? k : v;
      from.data = from.at(row);
      copy_tile<T, kKeys, D, kThreads>(stage_of(step), from, left);
    }
    commit_copies();
  };
  const auto arrive = [&](int64_t step) {
    wait_copies<Shape::kStages - 2>();
    __syncthreads();  // the tile is there for all, and nobody reads the stage before it any more
    copy_step(step + Shape::kStages - 1);
    return stage_of(step);
  };

  copy_tile<T, Shape::kRows, D, kThreads>(queries, rows_of<T>(p.q, p.q_heads, p.d, tile.begin, head), tile.rows);
  for (int step = 0; step < Shape::kStages - 1; ++step) copy_step(step);
  const bool active = own_row < tile.rows;
  Softmax softmax;
  Accumulator<D> acc;
  clear<D>(acc);
  for (int64_t step = 0; step < steps; step += 2) {
    const T* key_tile = arrive(step);
    if (active) {
      Accumulator<kKeys> scores;
      dot_rows<Math, D, kKeys, kPitch>(scores, own_queries, key_tile);
      float keep[2];
      const int64_t left = keys - step / 2 * kKeys;
      take_scores<T, kKeys>(softmax, scores, p.scale, static_cast<int>(left < kKeys ? left : kKeys), keep);
      scale_rows<D>(acc, keep);
      __syncwarp();
      store_accumulator<T, kKeys, Shape::kWeightPitch>(weights, scores);
      __syncwarp();
    }
    const T* value_tile = arrive(step + 1);
    if (active) Math::template nn<kKeys, D, Shape::kWeightPitch, kPitch>(acc, weights, value_tile);
  }
  softmax.join();
  wait_copies<0>();
  __syncthreads();  // the queries are there for all, even where there was no key
  if (!active) return;

  const int rows = tile.rows - own_row, g = lane_id() / 4;
  if (p.self_k != nullptr) {
    const Rows<const T> own_k = rows_of<T>(p.self_k, p.kv_heads, p.d, tile.begin + own_row, kv_head);
    float* own_scores = reinterpret_cast<float*>(weights);
    __syncwarp();
#pragma unroll 1
    for (int r = lane_id() / 8; r < 16; r += 4) {
      const float score = row_dot<T>(Activation::kIdentity, own_queries + r * kPitch, own_k.at(r), r < rows ? p.d : 0);
      if (lane_id() % 8 == 0) own_scores[r] = p.scale * score;
    }
    __syncwarp();
    float keep[2], weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float score = own_scores[g + 8 * half];
      keep[half] = softmax.raise<T>(half, fmaxf(softmax.top[half], score));
      weight[half] = exponential<T>(score - softmax.top[half]);
      softmax.total[half] += weight[half];
    }
    scale_rows<D>(acc, keep);
    add_own_rows<T, D, kPitch>(acc, weight, own_queries,
                               rows_of<T>(p.self_v, p.kv_heads, p.e, tile.begin + own_row, kv_head), rows);
  }
  const bool empty = keys == 0 && p.self_k == nullptr;
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own_row + g + 8 * half;
    inverse[half] = empty ? 0.f : 1.f / softmax.total[half];
    if (lane_id() % 4 == 0 && row < tile.rows)
      lse[row * p.q_heads] = empty ? -INFINITY : softmax.top[half] + logf(softmax.total[half]);
  }
  scale_rows<D>(acc, inverse);
  write_accumulator<T, D, kPitch>(acc, own_queries, out, own_row, tile.rows, 0);
}

}  // namespace

int launch_cross_attn(const CrossAttnParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    using Shape = ForwardShape<Math, D>;
    return launch_tiles<Shape>(cross_attn_forward<Math, D>, params, most_tiles(params.total_q, params.groups),
                               params.q_heads, kTileRows / Shape::kRows, stream);
  });
}

}  // namespace vista::cuda
