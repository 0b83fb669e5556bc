// Quasi-linear attention in AMX tiles, on bfloat16 rows and on wide float32 ones; others go to the AVX-512 kernels.
// Operands of every product (phi of queries and keys, the state's map, its gradient) are rounded to bfloat16 for
// bfloat16 rows and split into three for float32 ones; sums are float32.
#define VISTA_ISA amx
#define VISTA_LANES 16
#include <type_traits>

#include "amx_tiles.h"
#include "qla_common.h"

namespace vista::cpu {
namespace amx {

// Rows of a block: two tiles deep, so that sums are loaded and stored half as often.
constexpr int64_t kTall = kQlaTileRows;

// Buffers of one thread. Operands are in words of pairs; `pairs` and `turned` hold a block as a right and as a left
// operand of a sum over its rows.
template <int kParts>
struct Room {
  uint32_t *rows_d, *rows_e;             // [kParts, kTall, pad32 / 2]
  uint32_t *pairs_d, *pairs_e, *turned;  // [kParts, kTall / 2, pad], [kParts, pad, kTall / 2]
  uint32_t *map, *map_t;                 // [kParts, pad32 / 2, pad]
  float *slope, *result_d, *result_e;    // [kTall, pad32], [kTall, pad]
  float *sum, *full, *full_t;            // [pad(d), pad(e)], and turned
  Room(float* base, int64_t d, int64_t e) {
    const int64_t dp = pad(d), ep = pad(e), dq = pad32(d), eq = pad32(e);
    const auto take = [&](int64_t floats) { return base += floats, base - floats; };
    const auto words = [&](int64_t n) { return reinterpret_cast<uint32_t*>(take(kParts * n)); };
    rows_d = words(kTall * dq / 2), rows_e = words(kTall * eq / 2);
    pairs_d = words(kTall / 2 * dp), pairs_e = words(kTall / 2 * ep), turned = words(dp * kTall / 2);
    map = words(dq / 2 * ep), map_t = words(eq / 2 * dp);
    slope = take(kTall * dq), result_d = take(kTall * dp), result_e = take(kTall * ep);
    sum = take(dp * ep), full = take(dp * ep), full_t = take(dp * ep);
  }
};

// The operands in those buffers.
inline Operand left_rows(const uint32_t* rows, int64_t n) { return {rows, pad32(n) * 2, kTall * pad32(n) * 2}; }
inline Operand right_map(const uint32_t* map, int64_t depth, int64_t n) {
  return {map, pad(n) * 4, pad32(depth) / 2 * pad(n) * 4};
}
inline Operand turned_block(const uint32_t* turned, int64_t n) { return {turned, kTall * 2, pad(n) * kTall * 2}; }
inline Operand paired_block(const uint32_t* pairs, int64_t n) { return {pairs, pad(n) * 4, kTall / 2 * pad(n) * 4}; }

// One head's share of up to kTall rows of a tensor; rows past the end read as zeros.
template <int kParts>
struct Rows {
  using Value = std::conditional_t<kParts == 1, uint16_t, float>;
  const Value* base;
  int64_t n, stride, rows;
  Rows(const QlaParams& p, const void* tensor, int64_t row, int64_t head, int64_t n_, int64_t rows_)
      : base(static_cast<const Value*>(tensor) + (row * p.heads + head) * n_),
        n(n_),
        stride(p.heads * n_),
        rows(rows_) {}
  __mmask16 inside(int64_t r, int64_t column) const { return r < rows && column < n ? columns_from(column, n) : 0; }
  // kWhole: nothing lies outside
  template <bool kWhole>
  [[gnu::always_inline]] vf at(int64_t r, int64_t column) const {
    const Value* from = base + r * stride + column;
    const __mmask16 columns = kWhole ? kAll : inside(r, column);
    if constexpr (kParts == 1)
      return (vf)widen(load_bfloat16(from, columns));
    else
      return (vf)_mm512_maskz_loadu_ps(columns, from);
  }
  // Rows r and r + 1 of the next block. GCC drops calls of a function that does nothing but prefetch.
  [[gnu::always_inline]] void expect(int64_t r) const {
    const uintptr_t first = reinterpret_cast<uintptr_t>(base + kTall * stride);
    constexpr int64_t kSize = sizeof(Value);
    if (r == 0) touch_pages(first, stride * kSize, kTall);
    for (int64_t i = r; i < r + 2; ++i)
      for (int64_t line = 0; line < n * kSize; line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(first + i * stride * kSize + line), 0, 2);
  }
};

// Where a block of rows goes, as it is or through phi; each may be null.
struct Destination {
  uint32_t *left, *pairs;  // [kParts, kTall, pad32(n) / 2], [kParts, kTall / 2, pad(n)]
  float* slope;            // phi's, [kTall, pad32(n)]
};

// Rows r and r + 1. Past the last row and column zeros, whatever phi(0) is.
template <Activation kKind, bool kLeft, bool kPairs, bool kSlope, bool kWhole, int kParts>
inline void fill_rows(const Rows<kParts>& x, int64_t r, const Destination& to) {
  const int64_t width = pad(x.n), words = pad32(x.n) / 2;
  for (int64_t j = 0; j < width; j += 32) {
    const auto value = [&](int64_t i, int64_t column) __attribute__((always_inline)) {
      vf rise;
      vf result = tile_phi<kKind, kParts>(x.template at<kWhole>(r + i, column), kSlope ? &rise : nullptr);
      if (kKind == Activation::kShiftedElu && !kWhole)
        result = (vf)_mm512_maskz_mov_ps(x.inside(r + i, column), (__m512)result);
      if (kSlope) store(to.slope + (r + i) * 2 * words + column, rise);
      return result;
    };
    const vf square[2][2] = {{value(0, j), value(0, j + 16)}, {value(1, j), value(1, j + 16)}};
    if (kLeft) store_left<kParts>(square, to.left + r * words + j / 2, words, kTall * words);
    if (kPairs) store_pairs<kParts>(square, to.pairs + r / 2 * width + j, kTall / 2 * width, j + 16 < width);
  }
}

template <Activation kKind, bool kLeft, bool kPairs, bool kSlope, int kParts>
inline void fill_block(const Rows<kParts>& x, const Destination& to) {
  for (int64_t r = 0; r < pad32(x.rows); r += 2) {
    x.expect(r);
    if (r + 2 <= x.rows && x.n % 32 == 0)
      fill_rows<kKind, kLeft, kPairs, kSlope, true>(x, r, to);
    else
      fill_rows<kKind, kLeft, kPairs, kSlope, false>(x, r, to);
  }
}

template <bool kLeft, bool kPairs, bool kSlope, int kParts>
inline void fill_block(Activation kind, const Rows<kParts>& x, const Destination& to) {
  switch (kind) {
    case Activation::kSilu: return fill_block<Activation::kSilu, kLeft, kPairs, kSlope>(x, to);
    case Activation::kShiftedElu: return fill_block<Activation::kShiftedElu, kLeft, kPairs, kSlope>(x, to);
    case Activation::kRelu: return fill_block<Activation::kRelu, kLeft, kPairs, kSlope>(x, to);
    case Activation::kIdentity: return fill_block<Activation::kIdentity, kLeft, kPairs, kSlope>(x, to);
  }
}

// sum += left^T right over a block, both as pairs
template <int kParts>
inline void add_outer(int64_t rows, const uint32_t* left, int64_t d, const uint32_t* right, int64_t e, uint32_t* turned,
                      float* sum) {
  const int64_t dp = pad(d), words = kTall / 2;
  for (int64_t part = 0; part < kParts; ++part)
    for (int64_t i = 0; i < pad32(rows) / 2; i += 16)
      for (int64_t j = 0; j < dp; j += 16)
        transpose_words(left + (part * words + i) * dp + j, dp, turned + (part * dp + j) * words + i, words);
  tiled_product<kParts>(dp, pad(e), pad32(rows), turned_block(turned, d), paired_block(right, e), sum, pad(e), true);
}

// A block of float32 results, times `factor` unless null, to a head's rows.
template <int kParts>
inline void store_rows(const QlaParams& p, void* tensor, int64_t row, int64_t head, int64_t n, int64_t rows,
                       const float* from, const float* factor) {
  using Value = typename Rows<kParts>::Value;
  constexpr int64_t kLine = 64 / sizeof(Value);
  const int64_t width = pad(n), stride = p.heads * n;
  Value* to = static_cast<Value*>(tensor) + (row * p.heads + head) * n;
  const auto value = [&](int64_t r, int64_t j) {
    const vf x = load(from + r * width + j);
    return (__m512)(factor == nullptr ? x : x * load(factor + r * pad32(n) + j));
  };
  touch_pages(reinterpret_cast<uintptr_t>(to + kTall * stride), stride * sizeof(Value), kTall);
  const bool past_caches = p.stream && can_stream(tensor, n * sizeof(Value));
  for (int64_t r = 0; r < rows; ++r)
    if (past_caches) {
      for (int64_t j = 0; j < n; j += kLine)
        if constexpr (kParts == 1)
          _mm512_stream_si512(reinterpret_cast<__m512i*>(to + r * stride + j),
                              (__m512i)_mm512_cvtne2ps_pbh(value(r, j + 16), value(r, j)));
        else
          _mm512_stream_ps(to + r * stride + j, value(r, j));
    } else {
      for (int64_t j = 0; j < n; j += 16)
        if constexpr (kParts == 1)
          _mm256_mask_storeu_epi16(to + r * stride + j, columns_from(j, n), (__m256i)_mm512_cvtneps_pbh(value(r, j)));
        else
          _mm512_mask_storeu_ps(to + r * stride + j, columns_from(j, n), value(r, j));
    }
}

inline int64_t rows_of(int64_t row, int64_t end) { return end - row < kTall ? end - row : kTall; }

template <int kParts>
void qla_state(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Tiles tiles;
  const Room<kParts> s(scratch, p.d, p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    std::memset(s.sum, 0, pad(p.d) * pad(p.e) * 4);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kTall) {
      const int64_t rows = rows_of(row, end);
      const Rows<kParts> k(p, p.k, row, task.head, p.d, rows), v(p, p.v, row, task.head, p.e, rows);
      fill_block<false, true, false>(p.activation, k, {nullptr, s.pairs_d, nullptr});
      fill_block<Activation::kIdentity, false, true, false>(v, {nullptr, s.pairs_e, nullptr});
      add_outer<kParts>(rows, s.pairs_d, p.d, s.pairs_e, p.e, s.turned, s.sum);
    }
    copy_out(s.sum, p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
}

template <int kParts>
void qla_apply(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Tiles tiles;
  const Room<kParts> s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), dq = pad32(p.d);
  float *query = s.slope, *key = s.slope + dp, *value = s.result_d;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    make_map(p, task, s.full);
    matrix_to_pairs<kParts>(s.full, p.d, p.e, s.map);
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kTall) {
      const int64_t rows = rows_of(row, task.chunk.end);
      const Rows<kParts> q(p, p.q, row, task.head, p.d, rows);
      fill_block<true, false, false>(p.activation, q, {s.rows_d, nullptr, nullptr});
      tiled_product<kParts>(pad(rows), ep, dq, left_rows(s.rows_d, p.d), right_map(s.map, p.d, p.e), s.result_e, ep,
                            false);
      const int64_t first = p.own_term ? clamp_to(task.chunk.source_end - row, 0, rows) : rows;
      for (int64_t r = first; r < rows; ++r) {
        const int64_t packed = (row + r) * p.heads + task.head;
        load_row(p.dtype, p.q, packed * p.d, query, p.d, dp);
        load_row(p.dtype, p.k, packed * p.d, key, p.d, dp);
        load_row(p.dtype, p.v, packed * p.e, value, p.e, ep);
        activate(p.activation, query, query, nullptr, dp);
        activate(p.activation, key, key, nullptr, dp);
        float own = 0.f;
        for (int64_t i = 0; i < p.d; ++i) own += query[i] * key[i];
        own *= p.scale[task.chunk.seq];
        float* out = s.result_e + r * ep;
        for (int64_t j = 0; j < ep; j += kLanes) store(out + j, load(out + j) + own * load(value + j));
      }
      store_rows<kParts>(p, p.out, row, task.head, p.e, rows, s.result_e, nullptr);
    }
  }
  if (p.stream) drain();
}

template <int kParts>
void qla_apply_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Tiles tiles;
  const Room<kParts> s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), eq = pad32(p.e);
  float *query = s.full, *grad = s.result_e;  // of the targets; the map is in its tiles by then
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    make_map(p, task, s.full);
    transpose(s.full, p.d, p.e, s.full_t);
    matrix_to_pairs<kParts>(s.full_t, p.e, p.d, s.map_t);
    std::memset(s.sum, 0, dp * ep * 4);
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kTall) {
      const int64_t rows = rows_of(row, task.chunk.end);
      const Rows<kParts> q(p, p.q, row, task.head, p.d, rows), g(p, p.grad_out, row, task.head, p.e, rows);
      fill_block<false, true, true>(p.activation, q, {nullptr, s.pairs_d, s.slope});
      fill_block<Activation::kIdentity, true, true, false>(g, {s.rows_e, s.pairs_e, nullptr});
      add_outer<kParts>(rows, s.pairs_d, p.d, s.pairs_e, p.e, s.turned, s.sum);
      tiled_product<kParts>(pad(rows), dp, eq, left_rows(s.rows_e, p.e), right_map(s.map_t, p.e, p.d), s.result_d, dp,
                            false);
      const int64_t first = p.own_term ? clamp_to(task.chunk.source_end - row, 0, rows) : rows;
      for (int64_t r = first; r < rows; ++r) {
        const int64_t packed = (row + r) * p.heads + task.head;
        load_row(p.dtype, p.q, packed * p.d, query, p.d, dp);
        activate(p.activation, query, query, nullptr, dp);
        load_row(p.dtype, p.grad_out, packed * p.e, grad, p.e, ep);
        own_gradients(p, task, row + r, query, grad, s.result_d + r * dp, query + dp, grad + ep);
      }
      store_rows<kParts>(p, p.grad_q, row, task.head, p.d, rows, s.result_d, s.slope);
    }
    copy_out(s.sum, p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
  if (p.stream) drain();
}

template <int kParts>
void qla_state_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  const Tiles tiles;
  const Room<kParts> s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), dq = pad32(p.d), eq = pad32(p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    load_grad_state(p, task, s.full, s.full_t);
    matrix_to_pairs<kParts>(s.full, p.d, p.e, s.map);
    matrix_to_pairs<kParts>(s.full_t, p.e, p.d, s.map_t);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kTall) {
      const int64_t rows = rows_of(row, end);
      const Rows<kParts> k(p, p.k, row, task.head, p.d, rows), v(p, p.v, row, task.head, p.e, rows);
      fill_block<true, false, true>(p.activation, k, {s.rows_d, nullptr, s.slope});
      fill_block<Activation::kIdentity, true, false, false>(v, {s.rows_e, nullptr, nullptr});
      tiled_product<kParts>(pad(rows), dp, eq, left_rows(s.rows_e, p.e), right_map(s.map_t, p.e, p.d), s.result_d, dp,
                            false);
      store_rows<kParts>(p, p.grad_k, row, task.head, p.d, rows, s.result_d, s.slope);
      tiled_product<kParts>(pad(rows), ep, dq, left_rows(s.rows_d, p.d), right_map(s.map, p.d, p.e), s.result_e, ep,
                            false);
      store_rows<kParts>(p, p.grad_v, row, task.head, p.e, rows, s.result_e, nullptr);
    }
  }
  if (p.stream) drain();
}

using Kernel = void (*)(const QlaParams&, int64_t, int64_t, float*);

// float32 rows pay for the splitting of their values, and beside tiles half of the vector multipliers stand still (for
// a microsecond): only products of this many values and more gain (docs/cpu_qla.md).
constexpr int64_t kFloatDims = 128;

template <Kernel kBFloat16, Kernel kFloat, Kernel QlaKernels::*kVectors>
void by_dtype(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype == DType::kBFloat16) return kBFloat16(p, task_begin, task_end, scratch);
  const bool tiles = p.dtype == DType::kFloat && p.d >= kFloatDims && p.e >= kFloatDims;
  (tiles ? kFloat : qla_kernels_avx512.*kVectors)(p, task_begin, task_end, scratch);
}

}  // namespace amx

const QlaKernels qla_kernels_amx{
    amx::by_dtype<amx::qla_state<1>, amx::qla_state<3>, &QlaKernels::state>,
    amx::by_dtype<amx::qla_apply<1>, amx::qla_apply<3>, &QlaKernels::apply>,
    amx::by_dtype<amx::qla_apply_backward<1>, amx::qla_apply_backward<3>, &QlaKernels::apply_backward>,
    amx::by_dtype<amx::qla_state_backward<1>, amx::qla_state_backward<3>, &QlaKernels::state_backward>,
    amx::qla_state_gradient};

}  // namespace vista::cpu
