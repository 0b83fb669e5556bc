// The own term of target rows, and its gradients. A warp works on 16 rows; 8 of its lanes on one row at a time, with
// 16-byte reads of q, k, v and grad_out from global memory, where q and grad_out were read a moment before.
#pragma once

#include "../common/row_dot.cuh"
#include "rows.cuh"

namespace vista::cuda {

// Sixteen rows of a chunk from its row `at` on: the first `rows` exist, those in [first, rows) are targets.
struct TargetTile {
  int64_t row;  // packed
  int rows, first;
  __device__ TargetTile(const Work& w, int at)
      : row(w.begin + at), rows(w.rows - at < 16 ? w.rows - at : 16), first(w.sources > at ? w.sources - at : 0) {}
  __device__ bool any() const { return first < rows; }
  __device__ bool is_target(int r) const { return first <= r && r < rows; }
};

// Rows of one tensor of the targets to shared memory, zeros for the others.
template <class T, int kColumns, int kPitch>
__device__ inline void stage_targets(T* shared, const TargetTile& tile, const T* global, int64_t stride,
                                     int64_t columns) {
  const Share<T, 16, kColumns, 32> share(lane_id());
  share.for_each([&](int row) {
    uint4 bits = {0, 0, 0, 0};
    if (tile.is_target(row) && share.column < columns) bits = load_vector(global + row * stride + share.column);
    store_vector(shared + row * kPitch + share.column, bits);
  });
}

// acc += scale * <phi(q), phi(k)> v, with v's columns [first_column, first_column + N). Uses `shared` (16 rows of
// kPitch) and factors (16 floats), both the warp's own.
template <class T, int N, int kPitch>
__device__ inline void add_own_term(Accumulator<N>& acc, const QlaParams& p, const Work& w, const TargetTile& tile,
                                    int first_column, T* shared, float* factors) {
  const T* q = rows_at(static_cast<const T*>(p.q), p, tile.row, w.head, p.d);
  const T* k = rows_at(static_cast<const T*>(p.k), p, tile.row, w.head, p.d);
  const T* v = rows_at(static_cast<const T*>(p.v), p, tile.row, w.head, p.e) + first_column;
#pragma unroll 1
  for (int r = lane_id() / 8; r < 16; r += 4) {
    const int64_t at = r * p.heads * p.d;
    const float dot = row_dot<T>(p.activation, q + at, k + at, tile.is_target(r) ? p.d : 0);
    if (lane_id() % 8 == 0) factors[r] = w.scale * dot;
  }
  stage_targets<T, N, kPitch>(shared, tile, v, p.heads * p.e, p.e - first_column);
  __syncwarp();
  const int g = lane_id() / 4;
  const T* at = shared + g * kPitch + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 upper = load_pair(at + 8 * j), lower = load_pair(at + 8 * j + 8 * kPitch);
    acc[j][0] = fmaf(factors[g], upper.x, acc[j][0]);
    acc[j][1] = fmaf(factors[g], upper.y, acc[j][1]);
    acc[j][2] = fmaf(factors[g + 8], lower.x, acc[j][2]);
    acc[j][3] = fmaf(factors[g + 8], lower.y, acc[j][3]);
  }
}

// f(r) for each target row, in all 8 lanes of its group
template <class F>
__device__ inline void for_each_target(const TargetTile& tile, F f) {
#pragma unroll 1
  for (int r = lane_id() / 8; r < 16; r += 4)
    if (tile.is_target(r)) f(r);
}

// With x = scale * <grad_out, v>: grad_k = phi'(k) x phi(q), kColumns of it from first_column on, and, if write_values,
// grad_v = scale * <phi(q), phi(k)> grad_out. Leaves for grad_q what it needs: the rows of k in `shared`, x in pulls
// (32 floats, of which the last 16 are scratch). Three loops, so that few addresses live beside the accumulators.
template <class T, int kColumns, int kPitch>
__device__ inline void own_term_backward(const QlaParams& p, const Work& w, const TargetTile& tile, int first_column,
                                         bool write_values, T* shared, float* pulls) {
  const T* q = rows_at(static_cast<const T*>(p.q), p, tile.row, w.head, p.d);
  const T* k = rows_at(static_cast<const T*>(p.k), p, tile.row, w.head, p.d);
  const T* grad = rows_at(static_cast<const T*>(p.grad_out), p, tile.row, w.head, p.e);
  const int lane_column = lane_id() % 8 * kPerVector<T>;
  float* factors = pulls + 16;
#pragma unroll 1
  for (int r = lane_id() / 8; r < 16; r += 4) {
    const T* v = rows_at(static_cast<const T*>(p.v), p, tile.row + r, w.head, p.e);
    const int64_t at = r * p.heads * p.d;
    const float own = row_dot<T>(p.activation, q + at, k + at, tile.is_target(r) ? p.d : 0);
    const float pull = row_dot<T>(Activation::kIdentity, grad + r * p.heads * p.e, v, tile.is_target(r) ? p.e : 0);
    if (lane_id() % 8 == 0) pulls[r] = w.scale * pull, factors[r] = w.scale * own;
  }
  stage_targets<T, kColumns, kPitch>(shared, tile, k + first_column, p.heads * p.d, p.d - first_column);
  __syncwarp();
  for_each_target(tile, [&](int r) {
    const T* query_row = q + r * p.heads * p.d + first_column;
    T* grad_k = rows_at(static_cast<T*>(p.grad_k), p, tile.row + r, w.head, p.d);
#pragma unroll 1
    for (int i = lane_column; i < kColumns && first_column + i < p.d; i += 8 * kPerVector<T>) {
      float query[kPerVector<T>], key[kPerVector<T>];
      unpack_vector<T>(load_vector(query_row + i), query);
      unpack_vector<T>(load_vector(shared + r * kPitch + i), key);
      with_activation(p.activation, [&](auto phi) {
#pragma unroll
        for (int j = 0; j < kPerVector<T>; ++j)
          key[j] = phi.template slope<T>(key[j]) * (pulls[r] * phi.template value<T>(query[j]));
      });
      write_vector(grad_k + first_column + i, pack_vector<T>(key));
    }
  });
  __syncwarp();  // `shared` is free for grad_q to replace the keys, once they are read
  if (!write_values) return;
  for_each_target(tile, [&](int r) {
    const T* grad_row = grad + r * p.heads * p.e;
    T* grad_v = rows_at(static_cast<T*>(p.grad_v), p, tile.row + r, w.head, p.e);
#pragma unroll 1
    for (int i = lane_column; i < p.e; i += 8 * kPerVector<T>) {
      float value[kPerVector<T>];
      unpack_vector<T>(load_vector(grad_row + i), value);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) value[j] *= factors[r];
      write_vector(grad_v + i, pack_vector<T>(value));
    }
  });
}

// acc, a gradient of phi(rows), becomes the gradient of rows. kKeep leaves phi(rows) in their place.
template <class T, int N, int kPitch, bool kKeep>
__device__ inline void through_activation(Accumulator<N>& acc, Activation kind, T* rows) {
  T* at = rows + lane_id() / 4 * kPitch + lane_id() % 4 * 2;
  with_activation(kind, [&](auto phi) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        T* pair = at + 8 * j + 8 * half * kPitch;
        float2 x = load_pair(pair);
        acc[j][2 * half] *= phi.template slope<T>(x.x);
        acc[j][2 * half + 1] *= phi.template slope<T>(x.y);
        if constexpr (kKeep) store_pair(pair, Pair<T>::pack(x));
      }
  });
}

// acc += x phi(k), from what own_term_backward left
template <class T, int N, int kPitch>
__device__ inline void add_pull(Accumulator<N>& acc, Activation kind, const T* keys, const float* pulls) {
  const int g = lane_id() / 4;
  const T* at = keys + g * kPitch + lane_id() % 4 * 2;
  with_activation(kind, [&](auto phi) {
#pragma unroll
    for (int j = 0; j < N / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 key = load_pair(at + 8 * j + 8 * half * kPitch);
        acc[j][2 * half] = fmaf(pulls[g + 8 * half], phi.template value<T>(key.x), acc[j][2 * half]);
        acc[j][2 * half + 1] = fmaf(pulls[g + 8 * half], phi.template value<T>(key.y), acc[j][2 * half + 1]);
      }
  });
}

}  // namespace vista::cuda
