// The quasi-linear attention kernels, compiled once per instruction set (qla_base.cpp, qla_avx2.cpp, qla_avx512.cpp).
// Every one streams a chunk in blocks of kBlock rows that fit the first-level cache beside the d x e state.
#pragma once

#include "qla_common.h"

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

// A head's rows lie apart by those of the other heads, too far for the processor to guess what comes next: the products
// of a block ask for the rows of the next one, a few at a time, since the processor waits where it has too many
// requests open. Into the second-level cache: the first holds the block at hand. May ask past the end of a tensor: a
// hint never faults.
class Ahead {
 public:
  // `calls`: over how many calls to spread the requests
  Ahead(const QlaParams& p, int64_t row, int64_t head, int64_t calls)
      : dtype_size_(p.dtype == DType::kFloat ? 4 : 2),
        first_((row + kBlock) * p.heads + head),
        heads_(p.heads),
        past_caches_(p.stream),
        per_call_((kBlock + calls - 1) / calls) {}
  void watch(const void* base, int64_t n) {
    const int64_t bytes = n * dtype_size_;
    const uintptr_t first = reinterpret_cast<uintptr_t>(base) + first_ * bytes;
    touch_pages(first, heads_ * bytes, kBlock);
    streams_[count_++] = {first, bytes};
  }
  // What is written past the caches needs its pages only.
  void watch_result(const void* base, int64_t n) {
    if (!past_caches_) return watch(base, n);
    const int64_t bytes = n * dtype_size_;
    touch_pages(reinterpret_cast<uintptr_t>(base) + first_ * bytes, heads_ * bytes, kBlock);
  }
  void operator()() {
    const int64_t end = at_ + per_call_ < kBlock ? at_ + per_call_ : kBlock;
    for (; at_ < end; ++at_)
      for (int64_t s = 0; s < count_; ++s) {
        const uintptr_t row = streams_[s].first + at_ * heads_ * streams_[s].bytes;
        for (int64_t line = 0; line < streams_[s].bytes; line += 64)
          __builtin_prefetch(reinterpret_cast<const void*>(row + line), 0, 2);
      }
  }

 private:
  struct Stream {
    uintptr_t first;
    int64_t bytes;
  };
  int64_t dtype_size_, first_, heads_;
  bool past_caches_;
  int64_t per_call_, at_ = 0, count_ = 0;
  Stream streams_[4];
};

inline void load_block(const QlaParams& p, const void* base, int64_t row, int64_t head, int64_t rows, int64_t n,
                       float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ((row + r) * p.heads + head) * n;
    load_row(p.dtype, base, at, to + r * pad(n), n, pad(n));
  }
}

// Whether a row's vectors are those of the tensor.
inline bool in_place(const QlaParams& p, int64_t n) { return p.dtype == DType::kFloat && n == pad(n); }

// phi of a block's rows and, unless null, its slope: [rows, pad(n)]
inline void phi_block(const QlaParams& p, const void* base, int64_t row, int64_t head, int64_t rows, int64_t n,
                      float* to, float* slope) {
  if (in_place(p, n))
    return activate_rows(p.activation, static_cast<const float*>(base) + (row * p.heads + head) * n, p.heads * n, to,
                         slope, rows, n);
  load_block(p, base, row, head, rows, n, to);
  activate(p.activation, to, to, slope, rows * pad(n));
}

// A block's rows as floats `stride` apart: where they are, or copied to `room`.
struct BlockRows {
  const float* at;
  int64_t stride;
  BlockRows(const QlaParams& p, const void* base, int64_t row, int64_t head, int64_t rows, int64_t n, float* room)
      : at(room), stride(pad(n)) {
    if (in_place(p, n))
      at = static_cast<const float*>(base) + (row * p.heads + head) * n, stride = p.heads * n;
    else
      load_block(p, base, row, head, rows, n, room);
  }
};

inline void store_block(const QlaParams& p, void* base, int64_t row, int64_t head, int64_t rows, int64_t n,
                        const float* from) {
  const bool past_caches = p.stream && p.dtype == DType::kFloat && can_stream(base, n * 4);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = ((row + r) * p.heads + head) * n;
    if (!past_caches) {
      store_row(p.dtype, base, at, from + r * pad(n), n);
      continue;
    }
    float* to = static_cast<float*>(base) + at;
    for (int64_t i = 0; i < n; i += kLanes) stream(to + i, load(from + r * n + i));
  }
}

void qla_state(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    std::memset(s.matrix[0], 0, p.d * pad(p.e) * 4);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kBlock) {
      const int64_t rows = end - row < kBlock ? end - row : kBlock;
      phi_block(p, p.k, row, task.head, rows, p.d, s.rows_d[0], nullptr);
      const BlockRows value(p, p.v, row, task.head, rows, p.e, s.rows_e[0]);
      Ahead ahead(p, row, task.head, p.d / 4);
      ahead.watch(p.k, p.d);
      ahead.watch(p.v, p.e);
      product(p.d, pad(p.e), rows, s.rows_d[0], 1, pad(p.d), value.at, value.stride, s.matrix[0], pad(p.e), true,
              ahead);
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
      phi_block(p, p.q, row, task.head, rows, p.d, s.rows_d[0], nullptr);
      Ahead ahead(p, row, task.head, kBlock / 4);
      ahead.watch(p.q, p.d);
      ahead.watch_result(p.out, p.e);
      product(rows, pad(p.e), p.d, s.rows_d[0], pad(p.d), 1, s.matrix[0], pad(p.e), s.rows_e[0], pad(p.e), false,
              ahead);
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
  if (p.stream) drain();
}

void qla_apply_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e);
  float *query = s.rows_d[0], *slope = s.rows_d[1], *grad_query = s.rows_d[2], *key = s.rows_d[3];
  float *value = s.rows_e[1], *map_t = s.matrix[0], *sum = s.matrix[1];
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    make_map(p, task, sum);
    transpose(sum, p.d, p.e, map_t);
    std::memset(sum, 0, p.d * ep * 4);
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kBlock) {
      const int64_t rows = task.chunk.end - row < kBlock ? task.chunk.end - row : kBlock;
      phi_block(p, p.q, row, task.head, rows, p.d, query, slope);
      const BlockRows grad(p, p.grad_out, row, task.head, rows, p.e, s.rows_e[0]);
      Ahead ahead(p, row, task.head, p.d / 4 + kBlock / 4);
      ahead.watch(p.q, p.d);
      ahead.watch(p.grad_out, p.e);
      ahead.watch_result(p.grad_q, p.d);
      product(p.d, ep, rows, query, 1, dp, grad.at, grad.stride, sum, ep, true, ahead);
      product(rows, dp, p.e, grad.at, grad.stride, 1, map_t, dp, grad_query, dp, false, ahead);
      const int64_t first = p.own_term ? clamp_to(task.chunk.source_end - row, 0, rows) : rows;
      for (int64_t r = first; r < rows; ++r)
        own_gradients(p, task, row + r, query + r * dp, grad.at + r * grad.stride, grad_query + r * dp, key, value);
      for (int64_t i = 0; i < rows * dp; i += kLanes) store(grad_query + i, load(grad_query + i) * load(slope + i));
      store_block(p, p.grad_q, row, task.head, rows, p.d, grad_query);
    }
    copy_out(sum, p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
  if (p.stream) drain();
}

void qla_state_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Scratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e);
  float *key = s.rows_d[0], *slope = s.rows_d[1], *grad_key = s.rows_d[2];
  float *grad_value = s.rows_e[1], *grad_state = s.matrix[0], *grad_state_t = s.matrix[1];
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    load_grad_state(p, task, grad_state, grad_state_t);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kBlock) {
      const int64_t rows = end - row < kBlock ? end - row : kBlock;
      phi_block(p, p.k, row, task.head, rows, p.d, key, slope);
      const BlockRows value(p, p.v, row, task.head, rows, p.e, s.rows_e[0]);
      Ahead ahead(p, row, task.head, kBlock / 2);
      ahead.watch(p.k, p.d);
      ahead.watch(p.v, p.e);
      ahead.watch_result(p.grad_k, p.d);
      ahead.watch_result(p.grad_v, p.e);
      product(rows, dp, p.e, value.at, value.stride, 1, grad_state_t, dp, grad_key, dp, false, ahead);
      for (int64_t i = 0; i < rows * dp; i += kLanes) store(grad_key + i, load(grad_key + i) * load(slope + i));
      store_block(p, p.grad_k, row, task.head, rows, p.d, grad_key);
      product(rows, ep, p.d, key, dp, 1, grad_state, ep, grad_value, ep, false, ahead);
      store_block(p, p.grad_v, row, task.head, rows, p.e, grad_value);
    }
  }
  if (p.stream) drain();
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
