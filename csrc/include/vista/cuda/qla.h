// Quasi-linear attention on the GPU (what it computes: vista_ext/ops/qla.py, the same on the CPU: csrc/ops/qla.cpp).
//
// A call is launch_qla_plan, once, and then the launches it needs on the same stream with the same params and
// workspace:
//     qla                 plan, state (k, v -> state), apply
//     qla_backward        plan, apply_backward, state_backward (grad_state = grad_state_out of apply_backward)
//     qla_state, qla_apply and their backwards: plan and the launch of that name
//
// Who writes which rows of the outputs (which may be uninitialised before):
//     out, grad_q         every row of [0, total); rows behind the last sequence (padding) are zero
//     grad_k, grad_v      apply_backward: target rows, if own_term, and no others
//                         state_backward: source rows; padding as zeros; target rows as zeros, unless own_term
//     state, grad_state_out  every element; zero (the extra gradient) for a sequence without rows
// So apply_backward alone wants grad_k and grad_v zeroed by the caller, and qla_backward writes every row once.
//
// The plan kernel checks on the device what the host cannot see: seq_offsets start at 0, never fall and end at or
// before total, no sequence is longer than max_seq_len, 0 <= num_targets <= length. Where that is false it traps, as
// torch's own index assertions do: nothing is read or written out of bounds, no later kernel runs, and every later call
// on the context reports the failure.
//
// All pointers 16-byte aligned and contiguous. d and e: multiples of 8 from 16 to 256.
// Deterministic: the bits of a sequence depend on its own rows only.
#pragma once

#include <cstddef>

#include "vista/cuda/launch.h"
#include "vista/types.h"

namespace vista::cuda {

// Rows per block. It bounds the time of a block, hence the tail of a launch, and makes K and V of a chunk (2048 rows of
// 256 bytes at d = e = 64, bf16) much larger than the partial state (16 KB) that it leaves behind.
constexpr int64_t kQlaChunkRows = 2048;

// Row tensors are packed [total, heads, d or e] in `dtype`. Null where the launches of a call do not use a field.
struct QlaParams {
  DType dtype;
  bool allow_tf32;              // float only: tf32 products instead of fp32
  Activation activation;        // phi1
  Activation state_activation;  // phi2
  bool own_term;                // target rows add scale * <phi1(q), phi1(k)> v (needs num_targets, k and v)
  int64_t total, batch, heads, d, e;
  int64_t max_seq_len;                 // at least the longest sequence
  int64_t chunk_rows = kQlaChunkRows;  // another value is for tests; part of what the bits depend on
  Indices seq_offsets;                 // [batch + 1]
  Indices num_targets;                 // [batch] or null: no targets
  const float* attn_scale;             // [batch] or null: 1 / number of source rows, 1 where there is none
  const void* q;                       // [total, heads, d]
  const void* k;                       // [total, heads, d]
  const void* v;                       // [total, heads, e]
  const void* grad_out;                // [total, heads, e]
  const float* state;                  // [batch, heads, d, e] unscaled
  const float* grad_state;  // [batch, heads, d, e] apply_backward: added to grad_state_out, or null; state_backward: dZ
  void* out;                // [total, heads, e]
  void* grad_q;             // [total, heads, d]
  void* grad_k;             // [total, heads, d]
  void* grad_v;             // [total, heads, e]
  float* state_out;         // [batch, heads, d, e]
  float* grad_state_out;    // [batch, heads, d, e] must not be grad_state
  void* workspace;          // qla_workspace_bytes, any contents
};

// Reads total, batch, heads, d, e, max_seq_len and chunk_rows. `sums_rows`: the call launches state or apply_backward.
size_t qla_workspace_bytes(const QlaParams& params, bool sums_rows);

// workspace <- plan. Reads seq_offsets and num_targets.
int launch_qla_plan(const QlaParams& params, Stream stream);
// state_out <- sum over source rows of phi1(k)^T v
int launch_qla_state(const QlaParams& params, Stream stream);
// out <- phi1(q) phi2(scale * state), plus the own term of target rows
int launch_qla_apply(const QlaParams& params, Stream stream);
// grad_q, grad_state_out <- scale * phi2'(scale * state) * sum over rows of phi1(q)^T grad_out + grad_state; with
// own_term also grad_k and grad_v of target rows
int launch_qla_apply_backward(const QlaParams& params, Stream stream);
// grad_k, grad_v of source rows from grad_state
int launch_qla_state_backward(const QlaParams& params, Stream stream);

}  // namespace vista::cuda
