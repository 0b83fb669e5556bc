// Where the keys and values of a group come from, and how tiles of one head of them get into shared memory.
#pragma once

#include "../cache_rows/access.cuh"
#include "rows.cuh"

namespace vista::cuda {

// Packed rows of a sequence.
template <class T>
class PackedKeys {
 public:
  int64_t count;

  __device__ PackedKeys(const CrossAttnParams& p, int64_t group, int kv_head) : p_(p), head_(kv_head) {
    const int64_t sequence = sequence_of(p, group);
    begin_ = index_at(p.kv_offsets, sequence);
    count = index_at(p.kv_offsets, sequence + 1) - begin_;
  }

  __device__ bool values_are_keys() const { return false; }

  // By the whole block: a tile of kRows rows, zeros behind the last. Asynchronous.
  template <int kRows, int D, int kThreads>
  __device__ void copy(T* keys, T* values, int tile) const {
    const int64_t row = static_cast<int64_t>(tile) * kRows;
    const int left = static_cast<int>(count - row < kRows ? count - row : kRows);
    copy_tile<T, kRows, D, kThreads>(keys, rows_of<T>(p_.k, p_.kv_heads, p_.d, begin_ + row, head_), left);
    copy_tile<T, kRows, D, kThreads>(values, rows_of<T>(p_.v, p_.kv_heads, p_.e, begin_ + row, head_), left);
  }

 private:
  const CrossAttnParams& p_;
  int64_t begin_;
  int head_;
};

// One head of a quantized row.
struct CodedRow {
  const uint8_t *codes, *scales, *biases;
  uint32_t dim, group;
  int column, columns;

  __device__ CodedRow(const uint8_t* row, const RowLayout& layout, int head, int64_t head_dim)
      : codes(row),
        scales(row + layout.scales_offset),
        biases(row + layout.biases_offset),
        dim(static_cast<uint32_t>(layout.dim)),
        group(static_cast<uint32_t>(layout.group)),
        column(head * static_cast<int>(head_dim)),
        columns(static_cast<int>(head_dim)) {}
};

// Tokens from `first` on as rows of T; zeros beyond `tokens`, of which there is one, and the columns. All loads come
// before the first store: waiting for them once is most of the time that this takes.
template <RowScheme kScheme, class T, int kRows, int D, int kThreads>
__device__ inline void dequantize_tile(T* shared, const CodedRow& from, int first, int tokens) {
  using Part = Share<T, kRows, D, kThreads>;
  constexpr int kValues = kPerVector<T>, kCodesPerByte = rows::kValuesPerByte<kScheme>;
  constexpr int kWordValues = 4 * kCodesPerByte;
  constexpr bool kBiased = kScheme == RowScheme::kInt4;
  const Part part(threadIdx.x);
  const bool exists = part.column < from.columns;
  const uint32_t column = from.column + (exists ? part.column : 0);
  // Groups have 32 values or the whole token, so that a vector meets one or two: values from `left` on are the
  // second's.
  const uint32_t group = column / from.group, groups = from.dim / from.group;
  const int left = static_cast<int>((group + 1) * from.group - column);
  const uint32_t second = left < kValues ? 2 : 0;
  uint32_t words[Part::kCount][2];
  float scales[Part::kCount][2], biases[Part::kCount][2];
#pragma unroll
  for (int i = 0; i < Part::kCount; ++i) {
    const int row = part.row + i * Part::kStep;
    const uint32_t token = first + (row < tokens ? row : 0), at = 2 * (token * groups + group);
    rows::load_codes<kValues / kCodesPerByte>(from.codes + (token * from.dim + column) / kCodesPerByte, words[i]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      scales[i][j] = rows::load_half<true>(from.scales + at + j * second);
      biases[i][j] = kBiased ? rows::load_half<true>(from.biases + at + j * second) : 0.f;
    }
  }
  int i = 0;
  part.for_each([&](int row) {
    float x[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const float scale = v < left ? scales[i][0] : scales[i][1], bias = v < left ? biases[i][0] : biases[i][1];
      x[v] = rows::decode<kScheme>(words[i][v / kWordValues], v % kWordValues, scale, bias);
    }
    const uint4 zeros{0, 0, 0, 0};
    store_vector(shared + row * padded<T>(D) + part.column, exists && row < tokens ? pack_vector<T>(x) : zeros);
    ++i;
  });
}

// The rows at a group's slot; none where there is no such slot.
template <class T>
class CachedKeys {
 public:
  int count;

  __device__ CachedKeys(const CrossAttnParams& p, int64_t group, int kv_head) : p_(p), head_(kv_head) {
    const int64_t slot = index_at(p.cache.slots, group);
    slot_ = static_cast<int>(slot);
    count = slot >= 0 && slot < p.cache.num_slots ? static_cast<int>(p.cache.k_layout.tokens) : 0;
  }

  __device__ bool values_are_keys() const { return p_.cache.k_rows == p_.cache.v_rows; }

  // The same, but not asynchronous.
  template <int kRows, int D, int kThreads>
  __device__ void copy(T* keys, T* values, int tile) const {
    const int row = tile * kRows;
    const RowScheme scheme = p_.cache.k_layout.scheme;
    if (scheme == RowScheme::kInt8)
      copy_both<RowScheme::kInt8, kRows, D, kThreads>(keys, values, row);
    else if (scheme == RowScheme::kInt4)
      copy_both<RowScheme::kInt4, kRows, D, kThreads>(keys, values, row);
    else
      copy_both<RowScheme::kFp8E4M3, kRows, D, kThreads>(keys, values, row);
  }

 private:
  const CrossAttnParams& p_;
  int slot_, head_;

  template <RowScheme kScheme, int kRows, int D, int kThreads>
  __device__ void copy_both(T* keys, T* values, int row) const {
    const CachedRows& cache = p_.cache;
    const int left = count - row < kRows ? count - row : kRows;
    CodedRow from(cache.k_rows + slot_ * cache.k_layout.row_bytes, cache.k_layout, head_, p_.d);
    dequantize_tile<kScheme, T, kRows, D, kThreads>(keys, from, row, left);
    if (values_are_keys()) return;
    from = CodedRow(cache.v_rows + slot_ * cache.v_layout.row_bytes, cache.v_layout, head_, p_.e);
    dequantize_tile<kScheme, T, kRows, D, kThreads>(values, from, row, left);
  }
};

}  // namespace vista::cuda
