// dQ = scale * dS K, and what the own item adds: a block keeps a tile of Q and dO of one head and streams the keys and
// values of its sequence. In fp32 it does so twice: delta = rowsum(dO * O) - grad_lse carries the rounding of O,
// against which gradients that should cancel (a softmax over one key has none) are not small, so that a first pass
// corrects it by what is left of sum(dS). In 16 bits the rounding of the inputs hides that.
#include "backward.cuh"
#include "keys.cuh"
#include "parts.cuh"
#include "ring.cuh"

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
  if (!find_tile(plan.query_tiles, p.q_offsets, p.groups, p.total_q, kTileRows, rest / kSlices,
                 static_cast<int>(rest % kSlices) * Shape::kRows, Shape::kRows, tile))
    return;
  const Rows<T> grad_q = results_of<T>(p.grad_q, p.q_heads, p.d, tile.begin, head);
  if (tile.padding) return zero_rows(grad_q, tile.rows);

  extern __shared__ uint4 shared[];
  const int own_row = threadIdx.x / 32 * 16;
  T* queries = reinterpret_cast<T*>(shared);
  T* grads = queries + Shape::kRows * kPitch;
  T* ring_tiles = grads + Shape::kRows * kPitch;  // a place: keys, then values
  T* weights = ring_tiles + Shape::kPlaces * 2 * Shape::kTile + own_row * Shape::kWeightPitch;  // the warp's own
  T* own_queries = queries + own_row * kPitch;

  const int kv_head = head / static_cast<int>(p.q_heads / p.kv_heads);
  const PackedKeys<T> source(p, tile.part, kv_head);
  const int tiles = static_cast<int>(ceil_div(source.count, kKeys)), steps = tiles * (kCorrectDelta<T> ? 2 : 1);
  const auto copy_keys = [&](int step, int place) {
    T* to = ring_tiles + place * 2 * Shape::kTile;
    if (step < steps) source.template copy<kKeys, D, kThreads>(to, to + Shape::kTile, step % tiles);
  };

  copy_tile<T, Shape::kRows, D, kThreads>(queries, rows_of<T>(p.q, p.q_heads, p.d, tile.begin, head), tile.rows);
  copy_tile<T, Shape::kRows, D, kThreads>(grads, rows_of<T>(p.grad_out, p.q_heads, p.e, tile.begin, head), tile.rows);
  Ring<Shape::kPlaces, decltype(copy_keys)> ring(copy_keys);  // with the first tile come the queries
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
  float sum[2] = {0.f, 0.f};  // of dS, this thread's columns
  for (int step = 0; step < steps; ++step) {
    const T* key_tile = ring_tiles + ring.arrive(step) * 2 * Shape::kTile;
    if (!active) continue;
    Accumulator<kKeys> scores, mean;
    dot_rows<Math, D, kKeys, kPitch>(scores, own_queries, key_tile);
    dot_rows<Math, D, kKeys, kPitch>(mean, grads + own_row * kPitch, key_tile + Shape::kTile);
    const int64_t left = source.count - static_cast<int64_t>(step % tiles) * kKeys;
    probabilities<T, kKeys>(scores, mean, p.scale, static_cast<int>(left < kKeys ? left : kKeys),
                            [&](int half, int) { return float2{lse[half], delta[half]}; });
    if (kCorrectDelta<T> && step < tiles) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[i / 2] += mean[j][i];
      if (step < tiles - 1) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (int other = 1; other < 4; other *= 2) sum[half] += __shfl_xor_sync(0xffffffffu, sum[half], other);
        const int row = own_row + lane_id() / 4 + 8 * half;
        const int64_t at = (tile.begin + row) * p.q_heads + head;
        if (row >= tile.rows) continue;
        const float change = sum[half] + own_grad[half] - (p.grad_lse != nullptr ? p.grad_lse[at] : 0.f);
        delta[half] += change;
        if (p.self_k != nullptr) own_grad[half] -= plan.own_weight[at] * change;
        if (lane_id() % 4 != 0) continue;
        plan.delta[at] = delta[half];
        if (p.self_k != nullptr) plan.own_grad[at] = own_grad[half];
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
