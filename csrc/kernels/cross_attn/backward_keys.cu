// dV = P^T dO and dK = scale * dS^T Q: a block keeps a tile of K and V of one head and streams the queries of all
// groups that read its sequence, in ascending order, head by head. So each gradient has one writer, and one order of
// summation. A sequence that thousands of groups read is the work of few blocks (one a key tile and head).
#include "backward.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

// The query tiles that read a sequence, of at most kRows rows, each once for each query head.
template <int kRows>
class Readers {
 public:
  int64_t row = 0;  // packed
  int64_t head;

  __device__ Readers(const CrossAttnParams& p, const Plan& plan, int64_t sequence, int64_t kv_head)
      : p_(p), plan_(plan), first_head_(kv_head * (p.q_heads / p.kv_heads)) {
    head = first_head_;
    const bool each_its_own = p.kv_index.data == nullptr;
    reader_ = (each_its_own ? static_cast<int32_t>(sequence) : plan.first_reader[sequence]) - 1;
    end_reader_ = each_its_own ? static_cast<int32_t>(sequence) + 1 : plan.first_reader[sequence + 1];
    next_rows();
  }

  __device__ bool any() const { return row < end_row_; }
  __device__ int rows() const { return static_cast<int>(end_row_ - row < kRows ? end_row_ - row : kRows); }

  __device__ void advance() {
    if (++head < first_head_ + p_.q_heads / p_.kv_heads) return;
    head = first_head_;
    row += kRows;
    next_rows();
  }

 private:
  const CrossAttnParams& p_;
  const Plan& plan_;
  int64_t end_row_ = 0, first_head_;
  int32_t reader_, end_reader_;

  __device__ void next_rows() {
    while (row >= end_row_ && ++reader_ < end_reader_) {
      const int64_t group = p_.kv_index.data == nullptr ? reader_ : plan_.readers[reader_];
      row = index_at(p_.q_offsets, group);
      end_row_ = index_at(p_.q_offsets, group + 1);
    }
  }
};

template <class Math, int D>
__global__ void __launch_bounds__(BackwardShape<Math, D>::kThreads, BackwardShape<Math, D>::kBlocks)
    cross_attn_backward_keys(const CrossAttnParams p) {
  using Shape = BackwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kQueries = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kSlice = Shape::kSlice, kParts = kTileRows / Shape::kRows, kSlices = D / kSlice;
  const Plan plan(p, true);
  const int64_t kv_head = blockIdx.x % p.kv_heads;
  const int64_t rest = blockIdx.x / p.kv_heads, item = rest / (kParts * kSlices);
  const int first_column = static_cast<int>(rest % kSlices) * kSlice;
  Tile tile;
  if (!find_tile(plan.key_tiles, p.kv_offsets, p.sequences, p.total_kv, kTileRows, item,
                 static_cast<int>(rest / kSlices % kParts) * Shape::kRows, Shape::kRows, tile))
    return;
  const Rows<T> grad_k = results_of<T>(p.grad_k, p.kv_heads, p.d, tile.begin, kv_head);
  const Rows<T> grad_v = results_of<T>(p.grad_v, p.kv_heads, p.e, tile.begin, kv_head);
  if (tile.padding) {
    if (first_column > 0) return;
    zero_rows(grad_k, tile.rows);
    return zero_rows(grad_v, tile.rows);
  }

  extern __shared__ uint4 shared[];
  const int own_row = threadIdx.x / 32 * 16;
  T* keys = reinterpret_cast<T*>(shared);
  T* values = keys + Shape::kRows * kPitch;
  T* ring = values + Shape::kRows * kPitch;  // a stage: queries, then gradients of their outputs
  T* weights = ring + Shape::kPlaces * 2 * Shape::kTile + own_row * Shape::kWeightPitch;  // the warp's own
  // lse and delta of a streamed row wait in the padding of its Q and dO.
  const auto padding_of = [&](T* row) { return reinterpret_cast<float*>(row + D); };
  const auto copy_queries = [&](const Readers<kQueries>& from, int stage) {
    if (from.any()) {
      T* to = ring + stage * 2 * Shape::kTile;
      copy_tile<T, kQueries, D, kThreads>(to, rows_of<T>(p.q, p.q_heads, p.d, from.row, from.head), from.rows());
      copy_tile<T, kQueries, D, kThreads>(to + Shape::kTile,
                                          rows_of<T>(p.grad_out, p.q_heads, p.e, from.row, from.head), from.rows());
      if (threadIdx.x < kQueries) {
        const bool valid = static_cast<int>(threadIdx.x) < from.rows();
        const int64_t at = (from.row + threadIdx.x) * p.q_heads + from.head;
        *padding_of(to + threadIdx.x * kPitch) = valid ? p.lse[at] : INFINITY;  // which makes P zero
        *padding_of(to + Shape::kTile + threadIdx.x * kPitch) = valid ? plan.delta[at] : 0.f;
      }
    }
    commit_copies();
  };

  copy_tile<T, Shape::kRows, D, kThreads>(keys, rows_of<T>(p.k, p.kv_heads, p.d, tile.begin, kv_head), tile.rows);
  copy_tile<T, Shape::kRows, D, kThreads>(values, rows_of<T>(p.v, p.kv_heads, p.e, tile.begin, kv_head), tile.rows);
  Readers<kQueries> readers(p, plan, tile.part, kv_head);
  copy_queries(readers, 0);
  const bool active = own_row < tile.rows;
  Accumulator<kSlice> sum_k, sum_v;
  clear<kSlice>(sum_k);
  clear<kSlice>(sum_v);
  for (int stage = 0; readers.any(); stage ^= 1) {
    T* query_tile = ring + stage * 2 * Shape::kTile;
    T* grad_tile = query_tile + Shape::kTile;
    wait_copies<0>();
    __syncthreads();  // the tile is there for all, and nobody reads the other stage any more
    readers.advance();
    copy_queries(readers, stage ^ 1);
    if (!active) continue;
    Accumulator<kQueries> scores, mean;
    dot_rows<Math, D, kQueries, kPitch>(scores, keys + own_row * kPitch, query_tile);
    dot_rows<Math, D, kQueries, kPitch>(mean, values + own_row * kPitch, grad_tile);
    probabilities<T, kQueries>(scores, mean, p.scale, kQueries, [&](int, int column) {
      return float2{*padding_of(query_tile + column * kPitch), *padding_of(grad_tile + column * kPitch)};
    });
    __syncwarp();
    store_accumulator<T, kQueries, Shape::kWeightPitch>(weights, scores);
    __syncwarp();
    Math::template nn<kQueries, kSlice, Shape::kWeightPitch, kPitch>(sum_v, weights, grad_tile + first_column);
    __syncwarp();
    store_accumulator<T, kQueries, Shape::kWeightPitch>(weights, mean);
    __syncwarp();
    Math::template nn<kQueries, kSlice, Shape::kWeightPitch, kPitch>(sum_k, weights, query_tile + first_column);
  }
  wait_copies<0>();
  __syncthreads();  // the keys' copies have landed, even where nobody reads them: their place is used again
  if (!active) return;
  const float scale[2] = {p.scale, p.scale};
  scale_rows<kSlice>(sum_k, scale);
  write_accumulator<T, kSlice, kPitch>(sum_k, keys + own_row * kPitch, grad_k, own_row, tile.rows, first_column);
  write_accumulator<T, kSlice, kPitch>(sum_v, values + own_row * kPitch, grad_v, own_row, tile.rows, first_column);
}

}  // namespace

int launch_cross_attn_backward_keys(const CrossAttnParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    using Shape = BackwardShape<Math, D>;
    return launch_tiles<Shape>(cross_attn_backward_keys<Math, D>, params, most_tiles(params.total_kv, params.sequences),
                               params.kv_heads, kTileRows / Shape::kRows * (D / Shape::kSlice), stream);
  });
}

}  // namespace vista::cuda
