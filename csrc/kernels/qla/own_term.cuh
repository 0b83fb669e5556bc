// The own term of target rows, and its gradients. A warp works on 16 rows; 8 of its lanes on one row at a time, with
// 16-byte reads of q, k, v and grad_out from global memory, where q and grad_out were read a moment before.
#pragma once

#include "rows.cuh"

namespace vista::cuda {

// <phi(a), phi(b)> in all 8 lanes; 0 where n is 0.
template <class T>
__device__ inline float row_dot(Activation kind, const T* a, const T* b, int64_t n) {
  float sum = 0.f;
#pragma unroll 1
  for (int64_t i = lane_id() % 8 * kPerVector<T>; i < n; i += 8 * kPerVector<T>) {
    float x[kPerVector<T>], y[kPerVector<T>];
    unpack_vector<T>(load_vector(a + i), x);
    unpack_vector<T>(load_vector(b + i), y);
    activate<T>(kind, x);
    activate<T>(kind, y);
#pragma unroll
    for (int j = 0; j < kPerVector<T>; ++j) sum = fmaf(x[j], y[j], sum);
  }
  for (int step = 1; step < 8; step *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  return sum;
}

// Sixteen packed rows from `row` on: the first `rows` exist, those in [first, rows) are targets.
struct TargetTile {
  int64_t row;
  int rows, first;
  __device__ TargetTile(const QlaParams& p, const Work& w, int64_t row, int64_t end)
      : row(row), rows(end - row < 16 ? static_cast<int>(end - row) : 16), first(16) {
    if (p.own_term && w.source_end < row + 16) first = w.source_end > row ? static_cast<int>(w.source_end - row) : 0;
  }
  __device__ bool any() const { return first < rows; }
  __device__ bool is_target(int r) const { return first <= r && r < rows; }
};

// Rows of one tensor of the targets to shared memory, zeros for the others.
template <class T, int kColumns, int kPitch>
__device__ inline void stage_targets(T* shared, const TargetTile& tile, const T* global, int64_t stride,
                                     int64_t columns) {
  for_each_vector<T, 16, kColumns, 32>(lane_id(), [&](int row, int column) {
    uint4 bits = {0, 0, 0, 0};
    if (tile.is_target(row) && column < columns) bits = load_vector(global + row * stride + column);
    store_vector(shared + row * kPitch + column, bits);
  });
}

// acc += scale * <phi(q), phi(k)> v, with v's columns [first_column, first_column + N). Uses `shared` (16 rows of kPitch)
// and factors (16 floats), both the warp's own.
template <class T, int N, int kPitch>
__device__ inline void add_own_term(Accumulator<N>& acc, const QlaParams& p, const Work& w, const TargetTile& tile,
                                    int first_column, T* shared, float* factors) {
  const float scale = scale_of(p, w.sequence, w.source_end - w.first);
  const T* q = rows_at(static_cast<const T*>(p.q), p, tile.row, w.head, p.d);
  const T* k = rows_at(static_cast<const T*>(p.k), p, tile.row, w.head, p.d);
  const T* v = rows_at(static_cast<const T*>(p.v), p, tile.row, w.head, p.e) + first_column;
#pragma unroll 1
  for (int r = lane_id() / 8; r < 16; r += 4) {
    const int64_t at = r * p.heads * p.d;
    const float dot = row_dot<T>(p.activation, q + at, k + at, tile.is_target(r) ? p.d : 0);
    if (lane_id() % 8 == 0) factors[r] = scale * dot;
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

// With x = scale * <grad_out, v>: grad_k = phi'(k) x phi(q), kColumns of it from first_column on, and, if write_values,
// grad_v = scale * <phi(q), phi(k)> grad_out. Leaves for grad_q what it needs: the rows of k in `shared`, x in pulls.
template <class T, int kColumns, int kPitch>
__device__ inline void own_term_backward(const QlaParams& p, const Work& w, const TargetTile& tile, int first_column,
                                         bool write_values, T* shared, float* pulls) {
  const float scale = scale_of(p, w.sequence, w.source_end - w.first);
  const T* q = rows_at(static_cast<const T*>(p.q), p, tile.row, w.head, p.d);
  const T* k = rows_at(static_cast<const T*>(p.k), p, tile.row, w.head, p.d);
  const T* v = rows_at(static_cast<const T*>(p.v), p, tile.row, w.head, p.e);
  const T* grad = rows_at(static_cast<const T*>(p.grad_out), p, tile.row, w.head, p.e);
  T* grad_k = rows_at(static_cast<T*>(p.grad_k), p, tile.row, w.head, p.d);
  T* grad_v = rows_at(static_cast<T*>(p.grad_v), p, tile.row, w.head, p.e);
  const int64_t lane_column = lane_id() % 8 * kPerVector<T>;
#pragma unroll 1
  for (int r = lane_id() / 8; r < 16; r += 4) {
    const bool target = tile.is_target(r);
    const int64_t at_d = r * p.heads * p.d, at_e = r * p.heads * p.e;
    const float own = scale * row_dot<T>(p.activation, q + at_d, k + at_d, target ? p.d : 0);
    const float pull = scale * row_dot<T>(Activation::kIdentity, grad + at_e, v + at_e, target ? p.e : 0);
    if (lane_id() % 8 == 0) pulls[r] = pull;
    if (!target) continue;
    const int64_t last = first_column + kColumns < p.d ? first_column + kColumns : p.d;
#pragma unroll 1
    for (int64_t i = first_column + lane_column; i < last; i += 8 * kPerVector<T>) {
      float query[kPerVector<T>], key[kPerVector<T>], slope[kPerVector<T>];
      unpack_vector<T>(load_vector(q + at_d + i), query);
      unpack_vector<T>(load_vector(k + at_d + i), key);
      activate<T>(p.activation, query);
      activate_with_slope<T>(p.activation, key, slope);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) key[j] = slope[j] * (pull * query[j]);
      store_vector(grad_k + at_d + i, pack_vector<T>(key));
    }
#pragma unroll 1
    for (int64_t i = lane_column; write_values && i < p.e; i += 8 * kPerVector<T>) {
      float value[kPerVector<T>];
      unpack_vector<T>(load_vector(grad + at_e + i), value);
#pragma unroll
      for (int j = 0; j < kPerVector<T>; ++j) value[j] *= own;
      store_vector(grad_v + at_e + i, pack_vector<T>(value));
    }
  }
  stage_targets<T, kColumns, kPitch>(shared, tile, k + first_column, p.heads * p.d, p.d - first_column);
  __syncwarp();
}

// acc, a gradient of phi(rows), becomes the gradient of rows. kKeep leaves phi(rows) in their place.
template <class T, int N, int kPitch, bool kKeep>
__device__ inline void through_activation(Accumulator<N>& acc, Activation kind, T* rows) {
  T* at = rows + lane_id() / 4 * kPitch + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 upper = load_pair(at + 8 * j), lower = load_pair(at + 8 * j + 8 * kPitch);
    float x[4] = {upper.x, upper.y, lower.x, lower.y}, slope[4];
    activate_with_slope<T>(kind, x, slope);
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[j][i] *= slope[i];
    if constexpr (kKeep) {
      store_pair(at + 8 * j, Pair<T>::pack({x[0], x[1]}));
      store_pair(at + 8 * j + 8 * kPitch, Pair<T>::pack({x[2], x[3]}));
    }
  }
}

// acc += x phi(k), from what own_term_backward left
template <class T, int N, int kPitch>
__device__ inline void add_pull(Accumulator<N>& acc, Activation kind, const T* keys, const float* pulls) {
  const int g = lane_id() / 4;
  const T* at = keys + g * kPitch + lane_id() % 4 * 2;
#pragma unroll
  for (int j = 0; j < N / 8; ++j) {
    const float2 upper = load_pair(at + 8 * j), lower = load_pair(at + 8 * j + 8 * kPitch);
    float x[4] = {upper.x, upper.y, lower.x, lower.y};
    activate<T>(kind, x);
    acc[j][0] = fmaf(pulls[g], x[0], acc[j][0]);
    acc[j][1] = fmaf(pulls[g], x[1], acc[j][1]);
    acc[j][2] = fmaf(pulls[g + 8], x[2], acc[j][2]);
    acc[j][3] = fmaf(pulls[g + 8], x[3], acc[j][3]);
  }
}

}  // namespace vista::cuda
