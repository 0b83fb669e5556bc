// Tiles of rows between global and shared memory, in 16-byte vectors that belong to the same thread in every function
// here: what a thread copied asynchronously it may change after its own wait, before any barrier.
#pragma once

#include "../common/activation.cuh"
#include "../common/async_copy.cuh"
#include "../common/mma.cuh"
#include "plan.cuh"

namespace vista::cuda {

// Row-major elements of a 16-byte padded row: an odd pitch in 16-byte units, which keeps ldmatrix off bank conflicts.
template <class T>
constexpr int padded(int columns) {
  return columns + kPerVector<T>;
}

template <class T>
__device__ inline T* rows_at(T* rows, const QlaParams& p, int64_t row, int head, int64_t columns) {
  return rows + (row * p.heads + head) * columns;
}

// f(row, column) for this thread's vectors, all in one column.
template <class T, int kRows, int kColumns, int kThreads, class F>
__device__ inline void for_each_vector(int thread, F f) {
  constexpr int kVectors = kColumns / kPerVector<T>, kStep = kThreads / kVectors;
  static_assert(kThreads % kVectors == 0 && (kRows % kStep == 0 || kRows < kStep));
  const int row = thread / kVectors, column = thread % kVectors * kPerVector<T>;
  if (kRows < kStep && row >= kRows) return;
#pragma unroll
  for (int i = 0; i < ceil_div(kRows, kStep); ++i) f(row + i * kStep, column);
}

// Zeros beyond `rows` and `columns`.
template <class T, int kRows, int kColumns, int kPitch, int kThreads>
__device__ inline void copy_rows(T* shared, const T* global, int64_t stride, int rows, int64_t columns, int thread) {
  for_each_vector<T, kRows, kColumns, kThreads>(thread, [&](int row, int column) {
    const bool valid = row < rows && column < columns;
    copy_async(shared + row * kPitch + column, valid ? global + row * stride + column : global, valid);
  });
}

template <class T, int kRows, int kColumns, int kPitch, int kThreads>
__device__ inline void activate_rows(T* shared, Activation kind, int thread) {
  if (kind == Activation::kIdentity) return;
  for_each_vector<T, kRows, kColumns, kThreads>(thread, [&](int row, int column) {
    T* at = shared + row * kPitch + column;
    float x[kPerVector<T>];
    unpack_vector<T>(load_vector(at), x);
    activate<T>(kind, x);
    store_vector(at, pack_vector<T>(x));
  });
}

template <class T, int kRows, int kColumns, int kPitch, int kThreads>
__device__ inline void store_rows(const T* shared, T* global, int64_t stride, int rows, int64_t columns, int thread) {
  for_each_vector<T, kRows, kColumns, kThreads>(thread, [&](int row, int column) {
    if (row < rows && column < columns)
      store_vector(global + row * stride + column, load_vector(shared + row * kPitch + column));
  });
}

// Rows [begin, end) of one head, `columns` of them from `first` on, by the whole block.
template <class T>
__device__ inline void zero_rows(void* rows, const QlaParams& p, int64_t begin, int64_t end, int head, int64_t width,
                                 int64_t first, int64_t columns) {
  const int vectors = static_cast<int>(columns / kPerVector<T>);
  for (int64_t i = threadIdx.x; i < (end - begin) * vectors; i += blockDim.x)
    store_vector(rows_at(static_cast<T*>(rows), p, begin + i / vectors, head, width) + first +
                     i % vectors * kPerVector<T>,
                 uint4{0, 0, 0, 0});
}

// A warp's accumulator as rows of T. kPitch in elements.
template <class T, int N, int kPitch>
__device__ inline void store_accumulator(T* shared, const Accumulator<N>& acc) {
  T* at = shared + lane_id() / 4 * kPitch + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    store_pair(at + 8 * j, Pair<T>::pack({acc[j][0], acc[j][1]}));
    store_pair(at + 8 * j + 8 * kPitch, Pair<T>::pack({acc[j][2], acc[j][3]}));
  }
}

}  // namespace vista::cuda
