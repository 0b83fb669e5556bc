// Work items: query groups and key sequences are cut, by their own length only, into tiles of so many rows; a block
// works on one tile, or a part of it, of one head. The rows behind the last group (sequence) form a pseudo-group whose
// tiles are only written with zeros.
#pragma once

#include "../common/indices.cuh"
#include "vista/cuda/cross_attn.h"

namespace vista::cuda {

constexpr int kTileRows = 64;  // but for the runs of queries of the forward

// A key tile whose readers have more query rows than this, times the key tiles of its sequence, is the work of several
// blocks, whose sums are reduced in order. So workspace for them is some fraction of the queries, whatever the lengths.
constexpr int kChunkRows = 4096;

__host__ __device__ inline int64_t chunks_of(int64_t query_rows, int64_t key_tiles) {
  const int64_t chunks = ceil_div(query_rows, kChunkRows * key_tiles);
  return chunks > 1 ? chunks : 1;
}

// By the layout: a cache without slots has no address.
__host__ __device__ inline bool reads_cache(const CrossAttnParams& p) { return p.cache.k_layout.tokens > 0; }

// A bound that the host knows. The device's plan has exact numbers.
inline int64_t most_tiles(int64_t total, int64_t parts, int tile_rows = kTileRows) {
  return total / tile_rows + parts + 1;
}

// More than tiles * chunks of all sequences of several chunks: those have tiles * kChunkRows < rows.
__host__ __device__ inline int64_t most_partials(const CrossAttnParams& p) { return 2 * p.total_q / kChunkRows; }

// Where the parts of the workspace are.
struct Plan {
  int32_t* query_tiles;    // [groups + 2] tiles before each group, before the padding, and in all
  int32_t* key_tiles;      // [sequences + 2] likewise
  int32_t* first_reader;   // [sequences + 1] into `readers`
  int32_t* readers;        // [groups] groups by the sequence that they read, in ascending order for each
  int32_t* sorting;        // [groups] on the way there
  int32_t* reader_rows;    // [groups + 1] query rows of the readers before
  int32_t* key_items;      // [sequences + 2] tiles, each once for each chunk of query rows, like key_tiles
  int32_t* partial_items;  // [sequences + 1] those of sequences of several chunks
  float* partials;         // [most_partials, kv_heads, kTileRows, d + e] sums of a chunk: of dK, then of dV
  // [total_q, q_heads] each, of the backward: delta = mean gradient of a row's probabilities, less grad_lse; the
  // probability of the own item, and the gradient of its scaled score
  float *delta, *own_weight, *own_grad;
  size_t bytes;

  __host__ __device__ Plan(const CrossAttnParams& p, bool backward) {
    char* const base = static_cast<char*>(p.workspace);
    char* end = base;
    const auto take = [&](int64_t entries) {
      char* const at = end;
      end += ceil_div(entries * 4, 256) * 256;
      return at;
    };
    query_tiles = reinterpret_cast<int32_t*>(take(p.groups + 2));
    key_tiles = reinterpret_cast<int32_t*>(take(p.sequences + 2));
    const int64_t readers_kept = backward && p.kv_index.data != nullptr;
    first_reader = reinterpret_cast<int32_t*>(take(readers_kept * (p.sequences + 1)));
    readers = reinterpret_cast<int32_t*>(take(readers_kept * p.groups));
    sorting = reinterpret_cast<int32_t*>(take(readers_kept * p.groups));
    reader_rows = reinterpret_cast<int32_t*>(take(readers_kept * (p.groups + 1)));
    key_items = reinterpret_cast<int32_t*>(take(backward * (p.sequences + 2)));
    partial_items = reinterpret_cast<int32_t*>(take(backward * (p.sequences + 1)));
    const int64_t partial_floats = most_partials(p) * p.kv_heads * kTileRows * (p.d + p.e);
    partials = reinterpret_cast<float*>(take(backward * partial_floats));
    const int64_t rows = backward ? p.total_q * p.q_heads : 0;
    delta = reinterpret_cast<float*>(take(rows));
    own_weight = reinterpret_cast<float*>(take(rows));
    own_grad = reinterpret_cast<float*>(take(rows));
    bytes = end - base;
  }
};

__device__ inline int64_t sequence_of(const CrossAttnParams& p, int64_t group) {
  return p.kv_index.data == nullptr ? group : index_at(p.kv_index, group);
}

// Readers of a sequence: a range of Plan::readers; of the groups, where each reads its own.
struct ReaderRange {
  const CrossAttnParams& p;
  const Plan& plan;
  const bool each_its_own;

  __device__ ReaderRange(const CrossAttnParams& params, const Plan& with)
      : p(params), plan(with), each_its_own(params.kv_index.data == nullptr) {}

  __device__ int32_t first(int64_t sequence) const {
    return each_its_own ? static_cast<int32_t>(sequence) : plan.first_reader[sequence];
  }
  __device__ int64_t group(int32_t reader) const { return each_its_own ? reader : plan.readers[reader]; }
  __device__ int64_t rows_before(int32_t reader) const {
    return each_its_own ? index_at(p.q_offsets, reader) : plan.reader_rows[reader];
  }
  __device__ int64_t rows_of(int64_t sequence) const {
    return rows_before(first(sequence + 1)) - rows_before(first(sequence));
  }
};

// A tile of packed query or key rows.
struct Tile {
  int64_t part;   // group or sequence
  int64_t begin;  // first packed row
  int rows;
  bool padding;
};

// Row `first` of tile `item` on, at most `most` rows of it, where tiles have `tile_rows`. False for an item beyond the
// plan, or nothing left of it.
__device__ inline bool find_tile(const int32_t* starts, const Indices& offsets, int64_t parts, int64_t total,
                                 int tile_rows, int64_t item, int first, int most, Tile& tile) {
  if (item >= starts[parts + 1]) return false;
  tile.part = last_before(parts + 1, [&](int64_t i) { return starts[i] <= item; });
  tile.padding = tile.part == parts;
  const int64_t end = tile.padding ? total : index_at(offsets, tile.part + 1);
  tile.begin = index_at(offsets, tile.part) + (item - starts[tile.part]) * tile_rows + first;
  const int64_t left = end - tile.begin;
  tile.rows = static_cast<int>(left < most ? left : most);
  return left > 0;
}

}  // namespace vista::cuda
