// Softmax attention of query groups on jagged key/value sequences, on the GPU (what it computes:
// vista_ext/ops/cross_attn.py, the same on the CPU: csrc/ops/cross_attn.cpp).
//
// A call is launch_cross_attn_plan, once, and then launch_cross_attn or launch_cross_attn_backward on the same stream
// with the same params and workspace. Every row of the outputs is written (they may be uninitialised before): rows
// behind the last group or sequence are zero, and so is their lse.
//
// The plan kernel checks on the device what the host cannot see: offsets start at 0, never fall and end at or before
// the total, no group or sequence is longer than said, 0 <= kv_index < sequences. Where that is false it traps: the
// context is lost (cudaErrorLaunchFailure at the next synchronization) and no later kernel runs.
//
// All row pointers 16-byte aligned and contiguous. d and e: multiples of 8 from 16 to 256. Deterministic: the bits of a
// query row depend on that row, its own item and its sequence only; those of a key's gradients on the groups that read
// it, in their order.
#pragma once

#include <cstddef>

#include "vista/cuda/cache_rows.h"
#include "vista/cuda/launch.h"
#include "vista/types.h"

namespace vista::cuda {

// Keys and values that are quantized rows of caches, if k_layout has tokens: of group g those at slots[g]. A slot
// outside [0, num_slots) is never read. BadSlots::kCount: the group sees no keys, and num_bad counts it.
struct CachedRows {
  RowLayout k_layout, v_layout;  // of one scheme, as many tokens, and kv_heads * d and kv_heads * e values a token
  const uint8_t* k_rows;         // [num_slots, row_bytes], 16-byte aligned; null without slots
  const uint8_t* v_rows;         // the same; k_rows where the values are the keys
  int64_t num_slots;
  Indices slots;     // [groups]
  int64_t* num_bad;  // scalar, written by the plan
  BadSlots bad_slots;
};

// Null where a call does not use a field.
struct CrossAttnParams {
  DType dtype;
  int64_t total_q, total_kv, groups, sequences, q_heads, kv_heads, d, e;
  int64_t max_q_len, max_kv_len;  // at least the longest group and the longest sequence
  int64_t enough_blocks;  // of the forward, to fill a device: where there are more, they take longer runs; 0 for 512
  float scale;
  Indices q_offsets;      // [groups + 1]
  Indices kv_offsets;     // [sequences + 1]
  Indices kv_index;       // [groups] or null: group g reads sequence g
  CachedRows cache;       // instead of kv_offsets, kv_index, k and v
  const void* q;          // [total_q, q_heads, d]
  const void* k;          // [total_kv, kv_heads, d]
  const void* v;          // [total_kv, kv_heads, e]
  const void* self_k;     // [total_q, kv_heads, d] or null
  const void* self_v;     // [total_q, kv_heads, e] or null
  const void* grad_out;   // [total_q, q_heads, e]
  const float* grad_lse;  // [total_q, q_heads] or null
  void* out;              // [total_q, q_heads, e] written forward, read backward
  float* lse;             // [total_q, q_heads] likewise
  void* grad_q;           // like q
  void* grad_k;           // like k
  void* grad_v;           // like v
  void* grad_self_k;      // like self_k, or null without it
  void* grad_self_v;      // like self_v, or null without it
  void* workspace;        // cross_attn_workspace_bytes, any contents
};

// Reads total_q, groups, sequences and q_heads.
size_t cross_attn_workspace_bytes(const CrossAttnParams& params, bool backward);

// workspace <- plan. Reads the offsets and kv_index, or the slots.
int launch_cross_attn_plan(const CrossAttnParams& params, bool backward, Stream stream);
// out, lse
int launch_cross_attn(const CrossAttnParams& params, Stream stream);
int launch_cached_cross_attn(const CrossAttnParams& params, Stream stream);
// grad_q, grad_k, grad_v, and with own items grad_self_k, grad_self_v
int launch_cross_attn_backward(const CrossAttnParams& params, Stream stream);

}  // namespace vista::cuda
