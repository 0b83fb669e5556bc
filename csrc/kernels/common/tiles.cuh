// Tiles of rows between global and shared memory, in 16-byte vectors that belong to the same thread in every function
// here: what a thread copied asynchronously it may change after its own wait, before any barrier.
#pragma once

#include "async_copy.cuh"
#include "mma.cuh"

namespace vista::cuda {

// Row-major elements of a 16-byte padded row: an odd pitch in 16-byte units, which keeps ldmatrix off bank conflicts.
template <class T>
constexpr int padded(int columns) {
  return columns + kPerVector<T>;
}

// The vectors of a tile that are one thread's: of one column, kStep rows apart.
template <class T, int kRows, int kColumns, int kThreads>
struct Share {
  static constexpr int kVectors = kColumns / kPerVector<T>, kStep = kThreads / kVectors;
  static constexpr int kCount = kRows < kStep ? 1 : kRows / kStep;
  static_assert(kThreads % kVectors == 0 && (kRows % kStep == 0 || kRows < kStep));

  int row, column;
  __device__ explicit Share(int thread) : row(thread / kVectors), column(thread % kVectors * kPerVector<T>) {
    // 8 threads access shared memory at once. Of 64-byte rows, padded to 80, they take two that are four rows apart:
    // neighbours would share a bank.
    if (kVectors == 4) row = row / 8 * 8 + row % 2 * 4 + row % 8 / 2;
    // Of 32-byte rows, padded to 48, four, every other one.
    if (kVectors == 2) row = row / 8 * 8 + row % 4 * 2 + row % 8 / 4;
  }

  template <class F>
  __device__ void for_each(F f) const {
    if (kRows < kStep && row >= kRows) return;
#pragma unroll
    for (int i = 0; i < kCount; ++i) f(row + i * kStep);
  }
};

// Zeros beyond `rows` and `columns`.
template <class T, int kRows, int kColumns, int kPitch, int kThreads>
__device__ inline void copy_rows(T* shared, const T* global, int64_t stride, int rows, int64_t columns, int thread) {
  const Share<T, kRows, kColumns, kThreads> share(thread);
  // One pointer that walks: addresses kept from tile to tile would cost the registers of an accumulator.
  const T* from = global + share.row * stride + share.column;
  share.for_each([&](int row) {
    const bool valid = row < rows && share.column < columns;
    copy_async(shared + row * kPitch + share.column, valid ? from : global, valid);
    from += share.kStep * stride;
  });
}

template <class T, int kRows, int kColumns, int kPitch, int kThreads>
__device__ inline void store_rows(const T* shared, T* global, int64_t stride, int rows, int64_t columns, int thread) {
  const Share<T, kRows, kColumns, kThreads> share(thread);
  T* to = global + share.row * stride + share.column;
  share.for_each([&](int row) {
    if (row < rows && share.column < columns) write_vector(to, load_vector(shared + row * kPitch + share.column));
    to += share.kStep * stride;
  });
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
