// The quasi-linear attention kernels, compiled once per instruction set (qla_base.cpp, qla_avx2.cpp, qla_avx512.cpp).
// Every one streams a chunk in blocks of kBlock rows that fit the first-level cache beside the d x e state.
#pragma once

#include "vector_math.h"
#include "vista/qla.h"

namespace vista::cpu {
namespace VISTA_ISA {

constexpr int64_t kBlock = 32;

struct Scratch {
  float *rows_d[4], *rows_e[2], *matrix[2];
  Scratch(float* base, int64_t d, int64_t e) {
    for (float*& rows : rows_d) rows = base, base += kBlock * pad(d);
    for (float*& rows : rows_e) rows = base, base += kBlock * pad(e);
    for (float*& m : matrix) m = base, base += pad(d) * pad(e);
  }
};

struct Task {
  const QlaChunk& chunk;
  int64_t head;
  Task(const QlaParams& p, int64_t task) : chunk(p.chunks[task / p.heads]), head(task % p.heads) {}
};

// A head's rows lie apart by those of the other heads, too far for the processor to guess what comes next. Each row
// asks for the one a block later, into the second-level cache: the first has room for too few requests. It may ask past
// the end of a tensor: a hint never faults.
inline void expect_row(const QlaParams& p, const void* base, int64_t at, int64_t n) {
  const int64_t size = p.dtype == DType::kFloat ? 4 : 2;
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) + (at + kBlock * p.heads * n) * size;
  for (int64_t line = 0; line < n * size; line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(first + line), 0, 2);
}

inline void load_block(const QlaParams& p, const void* base, int64_t row, int64_t head, int64_t rows, int64_t n,
                       float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ((row + r) * p.heads + head) * n;
    expect_row(p, base, at, n);
    load_row(p.dtype, base, at, to + r * pad(n), n, pad(n));
  }
}

inline void store_block(const QlaParams& p, void* base, int64_t row, int64_t head, int64_t rows, int64_t n,
                        const float* from) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ((row + r) * p.heads + head) * n;
    expect_row(p, base, at, n);
    store_row(p.dtype, base, at, from + r * pad(n), n);
  }
}

// P = phi2(scale * Z), [d, pad(e)]
inline void make_map(const QlaParams& p, const Task& task, float* map) {
  const float scale = p.scale[task.chunk.seq];
  const float* state = p.state + (task.chunk.seq * p.heads + task.head) * p.d * p.e;
  for (int64_t i = 0; i < p.d; ++i) {
    float* row = map + i * pad(p.e);
    for (int64_t j = 0; j < p.e; ++j) row[j] = scale * state[i * p.e + j];
    for (int64_t j = p.e; j < pad(p.e); ++j) row[j] = 0.f;
    activate(p.state_activation, row, row, nullptr, pad(p.e));
  }
}

// Sums go through a padded accumulator and are copied out without the padding.
inline void copy_out(const float* matrix, int64_t d, int64_t e, float* to) {
  for (int64_t i = 0; i < d; ++i) std::memcpy(to + i * e, matrix + i * pad(e), e * 4);
}

inline int64_t clamp_to(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

void qla_state(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    std::memset(s.matrix[0], 0, p.d * pad(p.e) * 4);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kBlock) {
      const int64_t rows = end - row < kBlock ? end - row : kBlock;
      load_block(p, p.k, row, task.head, rows, p.d, s.rows_d[0]);
      activate(p.activation, s.rows_d[0], s.rows_d[0], nullptr, rows * pad(p.d));
      load_block(p, p.v, row, task.head, rows, p.e, s.rows_e[0]);
      product(p.d, pad(p.e), rows, s.rows_d[0], 1, pad(p.d), s.rows_e[0], pad(p.e), s.matrix[0], pad(p.e), true);
    }
    copy_out(s.matrix[0], p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
}

void qla_apply(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    make_map(p, task, s.matrix[0]);
    const float scale = p.scale[task.chunk.seq];
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kBlock) {
      const int64_t rows = task.chunk.end - row < kBlock ? task.chunk.end - row : kBlock;
      load_block(p, p.q, row, task.head, rows, p.d, s.rows_d[0]);
      activate(p.activation, s.rows_d[0], s.rows_d[0], nullptr, rows * pad(p.d));
      product(rows, pad(p.e), p.d, s.rows_d[0], pad(p.d), 1, s.matrix[0], pad(p.e), s.rows_e[0], pad(p.e), false);
      const int64_t first = p.own_term ? clamp_to(task.chunk.source_end - row, 0, rows) : rows;
      if (first < rows) {
        load_block(p, p.k, row + first, task.head, rows - first, p.d, s.rows_d[1]);
        activate(p.activation, s.rows_d[1], s.rows_d[1], nullptr, (rows - first) * pad(p.d));
        load_block(p, p.v, row + first, task.head, rows - first, p.e, s.rows_e[1]);
        for (int64_t r = first; r < rows; ++r) {
          float own = 0.f;
          for (int64_t i = 0; i < p.d; ++i)
            own += s.rows_d[0][r * pad(p.d) + i] * s.rows_d[1][(r - first) * pad(p.d) + i];
          own *= scale;
          float* out = s.rows_e[0] + r * pad(p.e);
          const float* value = s.rows_e[1] + (r - first) * pad(p.e);
          for (int64_t j = 0; j < pad(p.e); j += kLanes) store(out + j, load(out + j) + own * load(value + j));
        }
      }
      store_block(p, p.out, row, task.head, rows, p.e, s.rows_e[0]);
    }
  }
}

void qla_apply_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e);
  float *query = s.rows_d[0], *slope = s.rows_d[1], *grad_query = s.rows_d[2], *key = s.rows_d[3];
  float *grad = s.rows_e[0], *value = s.rows_e[1], *map_t = s.matrix[0], *sum = s.matrix[1];
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    const float scale = p.scale[task.chunk.seq];
    make_map(p, task, sum);
    std::memset(map_t, 0, p.e * dp * 4);
    for (int64_t i = 0; i < p.d; ++i)
      for (int64_t j = 0; j < p.e; ++j) map_t[j * dp + i] = sum[i * ep + j];
    std::memset(sum, 0, p.d * ep * 4);
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kBlock) {
      const int64_t rows = task.chunk.end - row < kBlock ? task.chunk.end - row : kBlock;
      load_block(p, p.q, row, task.head, rows, p.d, query);
      activate(p.activation, query, query, slope, rows * dp);
      load_block(p, p.grad_out, row, task.head, rows, p.e, grad);
      product(p.d, ep, rows, query, 1, dp, grad, ep, sum, ep, true);
      product(rows, dp, p.e, grad, ep, 1, map_t, dp, grad_query, dp, false);
      const int64_t first = p.own_term ? clamp_to(task.chunk.source_end - row, 0, rows) : rows;
      for (int64_t r = first; r < rows; ++r) {
        const int64_t packed = (row + r) * p.heads + task.head;
        float *own_slope = key + dp, *own_grad = key + 2 * dp;
        load_row(p.dtype, p.k, packed * p.d, key, p.d, dp);
        activate(p.activation, key, key, own_slope, dp);
        load_row(p.dtype, p.v, packed * p.e, value, p.e, ep);
        float own = 0.f;
        for (int64_t i = 0; i < p.d; ++i) own += query[r * dp + i] * key[i];
        own *= scale;
        const float pull = scale * dot(grad + r * ep, value, ep);
        for (int64_t i = 0; i < dp; i += kLanes) {
          store(own_grad + i, load(own_slope + i) * (pull * load(query + r * dp + i)));
          store(grad_query + r * dp + i, load(grad_query + r * dp + i) + pull * load(key + i));
        }
        store_row(p.dtype, p.grad_k, packed * p.d, own_grad, p.d);
        for (int64_t j = 0; j < ep; j += kLanes) store(value + j, own * load(grad + r * ep + j));
        store_row(p.dtype, p.grad_v, packed * p.e, value, p.e);
      }
      for (int64_t i = 0; i < rows * dp; i += kLanes) store(grad_query + i, load(grad_query + i) * load(slope + i));
      store_block(p, p.grad_q, row, task.head, rows, p.d, grad_query);
    }
    copy_out(sum, p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
}

void qla_state_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e);
  float *key = s.rows_d[0], *slope = s.rows_d[1], *grad_key = s.rows_d[2];
  float *value = s.rows_e[0], *grad_value = s.rows_e[1], *grad_state = s.matrix[0], *grad_state_t = s.matrix[1];
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    const float* from = p.grad_state + (task.chunk.seq * p.heads + task.head) * p.d * p.e;
    std::memset(grad_state, 0, p.d * ep * 4);
    std::memset(grad_state_t, 0, p.e * dp * 4);
    for (int64_t i = 0; i < p.d; ++i)
      for (int64_t j = 0; j < p.e; ++j) grad_state[i * ep + j] = grad_state_t[j * dp + i] = from[i * p.e + j];
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kBlock) {
      const int64_t rows = end - row < kBlock ? end - row : kBlock;
      load_block(p, p.k, row, task.head, rows, p.d, key);
      activate(p.activation, key, key, slope, rows * dp);
      load_block(p, p.v, row, task.head, rows, p.e, value);
      product(rows, dp, p.e, value, ep, 1, grad_state_t, dp, grad_key, dp, false);
      for (int64_t i = 0; i < rows * dp; i += kLanes) store(grad_key + i, load(grad_key + i) * load(slope + i));
      store_block(p, p.grad_k, row, task.head, rows, p.d, grad_key);
      product(rows, ep, p.d, key, dp, 1, grad_state, ep, grad_value, ep, false);
      store_block(p, p.grad_v, row, task.head, rows, p.e, grad_value);
    }
  }
}

void qla_state_gradient(Activation kind, float scale, const float* state, const float* w, const float* extra,
                        float* grad_state, int64_t n) {
  float x[kLanes], value[kLanes], slope[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    const int64_t left = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < kLanes; ++j) x[j] = j < left ? scale * state[i + j] : 0.f;
    activate(kind, x, value, slope, kLanes);
    for (int64_t j = 0; j < left; ++j)
      grad_state[i + j] = scale * slope[j] * w[i + j] + (extra != nullptr ? extra[i + j] : 0.f);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
