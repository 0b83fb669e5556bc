// Quasi-linear attention on bfloat16 rows in AMX tiles; other rows go to the AVX-512 kernels. Operands of every product
// are rounded to bfloat16 (phi of queries and keys, the state's map, its gradient), sums are float32.
#define VISTA_ISA amx
#define VISTA_LANES 16
#include "amx_tiles.h"
#include "qla_common.h"

namespace vista::cpu {
namespace amx {

// Rows of a block: two tiles deep, so that sums are loaded and stored half as often.
constexpr int64_t kTall = kQlaTileRows;

// Buffers of one thread. `pairs` and `turned` hold a block as a right and as a left operand of a sum over its rows.
struct Room {
  uint16_t *rows_d, *rows_e;                                 // [kTall, pad32]
  uint32_t *pairs_d, *pairs_e, *turned, *map, *map_t;        // [kTall / 2, pad], [pad, kTall / 2], [pad32 / 2, pad]
  float *slope, *result_d, *result_e, *sum, *full, *full_t;  // [kTall, pad], [pad(d), pad(e)], [pad(e), pad(d)]
  Room(float* base, int64_t d, int64_t e) {
    const int64_t dp = pad(d), ep = pad(e), dq = pad32(d), eq = pad32(e);
    const auto take = [&](int64_t floats) { return base += floats, base - floats; };
    rows_d = reinterpret_cast<uint16_t*>(take(kTall * dq / 2));
    rows_e = reinterpret_cast<uint16_t*>(take(kTall * eq / 2));
    pairs_d = reinterpret_cast<uint32_t*>(take(kTall / 2 * dp));
    pairs_e = reinterpret_cast<uint32_t*>(take(kTall / 2 * ep));
    turned = reinterpret_cast<uint32_t*>(take(dp * kTall / 2));
    map = reinterpret_cast<uint32_t*>(take(dq / 2 * ep));
    map_t = reinterpret_cast<uint32_t*>(take(eq / 2 * dp));
    slope = take(kTall * dp), result_d = take(kTall * dp), result_e = take(kTall * ep);
    sum = take(dp * ep), full = take(dp * ep), full_t = take(dp * ep);
  }
};

// One head's share of up to kTall rows of a tensor; rows past the end read as zeros.
struct Rows {
  const uint16_t* base;
  int64_t n, stride, rows, filled;  // filled: with zeros, up to whole tiles
  Rows(const QlaParams& p, const void* tensor, int64_t row, int64_t head, int64_t n_, int64_t rows_)
      : base(static_cast<const uint16_t*>(tensor) + (row * p.heads + head) * n_),
        n(n_),
        stride(p.heads * n_),
        rows(rows_),
        filled(pad32(rows_)) {}
  void touch_next() const { touch_pages(reinterpret_cast<uintptr_t>(base + kTall * stride), stride * 2, kTall); }
  __m256i at(int64_t r, int64_t column) const {
    return load_bfloat16(base + r * stride + column, r < rows ? columns_from(column, n) : 0);
  }
  void expect(int64_t r) const {  // the row a block later
    const uintptr_t first = reinterpret_cast<uintptr_t>(base + (r + kTall) * stride);
    for (int64_t line = 0; line < n * 2; line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(first + line), 0, 2);
  }
};

// Rows as they are: a left operand (`to`, [kTall, pad32(n)]) or a right one (`pairs`, [kTall / 2, pad(n)]), or both.
inline void copy_rows(const Rows& x, uint16_t* to, uint32_t* pairs) {
  const int64_t width = pad(x.n), wide = pad32(x.n);
  x.touch_next();
  for (int64_t r = 0; r < x.filled; r += 2) {
    x.expect(r);
    x.expect(r + 1);
    for (int64_t j = 0; j < wide; j += 16) {
      const bool inside = j < width;
      const __m256i even = inside ? x.at(r, j) : __m256i{}, odd = inside ? x.at(r + 1, j) : __m256i{};
      if (to != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * wide + j), even);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (r + 1) * wide + j), odd);
      }
      if (pairs != nullptr && inside) _mm512_storeu_si512(pairs + r / 2 * width + j, pairs_of(even, odd));
    }
  }
}

// phi of the rows, and its slope [kTall, pad(n)] unless null. Past the last row and column zeros, whatever phi(0) is.
template <Activation kKind>
inline void phi_rows(const Rows& x, uint16_t* to, uint32_t* pairs, float* slope) {
  const int64_t width = pad(x.n), wide = pad32(x.n);
  x.touch_next();
  for (int64_t r = 0; r < x.filled; r += 2) {
    x.expect(r);
    x.expect(r + 1);
    for (int64_t j = 0; j < wide; j += 16) {
      __m512 value[2] = {}, rise[2];
      if (j < width)
        for (int i = 0; i < 2; ++i) {
          value[i] = short_phi<kKind>(widen(x.at(r + i, j)), slope == nullptr ? nullptr : &rise[i]);
          if (kKind == Activation::kShiftedElu)
            value[i] = _mm512_maskz_mov_ps(r + i < x.rows ? columns_from(j, x.n) : 0, value[i]);
          if (slope != nullptr) store(slope + (r + i) * width + j, (vf)rise[i]);
        }
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(value[1], value[0]);
      if (to != nullptr) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + r * wide + j),
                            _mm512_maskz_extracti64x4_epi64(0xf, both, 0));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (r + 1) * wide + j),
                            _mm512_maskz_extracti64x4_epi64(0xf, both, 1));
      }
      if (pairs != nullptr && j < width) _mm512_storeu_si512(pairs + r / 2 * width + j, interleave(both));
    }
  }
}

inline void phi_rows(Activation kind, const Rows& x, uint16_t* to, uint32_t* pairs, float* slope) {
  switch (kind) {
    case Activation::kSilu: return phi_rows<Activation::kSilu>(x, to, pairs, slope);
    case Activation::kShiftedElu: return phi_rows<Activation::kShiftedElu>(x, to, pairs, slope);
    case Activation::kRelu: return phi_rows<Activation::kRelu>(x, to, pairs, slope);
    case Activation::kIdentity: return phi_rows<Activation::kIdentity>(x, to, pairs, slope);
  }
}

// sum += left^T right over a block, both as pairs
inline void add_outer(int64_t rows, const uint32_t* left, int64_t d, const uint32_t* right, int64_t e, uint32_t* turned,
                      float* sum) {
  for (int64_t i = 0; i < pad32(rows) / 2; i += 16)
    for (int64_t j = 0; j < pad(d); j += 16)
      transpose_words(left + i * pad(d) + j, pad(d), turned + j * (kTall / 2) + i, kTall / 2);
  tiled_product(pad(d), pad(e), pad32(rows), turned, kTall, right, pad(e), sum, pad(e), true);
}

// A block of float32 results, times `factor` unless null, to a head's rows.
inline void store_rows(const QlaParams& p, void* tensor, int64_t row, int64_t head, int64_t n, int64_t rows,
                       const float* from, const float* factor) {
  const int64_t width = pad(n), stride = p.heads * n;
  uint16_t* to = static_cast<uint16_t*>(tensor) + (row * p.heads + head) * n;
  const auto value = [&](int64_t r, int64_t j) {
    const vf x = load(from + r * width + j);
    return (__m512)(factor == nullptr ? x : x * load(factor + r * width + j));
  };
  touch_pages(reinterpret_cast<uintptr_t>(to + kTall * stride), stride * 2, kTall);
  if (p.stream && can_stream(tensor, n * 2)) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t j = 0; j < n; j += 32)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + r * stride + j),
                            (__m512i)_mm512_cvtne2ps_pbh(value(r, j + 16), value(r, j)));
    return;
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < n; j += 16)
      _mm256_mask_storeu_epi16(to + r * stride + j, columns_from(j, n), (__m256i)_mm512_cvtneps_pbh(value(r, j)));
}

inline int64_t rows_of(int64_t row, int64_t end) { return end - row < kTall ? end - row : kTall; }

void qla_state(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype != DType::kBFloat16) return qla_kernels_avx512.state(p, task_begin, task_end, scratch);
  const Tiles tiles;
  const Room s(scratch, p.d, p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    std::memset(s.sum, 0, pad(p.d) * pad(p.e) * 4);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kTall) {
      const int64_t rows = rows_of(row, end);
      phi_rows(p.activation, Rows(p, p.k, row, task.head, p.d, rows), nullptr, s.pairs_d, nullptr);
      copy_rows(Rows(p, p.v, row, task.head, p.e, rows), nullptr, s.pairs_e);
      add_outer(rows, s.pairs_d, p.d, s.pairs_e, p.e, s.turned, s.sum);
    }
    copy_out(s.sum, p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
}

void qla_apply(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype != DType::kBFloat16) return qla_kernels_avx512.apply(p, task_begin, task_end, scratch);
  const Tiles tiles;
  const Room s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), dq = pad32(p.d);
  float *query = s.slope, *key = s.slope + dp, *value = s.result_d;
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    make_map(p, task, s.full);
    matrix_to_pairs(s.full, p.d, p.e, s.map);
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kTall) {
      const int64_t rows = rows_of(row, task.chunk.end);
      phi_rows(p.activation, Rows(p, p.q, row, task.head, p.d, rows), s.rows_d, nullptr, nullptr);
      tiled_product(pad(rows), ep, dq, s.rows_d, dq, s.map, ep, s.result_e, ep, false);
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
      store_rows(p, p.out, row, task.head, p.e, rows, s.result_e, nullptr);
    }
  }
  if (p.stream) drain();
}

void qla_apply_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype != DType::kBFloat16) return qla_kernels_avx512.apply_backward(p, task_begin, task_end, scratch);
  const Tiles tiles;
  const Room s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), eq = pad32(p.e);
  float *query = s.full, *grad = s.result_e;  // of the targets; the map is in its tiles by then
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    make_map(p, task, s.full);
    transpose(s.full, p.d, p.e, s.full_t);
    matrix_to_pairs(s.full_t, p.e, p.d, s.map_t);
    std::memset(s.sum, 0, dp * ep * 4);
    for (int64_t row = task.chunk.begin; row < task.chunk.end; row += kTall) {
      const int64_t rows = rows_of(row, task.chunk.end);
      phi_rows(p.activation, Rows(p, p.q, row, task.head, p.d, rows), nullptr, s.pairs_d, s.slope);
      copy_rows(Rows(p, p.grad_out, row, task.head, p.e, rows), s.rows_e, s.pairs_e);
      add_outer(rows, s.pairs_d, p.d, s.pairs_e, p.e, s.turned, s.sum);
      tiled_product(pad(rows), dp, eq, s.rows_e, eq, s.map_t, dp, s.result_d, dp, false);
      const int64_t first = p.own_term ? clamp_to(task.chunk.source_end - row, 0, rows) : rows;
      for (int64_t r = first; r < rows; ++r) {
        const int64_t packed = (row + r) * p.heads + task.head;
        load_row(p.dtype, p.q, packed * p.d, query, p.d, dp);
        activate(p.activation, query, query, nullptr, dp);
        load_row(p.dtype, p.grad_out, packed * p.e, grad, p.e, ep);
        own_gradients(p, task, row + r, query, grad, s.result_d + r * dp, query + dp, grad + ep);
      }
      store_rows(p, p.grad_q, row, task.head, p.d, rows, s.result_d, s.slope);
    }
    copy_out(s.sum, p.d, p.e, task.chunk.partial + task.head * p.d * p.e);
  }
  if (p.stream) drain();
}

void qla_state_backward(const QlaParams& p, int64_t task_begin, int64_t task_end, float* scratch) {
  if (p.dtype != DType::kBFloat16) return qla_kernels_avx512.state_backward(p, task_begin, task_end, scratch);
  const Tiles tiles;
  const Room s(scratch, p.d, p.e);
  const int64_t dp = pad(p.d), ep = pad(p.e), dq = pad32(p.d), eq = pad32(p.e);
  for (int64_t t = task_begin; t < task_end; ++t) {
    const Task task(p, t);
    load_grad_state(p, task, s.full, s.full_t);
    matrix_to_pairs(s.full, p.d, p.e, s.map);
    matrix_to_pairs(s.full_t, p.e, p.d, s.map_t);
    const int64_t end = clamp_to(task.chunk.source_end, task.chunk.begin, task.chunk.end);
    for (int64_t row = task.chunk.begin; row < end; row += kTall) {
      const int64_t rows = rows_of(row, end);
      phi_rows(p.activation, Rows(p, p.k, row, task.head, p.d, rows), s.rows_d, nullptr, s.slope);
      copy_rows(Rows(p, p.v, row, task.head, p.e, rows), s.rows_e, nullptr);
      tiled_product(pad(rows), dp, eq, s.rows_e, eq, s.map_t, dp, s.result_d, dp, false);
      store_rows(p, p.grad_k, row, task.head, p.d, rows, s.result_d, s.slope);
      tiled_product(pad(rows), ep, dq, s.rows_d, dq, s.map, ep, s.result_e, ep, false);
      store_rows(p, p.grad_v, row, task.head, p.e, rows, s.result_e, nullptr);
    }
  }
  if (p.stream) drain();
}

}  // namespace amx

const QlaKernels qla_kernels_amx{amx::qla_state, amx::qla_apply, amx::qla_apply_backward, amx::qla_state_backward,
                                 amx::qla_state_gradient};

}  // namespace vista::cpu
