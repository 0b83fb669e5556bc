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

// [rows, width] words to rows of to_width words; of both sizes, multiples of 16.
inline void turn(const void* from, int64_t rows, int64_t width, void* to, int64_t to_width) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t j = 0; j < width; j += 16)
      transpose_words(static_cast<const uint32_t*>(from) + r * width + j, width,
                      static_cast<uint32_t*>(to) + j * to_width + r, to_width);
}

// The keys' right operand of a sum over their values, pairs [pad32(d) / 2, to_width], from rows [keys, pad32(d)].
inline void turn_keys(const uint16_t* rows, int64_t keys, int64_t d, uint32_t* to, int64_t to_width) {
  turn(rows, keys, pad32(d) / 2, to, to_width);
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
      turn_keys(s.rows, filled, p.d, s.key_t, kKeyTile);
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

// Buffers of one thread for the backward of a short sequence, beside AttnScratch.
struct ShortTiles {
  uint16_t *rows, *query, *grad, *pulls;                // [kShortKeys, pad32], [kQueryBlock, pad32], and kShortKeys
  uint16_t *query_t, *grad_t;                           // [pad, kQueryBlock]
  uint32_t *key_t, *value_t, *key;                      // [pad32 / 2, kShortKeys], [kShortKeys / 2, pad(d)]
  uint32_t *pairs, *weight_pairs, *pull_pairs;          // [kQueryBlock / 2, pad], [kQueryBlock / 2, kShortKeys]
  float *scores, *grad_scores, *grad_key, *grad_value;  // [kQueryBlock, kShortKeys], [pad, kShortKeys]
  ShortTiles(float* base, int64_t d, int64_t e) {
    const int64_t dq = pad32(d), eq = pad32(e), wide = dq > eq ? dq : eq, dp = pad(d), ep = pad(e);
    const auto take = [&](int64_t floats) { return base += floats, base - floats; };
    const auto halves = [&](int64_t n) { return reinterpret_cast<uint16_t*>(take(n / 2)); };
    const auto words = [&](int64_t n) { return reinterpret_cast<uint32_t*>(take(n)); };
    rows = halves(kShortKeys * wide), query = halves(kQueryBlock * dq), grad = halves(kQueryBlock * eq);
    pulls = halves(kQueryBlock * kShortKeys), query_t = halves(dp * kQueryBlock), grad_t = halves(ep * kQueryBlock);
    key_t = words(dq / 2 * kShortKeys), value_t = words(eq / 2 * kShortKeys), key = words(kShortKeys / 2 * dp);
    pairs = words(kQueryBlock / 2 * wide);
    weight_pairs = words(kQueryBlock / 2 * kShortKeys), pull_pairs = words(kQueryBlock / 2 * kShortKeys);
    scores = take(kQueryBlock * kShortKeys), grad_scores = take(kQueryBlock * kShortKeys);
    grad_key = take(dp * kShortKeys), grad_value = take(ep * kShortKeys);
  }
};

// The left operand of a sum over the queries, [pad(n), kQueryBlock], from rows [depth, pad32(n)].
inline void turn_queries(const uint16_t* rows, int64_t depth, int64_t n, uint32_t* pairs, uint16_t* to) {
  pair_rows(rows, depth, n, pairs);
  turn(pairs, depth / 2, pad(n), to, kQueryBlock / 2);
}

// As cross_attn_backward_short. Gradients of keys and values are summed turned, so that of the probabilities only pairs
// of rows are needed.
void cross_attn_backward_short_tiles(const CrossAttnParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype != DType::kBFloat16) return cross_attn_backward_short(p, task_begin, task_end, scratch);
  const AttnScratch rest(scratch, p.d, p.e);
  const ShortTiles s(rest.end, p.d, p.e);
  const int64_t dq = pad32(p.d), eq = pad32(p.e), dp = pad(p.d), ep = pad(p.e), share = p.q_heads / p.kv_heads;
  const Tiles tiles;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const KeyBlock& sequence = p.short_sequences[t / p.kv_heads];
    const int64_t kv_head = t % p.kv_heads, keys = sequence.end - sequence.begin, filled = pad32(keys);
    copy_rows(p.v, sequence.begin, p.kv_heads, kv_head, keys, p.e, filled, s.rows);
    turn_keys(s.rows, filled, p.e, s.value_t, filled);
    copy_rows(p.k, sequence.begin, p.kv_heads, kv_head, keys, p.d, filled, s.rows);
    turn_keys(s.rows, filled, p.d, s.key_t, filled);
    pair_rows(s.rows, filled, p.d, s.key);
    std::memset(s.grad_key, 0, dp * filled * 4);
    std::memset(s.grad_value, 0, ep * filled * 4);
    for (int64_t reader = sequence.first_reader; reader < sequence.end_reader; ++reader) {
      const QueryBlock& block = p.query_blocks[p.readers[reader]];
      const int64_t rows = block.end - block.begin, depth = pad32(rows);
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head) {
        copy_rows(p.q, block.begin, p.q_heads, head, rows, p.d, depth, s.query);
        copy_rows(p.grad_out, block.begin, p.q_heads, head, rows, p.e, depth, s.grad);
        if (p.self_k != nullptr) {
          load_rows(p.dtype, p.q, block.begin, p.q_heads, head, rows, p.d, rest.query);
          load_rows(p.dtype, p.grad_out, block.begin, p.q_heads, head, rows, p.e, rest.grad);
        }
        tiled_product<1>(pad(rows), filled, dq, {s.query, dq * 2}, {s.key_t, filled * 4}, s.scores, filled, false);
        tiled_product<1>(pad(rows), filled, eq, {s.grad, eq * 2}, {s.value_t, filled * 4}, s.grad_scores, filled,
                         false);
        written(s.scores);
        float total[kQueryBlock] = {}, mean[kQueryBlock] = {};
        for (int64_t r = 0; r < rows; ++r) {
          const float lse = p.lse[(block.begin + r) * p.q_heads + head];
          float *prob = s.scores + r * filled, *grad = s.grad_scores + r * filled;
          vf sum{}, weighted{};
          for (int64_t j = 0; j < filled; j += kLanes) {
            const vf weight = first_lanes(exp_v(p.scale * load(prob + j) - lse), keys - j);
            store(prob + j, weight);
            sum += weight;
            weighted += weight * load(grad + j);
          }
          total[r] = sum_lanes(sum), mean[r] = sum_lanes(weighted);
        }
        finish_sums(rest, p, block, head, total, mean);
        for (int64_t r = 0; r < depth; r += 2)
          for (int64_t j = 0; j < filled; j += kLanes) {
            vf weight[2], pull[2];
#pragma GCC unroll 2
            for (int64_t i = 0; i < 2; ++i) {
              const int64_t at = (block.begin + r + i) * p.q_heads + head, place = (r + i) * filled + j;
              const bool inside = r + i < rows;
              weight[i] = inside ? p.norm[at] * load(s.scores + place) : vf{};
              pull[i] = inside ? p.scale * weight[i] * (load(s.grad_scores + place) - p.delta[at]) : vf{};
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(s.pulls + place),
                                  (__m256i)_mm512_cvtneps_pbh((__m512)pull[i]));
            }
            const int64_t pair = r / 2 * filled + j;
            _mm512_storeu_si512(s.weight_pairs + pair, pairs_of((__m512)weight[0], (__m512)weight[1]));
            _mm512_storeu_si512(s.pull_pairs + pair, pairs_of((__m512)pull[0], (__m512)pull[1]));
          }
        tiled_product<1>(pad(rows), dp, filled, {s.pulls, filled * 2}, {s.key, dp * 4}, rest.sum_d, dp, false);
        written(rest.sum_d);
        own_gradients(rest, p, block, head);
        store_rows(p.dtype, p.grad_q, block.begin, p.q_heads, head, rows, p.d, rest.sum_d);
        turn_queries(s.query, depth, p.d, s.pairs, s.query_t);
        tiled_product<1>(dp, filled, depth, {s.query_t, kQueryBlock * 2}, {s.pull_pairs, filled * 4}, s.grad_key,
                         filled, true);
        turn_queries(s.grad, depth, p.e, s.pairs, s.grad_t);
        tiled_product<1>(ep, filled, depth, {s.grad_t, kQueryBlock * 2}, {s.weight_pairs, filled * 4}, s.grad_value,
                         filled, true);
      }
    }
    written(s.grad_key);
    for (int64_t from = 0; from < keys; from += kKeyBlock) {
      const int64_t count = keys - from < kKeyBlock ? keys - from : kKeyBlock;
      for (int64_t r = 0; r < count; r += 16) {
        for (int64_t j = 0; j < dp; j += 16)
          transpose_words(reinterpret_cast<const uint32_t*>(s.grad_key) + j * filled + from + r, filled,
                          reinterpret_cast<uint32_t*>(rest.sum_d) + r * dp + j, dp);
        for (int64_t j = 0; j < ep; j += 16)
          transpose_words(reinterpret_cast<const uint32_t*>(s.grad_value) + j * filled + from + r, filled,
                          reinterpret_cast<uint32_t*>(rest.sum_e) + r * ep + j, ep);
      }
      store_rows(p.dtype, p.grad_k, sequence.begin + from, p.kv_heads, kv_head, count, p.d, rest.sum_d);
      store_rows(p.dtype, p.grad_v, sequence.begin + from, p.kv_heads, kv_head, count, p.e, rest.sum_e);
    }
  }
}

}  // namespace amx

const CrossAttnKernels cross_attn_kernels_amx{amx::cross_attn_forward_tiles, amx::cross_attn_backward_short_tiles,
                                              amx::cross_attn_backward_queries, amx::cross_attn_backward_keys};

}  // namespace vista::cpu
