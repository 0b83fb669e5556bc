// Softmax attention on bfloat16 rows in AMX tiles; other rows go to the AVX-512 kernels. Operands of every product are
// rounded to bfloat16 (so the probabilities), sums and the softmax are float32.
#define VISTA_ISA amx
#define VISTA_LANES 16
#include "amx_tiles.h"
#include "cross_attn_kernels.h"

namespace vista::cpu {
namespace amx {

// Buffers of one thread, beside AttnScratch.
struct TileScratch {
  uint16_t *query, *rows, *weights;  // [kQueryRun, pad32(d)], [kKeyTile, pad32], [kQueryBlock, kKeyTile]
  uint32_t *key_t, *value;           // [pad32(d) / 2, kKeyTile], [kKeyTile / 2, pad(e)]
  float *scores, *out;               // [kQueryBlock, kKeyTile], [kQueryRun, pad(e)]
  TileScratch(float* base, int64_t d, int64_t e) {
    const int64_t dq = pad32(d), eq = pad32(e), ep = pad(e);
    const auto take = [&](int64_t floats) { return base += floats, base - floats; };
    query = reinterpret_cast<uint16_t*>(take(kQueryRun * dq / 2));
    rows = reinterpret_cast<uint16_t*>(take(kKeyTile * (dq > eq ? dq : eq) / 2));
    weights = reinterpret_cast<uint16_t*>(take(kQueryBlock * kKeyTile / 2));
    key_t = reinterpret_cast<uint32_t*>(take(dq / 2 * kKeyTile));
    value = reinterpret_cast<uint32_t*>(take(kKeyTile / 2 * ep));
    scores = take(kQueryBlock * kKeyTile), out = take(kQueryRun * ep);
  }
};

// One head's share of `rows` rows as [filled, pad32(n)], zeros beyond the rows and their values.
inline void copy_rows(const void* base, int64_t row, int64_t heads, int64_t head, int64_t rows, int64_t n,
                      int64_t filled, uint16_t* to) {
  const uint16_t* from = static_cast<const uint16_t*>(base) + (row * heads + head) * n;
  for (int64_t r = 0; r < filled; ++r, from += heads * n)
    for (int64_t j = 0; j < pad32(n); j += 16, to += 16) {
      const __mmask16 inside = r < rows && j < n ? columns_from(j, n) : 0;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), load_bfloat16(from + j, inside));
    }
}

// The keys' right operand of a sum over their values, [pad32(d) / 2, kKeyTile] pairs, from rows [keys, pad32(d)].
inline void turn_keys(const uint16_t* rows, int64_t keys, int64_t d, uint32_t* to) {
  const int64_t words = pad32(d) / 2;
  for (int64_t r = 0; r < keys; r += 16)
    for (int64_t j = 0; j < words; j += 16)
      transpose_words(reinterpret_cast<const uint32_t*>(rows) + r * words + j, words, to + j * kKeyTile + r, kKeyTile);
}

// The values' right operand of a sum over the keys, [keys / 2, pad(e)] pairs, from rows [keys, pad32(e)].
inline void pair_rows(const uint16_t* rows, int64_t keys, int64_t e, uint32_t* to) {
  const int64_t width = pad32(e);
  for (int64_t r = 0; r < keys; r += 2)
    for (int64_t j = 0; j < pad(e); j += 16, to += 16) {
      const uint16_t* from = rows + r * width + j;
      _mm512_storeu_si512(to, pairs_of(load_bfloat16(from, kAll), load_bfloat16(from + width, kAll)));
    }
}

// A row of products to probabilities that lack their divisor, zeros from `keys` to `filled`. Returns what to multiply
// the row's earlier sums by.
inline float weigh(const float* row, float scale, int64_t keys, int64_t filled, Softmax* soft, uint16_t* weights) {
  vf most = splat(-__builtin_inff());
  int64_t j = 0;
  for (; j + 16 <= keys; j += 16) most = max_v(load(row + j) * scale, most);
  if (j < keys) {
    const vf part = load(row + j) * scale;
    most = (vf)_mm512_mask_max_ps((__m512)most, columns_from(j, keys), (__m512)part, (__m512)most);
  }
  const float keep = soft->raise(max_v(splat(fold(most, max_v)), splat(soft->top))[0]);
  vf sum{};
  for (j = 0; j < filled; j += 32) {
    vf value[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t at = j + 16 * i;
      value[i] = exp_v(load(row + at) * scale - soft->top);
      if (at + 16 > keys) value[i] = (vf)_mm512_maskz_mov_ps(at < keys ? columns_from(at, keys) : 0, (__m512)value[i]);
      sum += value[i];
    }
    _mm512_storeu_si512(weights + j, (__m512i)_mm512_cvtne2ps_pbh((__m512)value[1], (__m512)value[0]));
  }
  soft->total += sum_lanes(sum);
  return keep;
}

void cross_attn_forward_tiles(const CrossAttnParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype != DType::kBFloat16) return cross_attn_forward(p, task_begin, task_end, scratch);
  const AttnScratch finish(scratch, p.d, p.e);
  const TileScratch s(finish.end, p.d, p.e);
  const int64_t dq = pad32(p.d), ep = pad(p.e);
  const Tiles tiles;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const QueryBlock& run = p.query_runs[t / p.q_heads];
    const int64_t head = t % p.q_heads, kv_head = head / (p.q_heads / p.kv_heads), rows = run.end - run.begin;
    Softmax softmax[kQueryRun];
    copy_rows(p.q, run.begin, p.q_heads, head, rows, p.d, pad(rows), s.query);
    std::memset(s.out, 0, pad(rows) * ep * 4);
    for (int64_t from = run.kv_begin; from < run.kv_end; from += kKeyTile) {
      const int64_t keys = run.kv_end - from < kKeyTile ? run.kv_end - from : kKeyTile, filled = pad32(keys);
      copy_rows(p.k, from, p.kv_heads, kv_head, keys, p.d, filled, s.rows);
      turn_keys(s.rows, filled, p.d, s.key_t);
      copy_rows(p.v, from, p.kv_heads, kv_head, keys, p.e, filled, s.rows);
      pair_rows(s.rows, filled, p.e, s.value);
      for (int64_t first = 0; first < rows; first += kQueryBlock) {
        const int64_t count = rows - first < kQueryBlock ? rows - first : kQueryBlock;
        float* out = s.out + first * ep;
        tiled_product<1>(pad(count), filled, dq, {s.query + first * dq, dq * 2}, {s.key_t, kKeyTile * 4}, s.scores,
                         kKeyTile, false);
        written(s.scores);
        for (int64_t r = 0; r < count; ++r) {
          const float keep =
              weigh(s.scores + r * kKeyTile, p.scale, keys, filled, &softmax[first + r], s.weights + r * kKeyTile);
          if (keep != 1.f && from > run.kv_begin) scale_row(out + r * ep, keep, ep);
        }
        tiled_product<1>(pad(count), ep, filled, {s.weights, kKeyTile * 2}, {s.value, ep * 4}, out, ep, true);
        written(out);
      }
    }
    finish_rows(p, finish, run, head, s.out, softmax);
  }
}

}  // namespace amx

const CrossAttnKernels cross_attn_kernels_amx{amx::cross_attn_forward_tiles, amx::cross_attn_backward_short,
                                              amx::cross_attn_backward_queries, amx::cross_attn_backward_keys};

}  // namespace vista::cpu
