// What the quasi-linear attention kernels of every instruction set share.
#pragma once

#include "vector_math.h"
#include "vista/qla.h"

namespace vista::cpu {
namespace VISTA_ISA {

struct Task {
  const QlaChunk& chunk;
  int64_t head;
  Task(const QlaParams& p, int64_t task) : chunk(p.chunks[task / p.heads]), head(task % p.heads) {}
};

// Asks for a row of every page of `rows` rows that lie `stride` bytes apart. A request waits for its page's
// translation, which costs more than its data where memory is virtual twice; asked for together the pages are looked up
// side by side.
[[gnu::always_inline]] inline void touch_pages(uintptr_t first, int64_t stride, int64_t rows) {
  constexpr int64_t kPage = 4096;
  const int64_t step = stride < kPage ? kPage / stride : 1;
  for (int64_t r = 0; r < rows; r += step) __builtin_prefetch(reinterpret_cast<const void*>(first + r * stride), 0, 2);
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

// [d, pad(e)] to [e, pad(d)], zeros in the padding
inline void transpose(const float* from, int64_t d, int64_t e, float* to) {
  std::memset(to, 0, e * pad(d) * 4);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j < e; ++j) to[j * pad(d) + i] = from[i * pad(e) + j];
}

// A head's gradient of the state, [d, pad(e)], and its transpose, [e, pad(d)]
inline void load_grad_state(const QlaParams& p, const Task& task, float* grad, float* grad_t) {
  const float* from = p.grad_state + (task.chunk.seq * p.heads + task.head) * p.d * p.e;
  std::memset(grad, 0, p.d * pad(p.e) * 4);
  for (int64_t i = 0; i < p.d; ++i) copy_row(from + i * p.e, grad + i * pad(p.e), p.e);
  transpose(grad, p.d, p.e, grad_t);
}

// The own term of a target row: grad_k and grad_v of the row, and its share of grad_query, before phi's slope. `query`
// is phi(q). `room_d` holds 3 * pad(d) floats, `room_e` pad(e).
inline void own_gradients(const QlaParams& p, const Task& task, int64_t row, const float* query, const float* grad,
                          float* grad_query, float* room_d, float* room_e) {
  const int64_t packed = row * p.heads + task.head, dp = pad(p.d), ep = pad(p.e);
  const float scale = p.scale[task.chunk.seq];
  float *key = room_d, *slope = room_d + dp, *grad_key = room_d + 2 * dp, *value = room_e;
  load_row(p.dtype, p.k, packed * p.d, key, p.d, dp);
  activate(p.activation, key, key, slope, dp);
  load_row(p.dtype, p.v, packed * p.e, value, p.e, ep);
  float own = 0.f;
  for (int64_t i = 0; i < p.d; ++i) own += query[i] * key[i];
  own *= scale;
  const float pull = scale * dot(grad, value, ep);
  for (int64_t i = 0; i < dp; i += kLanes) {
    store(grad_key + i, load(slope + i) * (pull * load(query + i)));
    store(grad_query + i, load(grad_query + i) + pull * load(key + i));
  }
  store_row(p.dtype, p.grad_k, packed * p.d, grad_key, p.d);
  for (int64_t j = 0; j < ep; j += kLanes) store(value + j, own * load(grad + j));
  store_row(p.dtype, p.grad_v, packed * p.e, value, p.e);
}

inline int64_t clamp_to(int64_t x, int64_t low, int64_t high) { return x < low ? low : (x > high ? high : x); }

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
