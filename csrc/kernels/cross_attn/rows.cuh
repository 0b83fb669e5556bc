// Rows of one head in packed tensors, own items, and what is done to a warp's accumulator of 16 rows. Thread
// (g = lane / 4, t = lane % 4) holds columns of the rows g and g + 8 (common/mma.cuh): `half` 0 and 1 here.
#pragma once

#include "../common/row_dot.cuh"
#include "../common/tiles.cuh"
#include "plan.cuh"

namespace vista::cuda {

// Packed rows [total, heads, columns], seen from `row` on, one head.
template <class T>
struct Rows {
  T* data;
  int64_t stride, columns;

  __device__ Rows(T* base, int64_t heads, int64_t columns, int64_t row, int64_t head)
      : data(base + (row * heads + head) * columns), stride(heads * columns), columns(columns) {}

  __device__ T* at(int64_t row) const { return data + row * stride; }
};

template <class T>
__device__ inline Rows<const T> rows_of(const void* base, int64_t heads, int64_t columns, int64_t row, int64_t head) {
  return {static_cast<const T*>(base), heads, columns, row, head};
}

template <class T>
__device__ inline Rows<T> results_of(void* base, int64_t heads, int64_t columns, int64_t row, int64_t head) {
  return {static_cast<T*>(base), heads, columns, row, head};
}

template <class T, int kRows, int D, int kThreads>
__device__ inline void copy_tile(T* shared, const Rows<const T>& from, int rows) {
  copy_rows<T, kRows, D, padded<T>(D), kThreads>(shared, from.data, from.stride, rows, from.columns, threadIdx.x);
}

// What a warp can move at once of a row.
template <class T, int N>
constexpr int kWarpColumns = N * sizeof(T) <= 512 ? N : 512 / static_cast<int>(sizeof(T));

// 16 rows of a warp's own. Asynchronous.
template <class T, int N, int kPitch>
__device__ inline void copy_own_rows(T* shared, const Rows<const T>& from, int rows) {
  constexpr int kColumns = kWarpColumns<T, N>;
#pragma unroll
  for (int column = 0; column < N; column += kColumns)
    copy_rows<T, 16, kColumns, kPitch, 32>(shared + column, from.data + column, from.stride, rows,
                                           from.columns - column, lane_id());
}

// By the whole block.
template <class T>
__device__ inline void zero_rows(const Rows<T>& to, int rows) {
  const int vectors = static_cast<int>(to.columns) / kPerVector<T>;
  for (int i = threadIdx.x; i < rows * vectors; i += blockDim.x)
    write_vector(to.at(i / vectors) + i % vectors * kPerVector<T>, uint4{0, 0, 0, 0});
}

// A warp's 16 rows of N columns: through `shared`, its own, to memory. Columns from `first` on, of which `to` has some.
template <class T, int N, int kPitch>
__device__ inline void write_accumulator(const Accumulator<N>& acc, T* shared, const Rows<T>& to, int row, int rows,
                                         int first) {
  __syncwarp();
  store_accumulator<T, N, kPitch>(shared, acc);
  __syncwarp();
  constexpr int kColumns = kWarpColumns<T, N>;
#pragma unroll
  for (int column = 0; column < N; column += kColumns)
    store_rows<T, 16, kColumns, kPitch, 32>(shared + column, to.at(row) + first + column, to.stride, rows - row,
                                            to.columns - first - column, lane_id());
}

// scores = A B^T of rows of D. In fp32 a long row is summed in parts: short chains of additions round less.
template <class Math, int D, int N, int kPitch>
__device__ inline void dot_rows(Accumulator<N>& scores, const typename Math::T* a, const typename Math::T* b) {
  constexpr int kPart = sizeof(typename Math::T) == 4 && D > 64 ? 64 : D;
  clear<N>(scores);
#pragma unroll 1
  for (int first = 0; first < D; first += kPart) {
    Accumulator<N> part;
    clear<N>(part);
    Math::template nt<kPart, N, kPitch, kPitch>(part, a + first, b + first);
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[j][i] += part[j][i];
  }
}

template <int N>
__device__ inline void scale_rows(Accumulator<N>& acc, const float (&factor)[2]) {
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] *= factor[i / 2];
}

// acc += factor * own rows, which pass through `shared`, the warp's own. `own` begins at the warp's first row.
template <class T, int N, int kPitch>
__device__ inline void add_own_rows(Accumulator<N>& acc, const float (&factor)[2], T* shared, const Rows<const T>& own,
                                    int rows) {
  __syncwarp();
  copy_own_rows<T, N, kPitch>(shared, own, rows);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  const T* at = shared + lane_id() / 4 * kPitch + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float2 two = load_pair(at + 8 * j + 8 * half * kPitch);
      acc[j][2 * half] = fmaf(factor[half], two.x, acc[j][2 * half]);
      acc[j][2 * half + 1] = fmaf(factor[half], two.y, acc[j][2 * half + 1]);
    }
}

}  // namespace vista::cuda
