// Softmax attention of query groups on jagged key/value sequences, on the CPU (docs: vista_ext/ops/cross_attn.py).
#pragma once

#include <cstdint>

#include "vista/types.h"

namespace vista::cpu {

struct QueryBlock {
  int64_t begin, end;        // packed query rows of one group, at most kQueryBlock (a run: kQueryRun)
  int64_t kv_begin, kv_end;  // packed key/value rows of the sequence the group reads
};

struct KeyBlock {
  int64_t begin, end;                // packed key/value rows, at most kKeyBlock (a short sequence: all)
  int64_t first_reader, end_reader;  // the query blocks that read this sequence: a range of `readers`
};

constexpr int64_t kQueryBlock = 64;
constexpr int64_t kKeyBlock = 64;
constexpr int64_t kShortKeys = 256;  // a sequence of at most so many keys has its backward in one piece
constexpr int64_t kKeyTile = 128;    // the AMX kernels' block of keys: most summaries are one, and nothing is rescaled
constexpr int64_t kQueryRun = 256;   // the forward's: a task prepares keys and values once for so many queries

struct CrossAttnParams {
  DType dtype;
  int64_t q_heads, kv_heads, d, e;
  float scale;
  const QueryBlock* query_runs;     // of the forward: up to kQueryRun rows each
  const QueryBlock* query_blocks;   // of the backward
  const QueryBlock* long_queries;   // those of them that read a sequence of more than kShortKeys keys
  const KeyBlock* short_sequences;  // whole sequences of at most kShortKeys keys
  const KeyBlock* key_blocks;       // of long sequences
  const int64_t* readers;           // query block numbers, grouped by key/value sequence
  const void* q;                    // [total_q, q_heads, d]
  const void* k;                    // [total_kv, kv_heads, d]
  const void* v;                    // [total_kv, kv_heads, e]
  const void* self_k;               // [total_q, kv_heads, d] or null
  const void* self_v;               // [total_q, kv_heads, e] or null
  void* out;                        // [total_q, q_heads, e]
  float* lse;                       // [total_q, q_heads]
  const void* grad_out;             // [total_q, q_heads, e]
  const float* grad_lse;            // [total_q, q_heads] or null
  float* delta;       // [total_q, q_heads] mean gradient of a row's probabilities, less grad_lse; by backward_queries
  float* norm;        // [total_q, q_heads] 1 / sum of exp(score - lse): 1 but for rounding; by backward_queries
  void* grad_q;       // like q
  void* grad_k;       // like k
  void* grad_v;       // like v
  void* grad_self_k;  // like self_k
  void* grad_self_v;  // like self_v
};

// scratch: cross_attn_scratch_floats(d, e) floats, 64-byte aligned, one per thread.
struct CrossAttnKernels {
  // tasks: query run * q_heads + head
  void (*forward)(const CrossAttnParams&, int64_t task_begin, int64_t task_end, float* scratch);
  // tasks: short sequence * kv_heads + kv head
  void (*backward_short)(const CrossAttnParams&, int64_t task_begin, int64_t task_end, float* scratch);
  // tasks: long query block * kv_heads + kv head (its query heads in order, so that the own item's gradients have one
  // writer)
  void (*backward_queries)(const CrossAttnParams&, int64_t task_begin, int64_t task_end, float* scratch);
  // tasks: key block * kv_heads + kv head
  void (*backward_keys)(const CrossAttnParams&, int64_t task_begin, int64_t task_end, float* scratch);
};

const CrossAttnKernels& cross_attn_kernels();  // the best for this processor, chosen once
int64_t cross_attn_scratch_floats(int64_t d, int64_t e);

extern const CrossAttnKernels cross_attn_kernels_base;
#ifdef VISTA_X86
extern const CrossAttnKernels cross_attn_kernels_avx2;
extern const CrossAttnKernels cross_attn_kernels_avx512;
extern const CrossAttnKernels cross_attn_kernels_amx;
#endif

}  // namespace vista::cpu
