// Quasi-linear attention on the CPU (docs: vista_ext/ops/qla.py). Kernels work on a range of tasks so that the caller
// owns the threads; a task is one chunk of one sequence for one head.
#pragma once

#include <cstdint>

#include "vista/types.h"

namespace vista::cpu {

struct QlaChunk {
  int64_t seq;         // sequence, indexes state and scale
  int64_t begin;       // first packed row
  int64_t end;         // past the last packed row
  int64_t source_end;  // rows from here on are targets (packed row number, may lie outside [begin, end))
  float* partial;      // [heads, d, e] this chunk's share of a sum over rows: the result itself for one-chunk sequences
};

// All row tensors are packed [total, heads, d or e] in `dtype`. Null where an op does not use a field.
struct QlaParams {
  DType dtype;
  Activation activation;        // phi1
  Activation state_activation;  // phi2
  int64_t heads, d, e;
  const QlaChunk* chunks;
  const void* q;            // [total, heads, d]
  const void* k;            // [total, heads, d]
  const void* v;            // [total, heads, e]
  const void* grad_out;     // [total, heads, e]
  const float* state;       // [batch, heads, d, e] unscaled
  const float* scale;       // [batch]
  const float* grad_state;  // [batch, heads, d, e]
  void* out;                // [total, heads, e]
  void* grad_q;             // [total, heads, d]
  void* grad_k;             // [total, heads, d]
  void* grad_v;             // [total, heads, e]
  bool stream;              // write the results past the caches: they are too large to be found there again
  bool own_term;            // target rows add scale * <phi1(q), phi1(k)> v
};

// tasks: chunk index * heads + head. scratch: qla_scratch_floats(d, e) floats, 64-byte aligned, one per thread.
struct QlaKernels {
  void (*state)(const QlaParams&, int64_t task_begin, int64_t task_end, float* scratch);
  void (*apply)(const QlaParams&, int64_t task_begin, int64_t task_end, float* scratch);
  // grad_q of every row, grad_k and grad_v of target rows, chunk partials of W = phi1(Q)^T grad_out
  void (*apply_backward)(const QlaParams&, int64_t task_begin, int64_t task_end, float* scratch);
  // grad_k and grad_v of source rows from grad_state
  void (*state_backward)(const QlaParams&, int64_t task_begin, int64_t task_end, float* scratch);
  // grad_state[i] = scale * phi2'(scale * state[i]) * w[i] (+ extra[i]), n values
  void (*state_gradient)(Activation, float scale, const float* state, const float* w, const float* extra,
                         float* grad_state, int64_t n);
};

constexpr int64_t kQlaTileRows = 64;  // of a block of the AMX kernels

const QlaKernels& qla_kernels();  // the best for this processor, chosen once
int64_t qla_scratch_floats(int64_t d, int64_t e);

extern const QlaKernels qla_kernels_base;
#ifdef VISTA_X86
extern const QlaKernels qla_kernels_avx2;
extern const QlaKernels qla_kernels_avx512;
extern const QlaKernels qla_kernels_amx;
#endif

}  // namespace vista::cpu
