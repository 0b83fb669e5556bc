// Work items: a sequence is cut, by its own length only, into chunks of chunk_rows rows; one block works on one chunk
// of one head. The rows behind the last sequence form a pseudo-sequence whose chunks are only written with zeros.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/indices.cuh"
#include "vista/cuda/qla.h"

namespace vista::cuda {

// What precedes a sequence: its first item, and its first slot among the partial sums, of which only sequences of more
// than one chunk have any. A sequence without rows has an item all the same: somebody must write its state.
struct alignas(8) Start {
  int32_t item, slot;
};

// Bounds that the host knows. The device's plan has exact numbers.
inline int64_t most_items(const QlaParams& p) { return p.total / p.chunk_rows + p.batch + 1; }
inline int64_t most_slots(const QlaParams& p) {
  const int64_t full = p.total / p.chunk_rows;
  return p.batch == 0 || p.max_seq_len <= p.chunk_rows ? 0 : full + (p.batch < full ? p.batch : full);
}

// starts [batch + 2]: of the sequences, of the padding, and the totals
__host__ __device__ inline Start* plan_of(const QlaParams& p) { return static_cast<Start*>(p.workspace); }
__host__ __device__ inline int64_t plan_bytes(const QlaParams& p) {
  return ceil_div((p.batch + 2) * static_cast<int64_t>(sizeof(Start)), 256) * 256;
}
// [slots, heads, d, e]
__host__ __device__ inline float* partials_of(const QlaParams& p) {
  return reinterpret_cast<float*>(static_cast<char*>(p.workspace) + plan_bytes(p));
}

__device__ inline int64_t targets_of(const QlaParams& p, int64_t sequence) {
  return p.num_targets.data == nullptr ? 0 : index_at(p.num_targets, sequence);
}

// Small enough to stay in registers beside the accumulators.
struct Work {
  int64_t begin;    // first packed row of the chunk
  int32_t rows;     // of the chunk
  int32_t sources;  // of them, the first ones; the others are targets
  int32_t sequence;
  int32_t slot;  // of the chunk's partial sum
  float scale;   // of the sequence
  int head;
  int slice;  // of kSlices
  bool padding;
  bool first;            // chunk of its sequence
  bool is_all;           // the sequence has no other chunk
  bool has_all_sources;  // no other chunk has sources, if this is the first

  // Rows [0, product_rows) have a result, [product_rows, zero_end) are written with zeros. Gradients of keys and values
  // concern source rows; targets get theirs from the own term, if there is one.
  __device__ int product_rows(bool of_sources) const { return padding ? 0 : (of_sources ? sources : rows); }
  __device__ int zero_end(bool of_sources, bool own_term) const {
    return padding || (of_sources && !own_term) ? rows : product_rows(of_sources);
  }
};

__device__ inline float scale_of(const QlaParams& p, int64_t sequence, int64_t sources) {
  if (p.attn_scale != nullptr) return p.attn_scale[sequence];
  return 1.f / static_cast<float>(sources > 1 ? sources : 1);
}

__device__ inline int32_t clamp_to_chunk(const QlaParams& p, int64_t rows) {
  return static_cast<int32_t>(rows < 0 ? 0 : (rows < p.chunk_rows ? rows : p.chunk_rows));
}

// Where item `item` is, for what does not depend on the head. False for an item beyond the work.
__device__ inline bool find_item(const QlaParams& p, int32_t item, Work& w) {
  const Start* starts = plan_of(p);
  if (item >= starts[p.batch + 1].item) return false;
  const int64_t sequence = last_before(p.batch + 1, [&](int64_t i) { return starts[i].item <= item; });
  const Start start = starts[sequence];
  const int32_t chunk = item - start.item;
  w.sequence = static_cast<int32_t>(sequence);
  w.slot = start.slot + chunk;
  w.padding = sequence == p.batch;
  w.first = chunk == 0;
  const int64_t first = index_at(p.seq_offsets, sequence);
  const int64_t end = w.padding ? p.total : index_at(p.seq_offsets, sequence + 1);
  const int64_t sources = end - first - (w.padding ? 0 : targets_of(p, sequence));
  const int64_t before = chunk * p.chunk_rows;
  w.begin = first + before;
  w.rows = clamp_to_chunk(p, end - w.begin);
  w.sources = clamp_to_chunk(p, sources - before);
  w.scale = w.padding ? 1.f : scale_of(p, sequence, sources);
  w.is_all = end - first <= p.chunk_rows;
  w.has_all_sources = sources <= p.chunk_rows;
  return true;
}

// False for a block beyond the work. Heads vary fastest: the rows of neighbouring heads are neighbours in memory.
template <int kSlices>
__device__ inline bool find_work(const QlaParams& p, Work& w) {
  const int64_t heads = p.heads;
  const int64_t rest = blockIdx.x / heads;
  w.head = static_cast<int>(blockIdx.x % heads);
  w.slice = static_cast<int>(rest % kSlices);
  return find_item(p, static_cast<int32_t>(rest / kSlices), w);
}

}  // namespace vista::cuda
