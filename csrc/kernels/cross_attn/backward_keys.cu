// dV = P^T dO and dK = scale * dS^T Q: a block keeps a tile of K and V of one head and streams the queries of the
// groups that read its sequence, in ascending order, head by head. So each gradient has one writer, and one order of
// summation. Where those are too many rows for a block they are cut into chunks (plan.cuh), whose sums
// cross_attn_reduce_keys adds up in their order.
#include "backward.cuh"
#include "parts.cuh"

namespace vista::cuda {
namespace {

// A chunk of the query rows that read a sequence, in tiles of at most kRows, each once for each query head.
template <int kRows>
class Readers {
 public:
  int64_t row = 0;  // packed
  int64_t head;

  // `left` rows from the sequence's row `begin` on, or as many as there are. By whole warps.
  __device__ Readers(const CrossAttnParams& p, const Plan& plan, int64_t sequence, int64_t kv_head, int64_t begin,
                     int64_t left)
      : range_(p, plan), left_(left), first_head_(kv_head * (p.q_heads / p.kv_heads)) {
    head = first_head_;
    const int32_t first = range_.first(sequence);
    end_reader_ = range_.first(sequence + 1);
    if (first == end_reader_) return;
    const int64_t before = range_.rows_before(first);
    const auto starts_by = [&](int64_t i) {
      return range_.rows_before(first + static_cast<int32_t>(i)) - before <= begin;
    };
    reader_ = first + static_cast<int32_t>(last_before(end_reader_ - first, starts_by));
    take_group(begin - (range_.rows_before(reader_) - before));
    next_rows();
  }

  __device__ bool any() const { return row < end_row_; }
  __device__ int rows() const { return static_cast<int>(end_row_ - row < kRows ? end_row_ - row : kRows); }

  __device__ void advance() {
    if (++head < first_head_ + range_.p.q_heads / range_.p.kv_heads) return;
    head = first_head_;
    row += kRows;
    next_rows();
  }

 private:
  const ReaderRange range_;
  int64_t end_row_ = 0, left_, first_head_;
  int32_t reader_, end_reader_;

  __device__ void take_group(int64_t skipped) {
    const int64_t group = range_.group(reader_), end = index_at(range_.p.q_offsets, group + 1);
    row = index_at(range_.p.q_offsets, group) + skipped;
    end_row_ = end < row + left_ ? end : row + left_;
    left_ -= end_row_ - row;
  }

  __device__ void next_rows() {
    while (row >= end_row_ && ++reader_ < end_reader_) take_group(0);
  }
};

// A key tile and a chunk of the rows that read it.
struct KeyItem {
  bool exists;
  int64_t tile;  // of Plan::key_tiles
  int64_t chunk, chunk_rows, chunks;
  int64_t partial = -1;  // where its sums go, if there are several chunks

  __device__ KeyItem(const CrossAttnParams& p, const Plan& plan, int64_t index) {
    exists = index < plan.key_items[p.sequences + 1];
    if (!exists) return;
    const int64_t sequence = last_before(p.sequences + 1, [&](int64_t i) { return plan.key_items[i] <= index; });
    const int64_t within = index - plan.key_items[sequence];
    const int64_t tiles = plan.key_tiles[sequence + 1] - plan.key_tiles[sequence];
    chunks = (plan.key_items[sequence + 1] - plan.key_items[sequence]) / tiles;
    chunk = within % chunks;
    chunk_rows = chunks > 1 ? kChunkRows * tiles : p.total_q;
    tile = plan.key_tiles[sequence] + within / chunks;
    if (chunks > 1) partial = plan.partial_items[sequence] + within;
  }
};

// Rows of a warp and columns from `first` on, of which there are `columns`.
template <int N>
__device__ inline void write_partial(const Accumulator<N>& acc, float* to, int64_t columns, int first) {
  const int column = first + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (column + 8 * j < columns)
        *reinterpret_cast<float2*>(to + (lane_id() / 4 + 8 * half) * columns + column + 8 * j) = {acc[j][2 * half],
                                                                                                  acc[j][2 * half + 1]};
}

template <class Math, int D>
__global__ void __launch_bounds__(BackwardShape<Math, D>::kThreads, BackwardShape<Math, D>::kBlocks)
    cross_attn_backward_keys(const CrossAttnParams p) {
  using Shape = BackwardShape<Math, D>;
  using T = typename Shape::T;
  constexpr int kPitch = Shape::kPitch, kQueries = Shape::kColumns, kThreads = Shape::kThreads;
  constexpr int kSlice = Shape::kSlice, kParts = kTileRows / Shape::kRows, kSlices = D / kSlice;
  const Plan plan(p, true);
  const int64_t kv_head = blockIdx.x % p.kv_heads;
  const int64_t rest = blockIdx.x / p.kv_heads;
  const int first_column = static_cast<int>(rest % kSlices) * kSlice;
  const int first_row = static_cast<int>(rest / kSlices % kParts) * Shape::kRows;
  const KeyItem item(p, plan, rest / (kParts * kSlices));
  Tile tile;
  if (!item.exists || !find_tile(plan.key_tiles, p.kv_offsets, p.sequences, p.total_kv, kTileRows, item.tile, first_row,
                                 Shape::kRows, tile))
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
  Readers<kQueries> readers(p, plan, tile.part, kv_head, item.chunk * item.chunk_rows, item.chunk_rows);
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
  if (item.partial >= 0) {
    float* partial = plan.partials + (item.partial * p.kv_heads + kv_head) * kTileRows * (p.d + p.e);
    const int row = first_row + own_row;
    write_partial<kSlice>(sum_k, partial + row * p.d, p.d, first_column);
    return write_partial<kSlice>(sum_v, partial + kTileRows * p.d + row * p.e, p.e, first_column);
  }
  const float scale[2] = {p.scale, p.scale};
  scale_rows<kSlice>(sum_k, scale);
  write_accumulator<T, kSlice, kPitch>(sum_k, keys + own_row * kPitch, grad_k, own_row, tile.rows, first_column);
  write_accumulator<T, kSlice, kPitch>(sum_v, values + own_row * kPitch, grad_v, own_row, tile.rows, first_column);
}

constexpr int kReduceThreads = 256;

// A block for each partial tile and key/value head, of which those of a first chunk have something to do.
template <class T>
__global__ void __launch_bounds__(kReduceThreads) cross_attn_reduce_keys(const CrossAttnParams p) {
  const Plan plan(p, true);
  const int64_t kv_head = blockIdx.x % p.kv_heads, partial = blockIdx.x / p.kv_heads;
  if (partial >= plan.partial_items[p.sequences]) return;
  const int64_t sequence = last_before(p.sequences, [&](int64_t i) { return plan.partial_items[i] <= partial; });
  const KeyItem item(p, plan, plan.key_items[sequence] + partial - plan.partial_items[sequence]);
  Tile tile;
  if (item.chunk > 0 ||
      !find_tile(plan.key_tiles, p.kv_offsets, p.sequences, p.total_kv, kTileRows, item.tile, 0, kTileRows, tile))
    return;
  const int64_t stride = p.kv_heads * kTileRows * (p.d + p.e);  // from chunk to chunk
  const auto reduce = [&](void* to, int64_t columns, int64_t first, float scale) {
    const float* from = plan.partials + (partial * p.kv_heads + kv_head) * kTileRows * (p.d + p.e) + first;
    const Rows<T> rows = results_of<T>(to, p.kv_heads, columns, tile.begin, kv_head);
    for (int i = threadIdx.x; i < tile.rows * columns / 2; i += kReduceThreads) {
      float2 sum{0.f, 0.f};
      for (int64_t chunk = 0; chunk < item.chunks; ++chunk) {
        const float2 part = load_pair(from + chunk * stride + 2 * i);
        sum = {sum.x + part.x, sum.y + part.y};
      }
      const int row = static_cast<int>(2 * i / columns), column = static_cast<int>(2 * i % columns);
      store_pair(rows.at(row) + column, Pair<T>::pack({scale * sum.x, scale * sum.y}));
    }
  };
  reduce(p.grad_k, p.d, 0, p.scale);
  reduce(p.grad_v, p.e, kTileRows * p.d, 1.f);
}

}  // namespace

int launch_cross_attn_backward_keys(const CrossAttnParams& params, Stream stream) {
  return dispatch(params, [&](auto math, auto dim) {
    using Math = decltype(math);
    constexpr int D = decltype(dim)::value;
    using Shape = BackwardShape<Math, D>;
    const int64_t partials = most_partials(params);
    const int error = launch_tiles<Shape>(cross_attn_backward_keys<Math, D>, params,
                                          most_tiles(params.total_kv, params.sequences) + partials, params.kv_heads,
                                          kTileRows / Shape::kRows * (D / Shape::kSlice), stream);
    if (error != cudaSuccess || partials == 0 || params.sequences == 0) return error;
    cross_attn_reduce_keys<typename Math::T>
        <<<static_cast<unsigned>(partials * params.kv_heads), kReduceThreads, 0, static_cast<cudaStream_t>(stream)>>>(
            params);
    return static_cast<int>(cudaGetLastError());
  });
}

}  // namespace vista::cuda
