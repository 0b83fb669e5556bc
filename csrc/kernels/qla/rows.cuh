// Rows of a chunk: where they are, their activation in shared memory, and zeros.
#pragma once

#include "../common/activation.cuh"
#include "../common/tiles.cuh"
#include "plan.cuh"

namespace vista::cuda {

template <class T>
__device__ inline T* rows_at(T* rows, const QlaParams& p, int64_t row, int head, int64_t columns) {
  return rows + (row * p.heads + head) * columns;
}

template <class T, int kRows, int kColumns, int kPitch, int kThreads>
__device__ inline void activate_rows(T* shared, Activation kind, int thread) {
  if (kind == Activation::kIdentity) return;
  const Share<T, kRows, kColumns, kThreads> share(thread);
  with_activation(kind, [&](auto phi) {
    share.for_each([&](int row) {
      T* at = shared + row * kPitch + share.column;
      float x[kPerVector<T>];
      unpack_vector<T>(load_vector(at), x);
      phi.template apply<T>(x);
      store_vector(at, pack_vector<T>(x));
    });
  });
}

// Rows [begin, end) of a chunk, of each `columns` out of `width` from `first` on, by the whole block.
template <class T>
__device__ inline void zero_rows(void* rows, const QlaParams& p, const Work& w, int begin, int end, int64_t width,
                                 int64_t first, int64_t columns) {
  const int vectors = static_cast<int>(columns / kPerVector<T>);
  for (int64_t i = threadIdx.x; i < static_cast<int64_t>(end - begin) * vectors; i += blockDim.x)
    write_vector(rows_at(static_cast<T*>(rows), p, w.begin + begin + i / vectors, w.head, width) + first +
                     i % vectors * kPerVector<T>,
                 uint4{0, 0, 0, 0});
}

}  // namespace vista::cuda
