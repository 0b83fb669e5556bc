// dQ = scale * dS K, and what the own item adds: a block keeps a tile of Q and dO of one head and streams the keys and
// values of its sequence. In fp32 it does so twice: delta = rowsum(dO * O) - grad_lse carries the rounding of O,
// against which gradients that should cancel (a softmax over one key has none) are not small, so that a first pass
// corrects it by what is left of sum(dS). In 16 bits the rounding of the inputs hides that.
#include "backward.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

template <class Math, int D>
__global__ void __launch_bounds__(BackwardShape<Math, D>::kThreads, BackwardShape<Math, D>::kBlocks)
    cross_attn_backward_queries(const CrossAttnParams p) {
  using Shape = BackwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kKeys = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kSlices = kTileRows / Shape::kRows;
  const Plan plan(p, true);
  const int head = static_cast<int>(blockIdx.x % p.q_heads);
  const int64_t rest = blockIdx.x / p.q_heads;
  Tile tile;
  if (!find_tile(plan.query_tiles, p.q_offsets, p.groups, p.total_q, rest / kSlices,
                 static_cast<int>(rest % kSlices) * Shape::kRows, Shape::kRows, tile))
    return;
  const Rows<T> grad_q = results_of<T>(p.grad_q, p.q_heads, p.d, tile.begin, head);
  if (tile.padding) return zero_rows(grad_q, tile.rows);

  extern __shared__ uint4 shared[];
  const int own_row = threadIdx.x / 32 * 16;
  T* queries = reinterpret_cast<T*>(shared);
  T* grads = queries + Shape::kRows * kPitch;
  T* ring = grads + Shape::kRows * kPitch;                                                // a stage: keys, then values
  T* weights = ring + Shape::kStages * 2 * Shape::kTile + own_row * Shape::kWeightPitch;  // the warp's own
  T* own_queries = queries + own_row * kPitch;

  const int64_t sequence = sequence_of(p, tile.part), kv_head = head / (p.q_heads / p.kv_heads);
  const int64_t kv_begin = index_at(p.kv_offsets, sequence);
  const int64_t keys = index_at(p.kv_offsets, sequence + 1) - kv_begin;
  const auto keys_in = [&](int64_t row) { return static_cast<int>(keys - row < kKeys ? keys - row : kKeys); };
  constexpr bool kCorrectDelta = sizeof(T) == 4;
  const int64_t tiles = ceil_div(keys, kKeys), steps = tiles * (kCorrectDelta ? 2 : 1);
  const auto copy_step = [&](int64_t step) {
    if (step < steps) {
      T* stage = ring + step % 2 * 2 * Shape::kTile;
      const int64_t row = step % tiles * kKeys;
      copy_tile<T, kKeys, D, kThreads>(stage, rows_of<T>(p.k, p.kv_heads, p.d, kv_begin + row, kv_head), keys_in(row));
      copy_tile<T, kKeys, D, kThreads>(stage + Shape::kTile, rows_of<T>(p.v, p.kv_heads, p.e, kv_begin + row, kv_head),
                                       keys_in(row));
    }
    commit_copies();
  };

  copy_tile<T, Shape::kRows, D, kThreads>(queries, rows_of<T>(p.q, p.q_heads, p.d, tile.begin, head), tile.rows);
  copy_tile<T, Shape::kRows, D, kThreads>(grads, rows_of<T>(p.grad_out, p.q_heads, p.e, tile.begin, head), tile.rows);
  copy_step(0);
  float lse[2], delta[2], own_grad[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own_row + lane_id() / 4 + 8 * half;
    const int64_t at = (tile.begin + row) * p.q_heads + head;
    lse[half] = row < tile.rows ? p.lse[at] : 0.f;
    delta[half] = row < tile.rows ? plan.delta[at] : 0.f;
    own_grad[half] = row < tile.rows && p.self_k != nullptr ? plan.own_grad[at] : 0.f;
  }
  const bool active = own_row < tile.rows;
  Accumulator<D> acc;
  clear<D>(acc);
  float left[2] = {0.f, 0.f};  // of sum(dS), this thread's columns
  for (int64_t step = 0; step < steps; ++step) {
    const T* key_tile = ring + step % 2 * 2 * Shape::kTile;
    wait_copies<0>();
    __syncthreads();  // the tile is there for all, and nobody reads the other stage any more
    copy_step(step + 1);
    if (!active) continue;
    Accumulator<kKeys> scores, mean;
    dot_rows<Math, D, kKeys, kPitch>(scores, own_queries, key_tile);
    dot_rows<Math, D, kKeys, kPitch>(mean, grads + own_row * kPitch, key_tile + Shape::kTile);
    probabilities<T, kKeys>(scores, mean, p.scale, keys_in(step % tiles * kKeys),
                            [&](int half, int) { return float2{lse[half], delta[half]}; });
    if (kCorrectDelta && step < tiles) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) left[i / 2] += mean[j][i];
      if (step < tiles - 1) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (int other = 1; other < 4; other *= 2) left[half] += __shfl_xor_sync(0xffffffffu, left[half], other);
        const int row = own_row + lane_id() / 4 + 8 * half;
        const int64_t at = (tile.begin + row) * p.q_heads + head;
        if (row >= tile.rows) continue;
        delta[half] += left[half] + own_grad[half] - (p.grad_lse != nullptr ? p.grad_lse[at] : 0.f);
        if (lane_id() % 4 == 0) plan.delta[at] = delta[half];
      }
      continue;
    }
    __syncwarp();
    store_accumulator<T, kKeys, Shape::kWeightPitch>(weights, mean);
    __syncwarp();
    Math::template nn<kKeys, D, Shape::kWeightPitch, kPitch>(acc, weights, key_tile);
  }
  wait_copies<0>();
  __syncthreads();  // the queries' copies have landed, even where there was no key: their place is used again
  if (!active) return;
  if (p.self_k != nullptr)
    add_own_rows<T, D, kPitch>(acc, own_grad, own_queries,
                               rows_of<T>(p.self_k, p.kv_heads, p.d, tile.begin + own_row, kv_head),
                               tile.rows - own_row);
  const float scale[2] = {p.scale, p.scale};
  scale_rows<D>(acc, scale);
  write_accumulator<T, D, kPitch>(acc, own_queries, grad_q, own_row, tile.rows, 0);
}

}  // namespace

int launch_cross_attn_backward_queries(const CrossAttnParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    using Shape = BackwardShape<Math, D>;
    return launch_tiles<Shape>(cross_attn_backward_queries<Math, D>, params, most_tiles(params.total_q, params.groups),
                               params.q_heads, kTileRows / Shape::kRows, stream);
  });
}

}  // namespace vista::cuda
