// out = softmax(scale Q K^T) V, with the own item of each row as one more key, and the log-sum-exp.
//
// A block has a run of queries of one head of one group, its warps 16 rows of them at a time, round by round. Tiles of
// keys and values take turns in a ring, once for a round of queries; a sequence that fits into the ring whole (128 keys
// of up to 256 bytes do) is brought once for the run, and then the warps work without a barrier. Online softmax in
// fp32: the maximum so far, the sum and the output relative to it.
#pragma once

#include "keys.cuh"
#include "launch.cuh"
#include "parts.cuh"
#include "ring.cuh"
#include "softmax.cuh"

namespace vista::cuda {

template <class Math, int D>
struct ForwardShape {
  using T = typename Math::T;
  static constexpr int kSize = sizeof(T), kRowBytes = D * kSize;
  static constexpr int kWarps = kRowBytes <= 512 ? 4 : 2;
  static constexpr int kThreads = kWarps * 32, kRound = kWarps * 16;
  static constexpr int kKeys = kRowBytes <= 256 ? (kSize == 2 ? 64 : 32) : (kRowBytes <= 512 ? 16 : 8);
  static constexpr int kPlaces = kRowBytes <= 256 ? 128 / kKeys : (kRowBytes <= 512 ? 3 : 2);
  static constexpr int kQueryTiles = kRowBytes <= 128 && kSize == 2 ? 3 : 1;  // of a warp: the next ones are under way
  static constexpr int kPitch = padded<T>(D), kTile = kKeys * kPitch;
  using Weights = Weighted<Math, kKeys, D, kPitch>;
  static constexpr int kWarpTile = kQueryTiles * 16 * kPitch + Weights::kSharedBytes / kSize;
  static constexpr int kSharedBytes = (kPlaces * 2 * kTile + kWarps * kWarpTile) * kSize;
  static constexpr int kBlocks = kRowBytes <= 128 ? 3 : 2;
};

// A warp's 16 queries against all keys and, at last, their own items.
template <class Math, int D>
struct Attention {
  using Shape = ForwardShape<Math, D>;
  using T = typename Shape::T;
  static constexpr int kPitch = Shape::kPitch, kKeys = Shape::kKeys;

  const CrossAttnParams& p;
  T* queries;     // the warp's own, in shared memory; its place serves the output at last
  float* shared;  // likewise, Weights::kSharedBytes
  Softmax<T> softmax;
  Accumulator<D> acc;

  __device__ Attention(const CrossAttnParams& params, T* own_queries, float* own_shared)
      : p(params), queries(own_queries), shared(own_shared) {
    clear<D>(acc);
  }

  __device__ void take_tile(const T* keys, const T* values, float scale, int count) {
    Accumulator<kKeys> scores;
    dot_rows<Math, D, kKeys, kPitch>(scores, queries, keys);
    float keep[2];
    softmax.template take<kKeys>(scores, scale, count, keep);
    scale_rows<D>(acc, keep);
    Shape::Weights::add(acc, scores, values, shared);
  }

  // The own items of `rows` rows from packed row `row` on.
  __device__ void take_own(int64_t row, int kv_head, float scale, int rows) {
    const Rows<const T> own_k = rows_of<T>(p.self_k, p.kv_heads, p.d, row, kv_head);
    __syncwarp();
#pragma unroll 1
    for (int r = lane_id() / 8; r < 16; r += 4) {
      const float score = row_dot<T>(Activation::kIdentity, queries + r * kPitch, own_k.at(r), r < rows ? p.d : 0);
      if (lane_id() % 8 == 0) shared[r] = scale * score;
    }
    __syncwarp();
    float keep[2], weight[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float score = shared[lane_id() / 4 + 8 * half];
      keep[half] = softmax.raise(half, fmaxf(softmax.top[half], score));
      weight[half] = softmax.power(score - softmax.top[half]);
      softmax.total[half] += weight[half];
    }
    scale_rows<D>(acc, keep);
    add_own_rows<T, D, kPitch>(acc, weight, queries, rows_of<T>(p.self_v, p.kv_heads, p.e, row, kv_head), rows);
  }

  __device__ void finish(int64_t row, int head, bool empty, int rows) {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int at = lane_id() / 4 + 8 * half;
      inverse[half] = empty ? 0.f : 1.f / softmax.total[half];
      if (lane_id() % 4 == 0 && at < rows)
        p.lse[(row + at) * p.q_heads + head] = empty ? -INFINITY : softmax.log_sum_exp(half);
    }
    scale_rows<D>(acc, inverse);
    write_accumulator<T, D, kPitch>(acc, queries, results_of<T>(p.out, p.q_heads, p.e, row, head), 0, rows, 0);
  }
};

// Runs have at most `run` rows, a round where the keys may not fit into the ring.
template <class Math, int D, template <class> class KeysOf>
__global__ void __launch_bounds__(ForwardShape<Math, D>::kThreads, ForwardShape<Math, D>::kBlocks)
    cross_attn_forward(const CrossAttnParams p, int run) {
  using Shape = ForwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kKeys = Shape::kKeys, kThreads = Shape::kThreads;
  const int head = static_cast<int>(blockIdx.x % p.q_heads);
  Tile tile;
  if (!find_tile(Plan(p, false).query_tiles, p.q_offsets, p.groups, p.total_q, run, blockIdx.x / p.q_heads, 0, run,
                 tile))
    return;
  if (tile.padding) {
    zero_rows(results_of<T>(p.out, p.q_heads, p.e, tile.begin, head), tile.rows);
    for (int row = threadIdx.x; row < tile.rows; row += kThreads) p.lse[(tile.begin + row) * p.q_heads + head] = 0.f;
    return;
  }

  extern __shared__ uint4 shared[];
  const int warp = threadIdx.x / 32;
  T* ring_tiles = reinterpret_cast<T*>(shared);  // a place: keys, then values
  T* own = ring_tiles + Shape::kPlaces * 2 * Shape::kTile + warp * Shape::kWarpTile;
  float* own_floats = reinterpret_cast<float*>(own + Shape::kQueryTiles * 16 * kPitch);
  const auto queries_of = [&](int round) { return own + round % Shape::kQueryTiles * 16 * kPitch; };
  const auto copy_queries = [&](int round) {
    const int row = round * Shape::kRound + warp * 16;
    if (row < tile.rows) {
      const Rows<const T> from = rows_of<T>(p.q, p.q_heads, p.d, tile.begin + row, head);
      copy_own_rows<T, D, kPitch>(queries_of(round), from, tile.rows - row);
    }
    commit_copies();
  };

  const int kv_head = head / static_cast<int>(p.q_heads / p.kv_heads);
  const KeysOf<T> source(p, tile.part, kv_head);
  const auto left_at = [&](int step) { return source.count - static_cast<decltype(source.count)>(step) * kKeys; };
  const int values_at = source.values_are_keys() ? 0 : Shape::kTile;
  const auto copy_keys = [&](int step, int place) {
    T* to = ring_tiles + place * 2 * Shape::kTile;
    if (left_at(step) > 0) source.template copy<kKeys, D, kThreads>(to, to + values_at, step);
  };
  Ring<Shape::kPlaces, decltype(copy_keys)> ring(copy_keys);
  copy_queries(0);
#pragma unroll
  for (int round = 1; round < Shape::kQueryTiles - 1; ++round) copy_queries(round);
  const float scale = p.scale * Softmax<T>::kUnit;
  const int rounds = (tile.rows + Shape::kRound - 1) / Shape::kRound;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if (Shape::kQueryTiles > 1) copy_queries(round + Shape::kQueryTiles - 1);
    wait_copies<Shape::kQueryTiles - 1>();
    __syncwarp();
    const int row = round * Shape::kRound + warp * 16, rows = tile.rows - row < 16 ? tile.rows - row : 16;
    Attention<Math, D> attention(p, queries_of(round), own_floats);
#pragma unroll 1
    for (int step = 0; left_at(step) > 0; ++step) {
      const int place = round == 0 ? ring.arrive(step) : ring.place_of(step);
      const T* keys = ring_tiles + place * 2 * Shape::kTile;
      if (rows > 0) attention.take_tile(keys, keys + values_at, scale, left_at(step) < kKeys ? left_at(step) : kKeys);
    }
    if (rows <= 0) continue;
    attention.softmax.join();
    if (p.self_k != nullptr) attention.take_own(tile.begin + row, kv_head, scale, rows);
    attention.finish(tile.begin + row, head, source.count == 0 && p.self_k == nullptr, rows);
    __syncwarp();  // the output has left the queries' place
    if (Shape::kQueryTiles == 1) copy_queries(round + 1);
  }
  wait_copies<0>();
}

template <template <class> class KeysOf>
int launch_forward(const CrossAttnParams& p, Stream stream) {
  return dispatch(p, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    const int run = cross_attn_forward_run(p);
    return launch_tiles<ForwardShape<Math, D>>(cross_attn_forward<Math, D, KeysOf>, p,
                                               most_tiles(p.total_q, p.groups, run), p.q_heads, 1, stream, run);
  });
}

}  // namespace vista::cuda
