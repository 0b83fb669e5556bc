// The element-wise passes of the feed-forward half, compiled once per instruction set. Rows pass through pieces of
// kPiece floats on the stack.
#pragma once

#include "row_values.h"
#include "vector_math.h"
#include "vista/sglu.h"

namespace vista::cpu {
namespace VISTA_ISA {

constexpr int64_t kPiece = 256;

struct alignas(64) Piece {
  float x[kPiece];

  void load(DType dtype, const void* base, int64_t offset, int64_t n) {
    load_row(dtype, base, offset, x, n, n < kPiece ? pad(n) : kPiece);
  }
  template <class F>
  void fill(int64_t n, F f) {
    for (int64_t i = 0; i < n; i += kLanes) VISTA_ISA::store(x + i, f(i));
  }
};

inline vf at(const Piece& piece, int64_t i) { return load(piece.x + i); }

template <class F>
inline void for_pieces(int64_t n, F f) {
  for (int64_t begin = 0; begin < n; begin += kPiece) f(begin, n - begin < kPiece ? n - begin : kPiece);
}

// Root of a positive number, in double: there is one for a row.
inline float inverse_root(double x) { return static_cast<float>(1.0 / __builtin_sqrt(x)); }

void sglu_normalize(DType dtype, int64_t rows, int64_t dim, float eps, const void* x, void* y, float* inverse) {
  Piece piece;
  for (int64_t row = 0; row < rows; ++row) {
    double squares = 0.0;
    for_pieces(dim, [&](int64_t begin, int64_t n) {
      piece.load(dtype, x, row * dim + begin, n);
      squares += dot(piece.x, piece.x, pad(n));
    });
    inverse[row] = inverse_root(squares / static_cast<double>(dim) + eps);
    for_pieces(dim, [&](int64_t begin, int64_t n) {
      piece.load(dtype, x, row * dim + begin, n);
      piece.fill(n, [&](int64_t i) { return at(piece, i) * inverse[row]; });
      store_row(dtype, y, row * dim + begin, piece.x, n);
    });
  }
}

template <class F>
inline void combine(DType dtype, int64_t size, const void* a, const void* b, void* out, F f) {
  Piece left, right;
  for_pieces(size, [&](int64_t begin, int64_t n) {
    left.load(dtype, a, begin, n);
    right.load(dtype, b, begin, n);
    left.fill(n, [&](int64_t i) { return f(at(left, i), at(right, i)); });
    store_row(dtype, out, begin, left.x, n);
  });
}

void sglu_multiply(DType dtype, int64_t n, const void* a, const void* b, void* out) {
  combine(dtype, n, a, b, out, [](vf x, vf y) { return x * y; });
}

void sglu_add(DType dtype, int64_t n, const void* a, const void* b, void* out) {
  combine(dtype, n, a, b, out, [](vf x, vf y) { return x + y; });
}

void sglu_gradients(DType dtype, int64_t rows, int64_t hidden, const float* inverse, const void* grad, const void* u,
                    const void* v, void* up_rows, void* gate_rows, void* product) {
  Piece g, of_up, of_gate, result;
  for (int64_t row = 0; row < rows; ++row) {
    const float factor = inverse == nullptr ? 1.f : inverse[row];
    for_pieces(hidden, [&](int64_t begin, int64_t n) {
      const int64_t offset = row * hidden + begin;
      g.load(dtype, grad, offset, n);
      of_up.load(dtype, u, offset, n);
      of_gate.load(dtype, v, offset, n);
      result.fill(n, [&](int64_t i) { return at(of_up, i) * at(of_gate, i); });
      store_row(dtype, product, offset, result.x, n);
      result.fill(n, [&](int64_t i) { return factor * at(g, i) * at(of_gate, i); });
      store_row(dtype, up_rows, offset, result.x, n);
      result.fill(n, [&](int64_t i) { return factor * at(g, i) * at(of_up, i); });
      store_row(dtype, gate_rows, offset, result.x, n);
    });
  }
}

void sglu_grad_rows(DType dtype, int64_t rows, int64_t dim, const float* inverse, const void* a, const void* b,
                    const void* x, const void* grad_out, void* grad_x) {
  Piece t, other;
  const auto load_sum = [&](int64_t offset, int64_t n) {
    t.load(dtype, a, offset, n);
    if (b == nullptr) return;
    other.load(dtype, b, offset, n);
    t.fill(n, [&](int64_t i) { return at(t, i) + at(other, i); });
  };
  for (int64_t row = 0; row < rows; ++row) {
    float factor = 0.f;
    if (inverse != nullptr) {
      double along = 0.0;
      for_pieces(dim, [&](int64_t begin, int64_t n) {
        load_sum(row * dim + begin, n);
        other.load(dtype, x, row * dim + begin, n);
        along += dot(t.x, other.x, pad(n));
      });
      factor = static_cast<float>(along / static_cast<double>(dim)) * inverse[row] * inverse[row];
    }
    for_pieces(dim, [&](int64_t begin, int64_t n) {
      load_sum(row * dim + begin, n);
      if (inverse != nullptr) {
        other.load(dtype, x, row * dim + begin, n);
        t.fill(n, [&](int64_t i) { return at(t, i) - factor * at(other, i); });
      }
      if (grad_out != nullptr) {
        other.load(dtype, grad_out, row * dim + begin, n);
        t.fill(n, [&](int64_t i) { return at(t, i) + at(other, i); });
      }
      store_row(dtype, grad_x, row * dim + begin, t.x, n);
    });
  }
}

template <DType kDType>
void gate_rows(int64_t rows, int64_t hidden, const void* uv, void* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto u = row_of<kDType>(uv, 2 * r, hidden), v = row_of<kDType>(uv, 2 * r + 1, hidden);
    const auto to = row_of<kDType>(out, r, hidden);
    for (int64_t i = 0; i < hidden; i += kLanes) to.put_at(i, u.at(i) * v.at(i));
  }
}

template <DType kDType>
void gate_gradients(int64_t rows, int64_t hidden, const void* grad, const void* uv, void* grad_uv) {
  for (int64_t r = 0; r < rows; ++r) {
    const auto g = row_of<kDType>(grad, r, hidden);
    const auto u = row_of<kDType>(uv, 2 * r, hidden), v = row_of<kDType>(uv, 2 * r + 1, hidden);
    const auto of_u = row_of<kDType>(grad_uv, 2 * r, hidden), of_v = row_of<kDType>(grad_uv, 2 * r + 1, hidden);
    for (int64_t i = 0; i < hidden; i += kLanes) {
      of_u.put_at(i, g.at(i) * v.at(i));
      of_v.put_at(i, g.at(i) * u.at(i));
    }
  }
}

void sglu_gate(DType dtype, int64_t rows, int64_t hidden, const void* uv, void* out) {
  switch (dtype) {
    case DType::kFloat: return gate_rows<DType::kFloat>(rows, hidden, uv, out);
    case DType::kBFloat16: return gate_rows<DType::kBFloat16>(rows, hidden, uv, out);
    case DType::kHalf: return gate_rows<DType::kHalf>(rows, hidden, uv, out);
  }
}

void sglu_gate_backward(DType dtype, int64_t rows, int64_t hidden, const void* grad, const void* uv, void* grad_uv) {
  switch (dtype) {
    case DType::kFloat: return gate_gradients<DType::kFloat>(rows, hidden, grad, uv, grad_uv);
    case DType::kBFloat16: return gate_gradients<DType::kBFloat16>(rows, hidden, grad, uv, grad_uv);
    case DType::kHalf: return gate_gradients<DType::kHalf>(rows, hidden, grad, uv, grad_uv);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
