// Softmax attention kernels, compiled once per instruction set. A tile is kQueryBlock queries by kKeyBlock keys; the
// softmax runs in float32, forward with a running maximum, backward from the stored log-sum-exp.
#pragma once

#include "lanes.h"
#include "vista/cross_attn.h"

namespace vista::cpu {
namespace VISTA_ISA {

struct AttnScratch {
  float *query, *grad, *key, *key_t, *value, *value_t, *scores, *grad_scores, *sum_d, *sum_e, *run_query, *run_out,
      *own_k, *own_v, *end;
  AttnScratch(float* base, int64_t d, int64_t e) {
    const int64_t dp = pad(d), ep = pad(e);
    auto take = [&](int64_t n) {
      float* at = base;
      base += n;
      return at;
    };
    query = take(kQueryBlock * dp), grad = take(kQueryBlock * ep);
    key = take(kKeyBlock * dp), key_t = take(dp * kKeyBlock);
    value = take(kKeyBlock * ep), value_t = take(ep * kKeyBlock);
    scores = take(kQueryBlock * kKeyBlock), grad_scores = take(kQueryBlock * kKeyBlock);
    sum_d = take(kKeyBlock * dp), sum_e = take(kKeyBlock * ep);
    own_k = take(2 * dp), own_v = take(2 * ep);
    run_query = take(kQueryRun * dp), run_out = take(kQueryRun * ep);
    end = base;
  }
};

inline void load_rows(DType dtype, const void* base, int64_t row, int64_t heads, int64_t head, int64_t rows, int64_t n,
                      float* to) {
  for (int64_t r = 0; r < rows; ++r) load_row(dtype, base, ((row + r) * heads + head) * n, to + r * pad(n), n, pad(n));
}

inline void store_rows(DType dtype, void* base, int64_t row, int64_t heads, int64_t head, int64_t rows, int64_t n,
                       const float* from) {
  for (int64_t r = 0; r < rows; ++r) store_row(dtype, base, ((row + r) * heads + head) * n, from + r * pad(n), n);
}

// [rows, pad(n)] to [n, kKeyBlock], zeros beyond `rows`
inline void transpose(const float* from, int64_t rows, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t r = 0; r < rows; ++r) to[i * kKeyBlock + r] = from[r * pad(n) + i];
    for (int64_t r = rows; r < kKeyBlock; ++r) to[i * kKeyBlock + r] = 0.f;
  }
}

inline void scale_row(float* row, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, load(row + i) * factor);
}

inline void add_row(float* row, float factor, const float* other, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes) store(row + i, load(row + i) + factor * load(other + i));
}

inline float exp_one(float x) { return exp_v(splat(x))[0]; }

inline float sum_row(const float* row) {
  vf sum{};
  for (int64_t i = 0; i < kKeyBlock; i += kLanes) sum += load(row + i);
  return sum_lanes(sum);
}

// The largest of n values and `high`; not a number counts for nothing.
inline float largest(const float* row, int64_t n, float high) {
  vf most = splat(high);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) most = max_v(load(row + i), most);
  high = fold(most, max_v);
  for (; i < n; ++i) high = row[i] > high ? row[i] : high;
  return high;
}

// row[i] = exp(row[i] - shift) for n values; their sum
inline float exp_row(float* row, float shift, int64_t n) {
  vf sum{};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vf value = exp_v(load(row + i) - shift);
    store(row + i, value);
    sum += value;
  }
  if (i < n) {
    const vf value = first_lanes(exp_v(load(row + i) - shift), n - i);
    store(row + i, value);
    sum += value;
  }
  return sum_lanes(sum);
}

// What is known of a query row so far: the largest score, and the sum of exp(score - top).
struct Softmax {
  float top = -__builtin_inff(), total = 0.f;

  // A larger maximum: what to multiply earlier sums by. A row of NaN or of minus infinity has no maximum: exp of the
  // difference then carries NaN on.
  float raise(float high) {
    const float keep = top == high ? 1.f : exp_one(top - high);
    total *= keep;
    top = high;
    return keep;
  }
};

// From sums over the keys to `out` and `lse`, with the own items of the rows.
inline void finish_rows(const CrossAttnParams& p, const AttnScratch& s, const QueryBlock& run, int64_t head,
                        float* sums, Softmax* softmax) {
  const int64_t dp = pad(p.d), ep = pad(p.e), kv_head = head / (p.q_heads / p.kv_heads);
  const bool empty = p.self_k == nullptr && run.kv_begin == run.kv_end;
  for (int64_t r = 0; r < run.end - run.begin; ++r) {
    float* row = sums + r * ep;
    Softmax& soft = softmax[r];
    if (p.self_k != nullptr) {
      load_rows(p.dtype, p.q, run.begin + r, p.q_heads, head, 1, p.d, s.query);
      load_rows(p.dtype, p.self_k, run.begin + r, p.kv_heads, kv_head, 1, p.d, s.key);
      load_rows(p.dtype, p.self_v, run.begin + r, p.kv_heads, kv_head, 1, p.e, s.value);
      scale_row(s.query, p.scale, dp);
      const float own = dot(s.query, s.key, dp);
      scale_row(row, soft.raise(own > soft.top ? own : soft.top), ep);
      const float weight = exp_one(own - soft.top);
      add_row(row, weight, s.value, ep);
      soft.total += weight;
    }
    if (!empty) scale_row(row, 1.f / soft.total, ep);
    p.lse[(run.begin + r) * p.q_heads + head] = empty ? -__builtin_inff() : soft.top + __builtin_logf(soft.total);
  }
  store_rows(p.dtype, p.out, run.begin, p.q_heads, head, run.end - run.begin, p.e, sums);
}

void cross_attn_forward(const CrossAttnParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const AttnScratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const QueryBlock& run = p.query_runs[t / p.q_heads];
    const int64_t head = t % p.q_heads, kv_head = head / (p.q_heads / p.kv_heads), rows = run.end - run.begin;
    Softmax softmax[kQueryRun];
    load_rows(p.dtype, p.q, run.begin, p.q_heads, head, rows, p.d, s.run_query);
    scale_row(s.run_query, p.scale, rows * dp);
    std::memset(s.run_out, 0, rows * ep * 4);
    for (int64_t from = run.kv_begin; from < run.kv_end; from += kKeyBlock) {
      const int64_t keys = run.kv_end - from < kKeyBlock ? run.kv_end - from : kKeyBlock;
      load_rows(p.dtype, p.k, from, p.kv_heads, kv_head, keys, p.d, s.key);
      transpose(s.key, keys, p.d, s.key_t);
      load_rows(p.dtype, p.v, from, p.kv_heads, kv_head, keys, p.e, s.value);
      for (int64_t first = 0; first < rows; first += kQueryBlock) {
        const int64_t count = rows - first < kQueryBlock ? rows - first : kQueryBlock;
        float* out = s.run_out + first * ep;
        product(count, kKeyBlock, p.d, s.run_query + first * dp, dp, 1, s.key_t, kKeyBlock, s.scores, kKeyBlock, false);
        for (int64_t r = 0; r < count; ++r) {
          float* row = s.scores + r * kKeyBlock;
          Softmax& soft = softmax[first + r];
          const float keep = soft.raise(largest(row, keys, soft.top));
          soft.total += exp_row(row, soft.top, keys);
          if (keep != 1.f) scale_row(out + r * ep, keep, ep);
        }
        product(count, ep, keys, s.scores, kKeyBlock, 1, s.value, ep, out, ep, true);
      }
    }
    finish_rows(p, s, run, head, s.run_out, softmax);
  }
}

// scores := probabilities, grad_scores := gradients of the probabilities, of one tile; zeros beyond `keys`
inline void tile_products(const AttnScratch& s, const CrossAttnParams& p, int64_t query_begin, int64_t rows,
                          int64_t head, int64_t keys) {
  product(rows, kKeyBlock, p.d, s.query, pad(p.d), 1, s.key_t, kKeyBlock, s.scores, kKeyBlock, false);
  product(rows, kKeyBlock, p.e, s.grad, pad(p.e), 1, s.value_t, kKeyBlock, s.grad_scores, kKeyBlock, false);
  for (int64_t r = 0; r < rows; ++r) {
    const float lse = p.lse[(query_begin + r) * p.q_heads + head];
    float* prob = s.scores + r * kKeyBlock;
    for (int64_t j = 0; j < kKeyBlock; j += kLanes) store(prob + j, exp_v(p.scale * load(prob + j) - lse));
    for (int64_t j = keys; j < kKeyBlock; ++j) prob[j] = 0.f;
  }
}

// From tile_products to gradients of the unscaled scores.
inline void tile_gradients(const AttnScratch& s, const CrossAttnParams& p, int64_t query_begin, int64_t rows,
                           int64_t head) {
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t at = (query_begin + r) * p.q_heads + head;
    const float delta = p.delta[at], norm = p.norm[at];
    float *prob = s.scores + r * kKeyBlock, *grad = s.grad_scores + r * kKeyBlock;
    for (int64_t j = 0; j < kKeyBlock; j += kLanes) {
      const vf weight = norm * load(prob + j);
      store(prob + j, weight);
      store(grad + j, p.scale * weight * (load(grad + j) - delta));
    }
  }
}

inline void load_keys(const AttnScratch& s, const CrossAttnParams& p, int64_t from, int64_t keys, int64_t kv_head) {
  load_rows(p.dtype, p.k, from, p.kv_heads, kv_head, keys, p.d, s.key);
  transpose(s.key, keys, p.d, s.key_t);
  load_rows(p.dtype, p.v, from, p.kv_heads, kv_head, keys, p.e, s.value);
  transpose(s.value, keys, p.e, s.value_t);
}

// From the sums over the keys (of the probabilities, and of them times their gradients) to norm and delta, own items
// included.
inline void finish_sums(const AttnScratch& s, const CrossAttnParams& p, const QueryBlock& block, int64_t head,
                        float* total, float* mean) {
  const int64_t dp = pad(p.d), ep = pad(p.e), kv_head = head / (p.q_heads / p.kv_heads);
  for (int64_t r = 0; r < block.end - block.begin; ++r) {
    const int64_t at = (block.begin + r) * p.q_heads + head;
    if (p.self_k != nullptr) {
      load_rows(p.dtype, p.self_k, block.begin + r, p.kv_heads, kv_head, 1, p.d, s.own_k);
      load_rows(p.dtype, p.self_v, block.begin + r, p.kv_heads, kv_head, 1, p.e, s.own_v);
      const float weight = exp_one(p.scale * dot(s.query + r * dp, s.own_k, dp) - p.lse[at]);
      total[r] += weight;
      mean[r] += weight * dot(s.grad + r * ep, s.own_v, ep);
    }
    p.norm[at] = total[r] == 0.f ? 0.f : 1.f / total[r];  // 0: a row that sees nothing
    p.delta[at] = mean[r] * p.norm[at] - (p.grad_lse != nullptr ? p.grad_lse[at] : 0.f);
  }
}

// The own items' gradients, and their part of the queries' (in sum_d). Query heads that share an own item add up, in
// order; the first starts from nothing.
inline void own_gradients(const AttnScratch& s, const CrossAttnParams& p, const QueryBlock& block, int64_t head) {
  const int64_t dp = pad(p.d), ep = pad(p.e), share = p.q_heads / p.kv_heads, kv_head = head / share;
  for (int64_t r = 0; p.self_k != nullptr && r < block.end - block.begin; ++r) {
    const int64_t row = block.begin + r, at = row * p.q_heads + head;
    const float *query = s.query + r * dp, *grad = s.grad + r * ep;
    float *sum_k = s.own_k + dp, *sum_v = s.own_v + ep;
    load_rows(p.dtype, p.self_k, row, p.kv_heads, kv_head, 1, p.d, s.own_k);
    load_rows(p.dtype, p.self_v, row, p.kv_heads, kv_head, 1, p.e, s.own_v);
    const float weight = p.norm[at] * exp_one(p.scale * dot(query, s.own_k, dp) - p.lse[at]);
    const float pull = p.scale * weight * (dot(grad, s.own_v, ep) - p.delta[at]);
    add_row(s.sum_d + r * dp, pull, s.own_k, dp);
    std::memset(sum_k, 0, dp * 4);
    std::memset(sum_v, 0, ep * 4);
    if (head > kv_head * share) {
      load_rows(p.dtype, p.grad_self_k, row, p.kv_heads, kv_head, 1, p.d, sum_k);
      load_rows(p.dtype, p.grad_self_v, row, p.kv_heads, kv_head, 1, p.e, sum_v);
    }
    add_row(sum_k, pull, query, dp);
    add_row(sum_v, weight, grad, ep);
    store_rows(p.dtype, p.grad_self_k, row, p.kv_heads, kv_head, 1, p.d, sum_k);
    store_rows(p.dtype, p.grad_self_v, row, p.kv_heads, kv_head, 1, p.e, sum_v);
  }
}

void cross_attn_backward_queries(const CrossAttnParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const AttnScratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), share = p.q_heads / p.kv_heads;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const QueryBlock& block = p.long_queries[t / p.kv_heads];
    const int64_t kv_head = t % p.kv_heads, rows = block.end - block.begin;
    for (int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head) {
      load_rows(p.dtype, p.grad_out, block.begin, p.q_heads, head, rows, p.e, s.grad);
      load_rows(p.dtype, p.q, block.begin, p.q_heads, head, rows, p.d, s.query);
      // The probabilities' sum and their mean gradient first. Both could be had from `out` and `lse`, but those are
      // rounded: then a softmax over one key would not give exactly no gradient.
      float total[kQueryBlock] = {}, mean[kQueryBlock] = {};
      for (int64_t from = block.kv_begin; from < block.kv_end; from += kKeyBlock) {
        const int64_t keys = block.kv_end - from < kKeyBlock ? block.kv_end - from : kKeyBlock;
        load_keys(s, p, from, keys, kv_head);
        tile_products(s, p, block.begin, rows, head, keys);
        for (int64_t r = 0; r < rows; ++r) {
          total[r] += sum_row(s.scores + r * kKeyBlock);
          mean[r] += dot(s.scores + r * kKeyBlock, s.grad_scores + r * kKeyBlock, kKeyBlock);
        }
      }
      finish_sums(s, p, block, head, total, mean);
      std::memset(s.sum_d, 0, rows * dp * 4);
      for (int64_t from = block.kv_begin; from < block.kv_end; from += kKeyBlock) {
        const int64_t keys = block.kv_end - from < kKeyBlock ? block.kv_end - from : kKeyBlock;
        load_keys(s, p, from, keys, kv_head);
        tile_products(s, p, block.begin, rows, head, keys);
        tile_gradients(s, p, block.begin, rows, head);
        product(rows, dp, keys, s.grad_scores, kKeyBlock, 1, s.key, dp, s.sum_d, dp, true);
      }
      own_gradients(s, p, block, head);
      store_rows(p.dtype, p.grad_q, block.begin, p.q_heads, head, rows, p.d, s.sum_d);
    }
  }
}

void cross_attn_backward_keys(const CrossAttnParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const AttnScratch s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), share = p.q_heads / p.kv_heads;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const KeyBlock& block = p.key_blocks[t / p.kv_heads];
    const int64_t kv_head = t % p.kv_heads, keys = block.end - block.begin;
    load_keys(s, p, block.begin, keys, kv_head);
    std::memset(s.sum_d, 0, keys * dp * 4);
    std::memset(s.sum_e, 0, keys * ep * 4);
    for (int64_t reader = block.first_reader; reader < block.end_reader; ++reader) {
      const QueryBlock& queries = p.query_blocks[p.readers[reader]];
      const int64_t rows = queries.end - queries.begin;
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head) {
        load_rows(p.dtype, p.q, queries.begin, p.q_heads, head, rows, p.d, s.query);
        load_rows(p.dtype, p.grad_out, queries.begin, p.q_heads, head, rows, p.e, s.grad);
        tile_products(s, p, queries.begin, rows, head, keys);
        tile_gradients(s, p, queries.begin, rows, head);
        // A block's sum before the total: short chains of additions round less. The keys' rows are free by now.
        product(keys, dp, rows, s.grad_scores, 1, kKeyBlock, s.query, dp, s.key, dp, false);
        product(keys, ep, rows, s.scores, 1, kKeyBlock, s.grad, ep, s.value, ep, false);
        add_row(s.sum_d, 1.f, s.key, keys * dp);
        add_row(s.sum_e, 1.f, s.value, keys * ep);
      }
    }
    store_rows(p.dtype, p.grad_k, block.begin, p.kv_heads, kv_head, keys, p.d, s.sum_d);
    store_rows(p.dtype, p.grad_v, block.begin, p.kv_heads, kv_head, keys, p.e, s.sum_e);
  }
}

// What the backward of a short sequence keeps beside AttnScratch: all of its keys, their tiles, and their gradients.
struct ShortScratch {
  float *key, *key_t, *value, *value_t, *scores, *grad_scores, *grad_k, *grad_v, *part;
  ShortScratch(float* base, int64_t d, int64_t e) {
    const int64_t dp = pad(d), ep = pad(e);
    const auto take = [&](int64_t n) { return base += n, base - n; };
    key = take(kShortKeys * dp), key_t = take(kShortKeys * dp);
    value = take(kShortKeys * ep), value_t = take(kShortKeys * ep);
    scores = take(kQueryBlock * kShortKeys), grad_scores = take(kQueryBlock * kShortKeys);
    grad_k = take(kShortKeys * dp), grad_v = take(kShortKeys * ep);
    part = take(kShortKeys * (dp > ep ? dp : ep));
  }
};

// All of a sequence's tiles are at hand, so each is computed once: five products, not nine.
void cross_attn_backward_short(const CrossAttnParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const AttnScratch s(scratch, p.d, p.e);
  const ShortScratch all(s.end, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), share = p.q_heads / p.kv_heads;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const KeyBlock& sequence = p.short_sequences[t / p.kv_heads];
    const int64_t kv_head = t % p.kv_heads, keys = sequence.end - sequence.begin;
    const int64_t width = (keys + kKeyBlock - 1) / kKeyBlock * kKeyBlock;
    load_rows(p.dtype, p.k, sequence.begin, p.kv_heads, kv_head, keys, p.d, all.key);
    load_rows(p.dtype, p.v, sequence.begin, p.kv_heads, kv_head, keys, p.e, all.value);
    for (int64_t from = 0; from < keys; from += kKeyBlock) {
      const int64_t count = keys - from < kKeyBlock ? keys - from : kKeyBlock;
      transpose(all.key + from * dp, count, p.d, all.key_t + from * dp);
      transpose(all.value + from * ep, count, p.e, all.value_t + from * ep);
    }
    std::memset(all.grad_k, 0, keys * dp * 4);
    std::memset(all.grad_v, 0, keys * ep * 4);
    for (int64_t reader = sequence.first_reader; reader < sequence.end_reader; ++reader) {
      const QueryBlock& block = p.query_blocks[p.readers[reader]];
      const int64_t rows = block.end - block.begin;
      for (int64_t head = kv_head * share; head < (kv_head + 1) * share; ++head) {
        load_rows(p.dtype, p.q, block.begin, p.q_heads, head, rows, p.d, s.query);
        load_rows(p.dtype, p.grad_out, block.begin, p.q_heads, head, rows, p.e, s.grad);
        for (int64_t from = 0; from < keys; from += kKeyBlock) {
          product(rows, kKeyBlock, p.d, s.query, dp, 1, all.key_t + from * dp, kKeyBlock, all.scores + from, width,
                  false);
          product(rows, kKeyBlock, p.e, s.grad, ep, 1, all.value_t + from * ep, kKeyBlock, all.grad_scores + from,
                  width, false);
        }
        float total[kQueryBlock] = {}, mean[kQueryBlock] = {};
        for (int64_t r = 0; r < rows; ++r) {
          const float lse = p.lse[(block.begin + r) * p.q_heads + head];
          float *prob = all.scores + r * width, *grad = all.grad_scores + r * width;
          vf sum{}, weighted{};
          for (int64_t j = 0; j < keys; j += kLanes) {
            vf weight = exp_v(p.scale * load(prob + j) - lse);
            if (j + kLanes > keys) weight = first_lanes(weight, keys - j);
            store(prob + j, weight);
            sum += weight;
            weighted += weight * load(grad + j);
          }
          total[r] = sum_lanes(sum), mean[r] = sum_lanes(weighted);
        }
        finish_sums(s, p, block, head, total, mean);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (block.begin + r) * p.q_heads + head;
          float *prob = all.scores + r * width, *grad = all.grad_scores + r * width;
          for (int64_t j = 0; j < keys; j += kLanes) {
            const vf weight = p.norm[at] * load(prob + j);
            store(prob + j, weight);
            store(grad + j, p.scale * weight * (load(grad + j) - p.delta[at]));
          }
        }
        product(rows, dp, keys, all.grad_scores, width, 1, all.key, dp, s.sum_d, dp, false);
        own_gradients(s, p, block, head);
        store_rows(p.dtype, p.grad_q, block.begin, p.q_heads, head, rows, p.d, s.sum_d);
        // A block's sum before the total: short chains of additions round less.
        product(keys, dp, rows, all.grad_scores, 1, width, s.query, dp, all.part, dp, false);
        add_row(all.grad_k, 1.f, all.part, keys * dp);
        product(keys, ep, rows, all.scores, 1, width, s.grad, ep, all.part, ep, false);
        add_row(all.grad_v, 1.f, all.part, keys * ep);
      }
    }
    store_rows(p.dtype, p.grad_k, sequence.begin, p.kv_heads, kv_head, keys, p.d, all.grad_k);
    store_rows(p.dtype, p.grad_v, sequence.begin, p.kv_heads, kv_head, keys, p.e, all.grad_v);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
