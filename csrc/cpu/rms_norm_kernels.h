// Root-mean-square norms and their gradients, compiled once per instruction set. A row is read once from memory: what
// is read of it again is in the first-level cache.
#pragma once

#include "row_values.h"
#include "vista/rms_norm.h"

namespace vista::cpu {
namespace VISTA_ISA {

// Sums over a row: of a piece in float32, of the pieces in double.
struct RowSums {
  double squares = 0.0, along = 0.0;
};

template <typename Row, typename F>
inline RowSums sum_row(const Row& x, const F& slope) {
  constexpr int64_t kPiece = 256;
  RowSums sums;
  for (int64_t begin = 0; begin < x.n; begin += kPiece) {
    vf squares{}, along{};
    for (int64_t i = begin; i < least(x.n, begin + kPiece); i += kLanes) {
      const vf value = x.at(i);
      squares += value * value;
      along += slope(i) * value;
    }
    sums.squares += sum_lanes(squares);
    sums.along += sum_lanes(along);
  }
  return sums;
}

inline float inverse_root_of_mean(double squares, int64_t dim, float eps) {
  return static_cast<float>(1.0 / __builtin_sqrt(squares / static_cast<double>(dim) + eps));
}

template <DType kDType>
void norm_forward(int64_t rows, int64_t dim, float eps, const void* x, const float* weight, void* y) {
  const ValueRow<DType::kFloat, const void> factors{weight, dim};
  for (int64_t r = 0; r < rows; ++r) {
    const auto from = row_of<kDType>(x, r, dim);
    const auto to = row_of<kDType>(y, r, dim);
    const RowSums sums = sum_row(from, [](int64_t) { return vf{}; });
    const vf inverse = splat(inverse_root_of_mean(sums.squares, dim, eps));
    for (int64_t i = 0; i < dim; i += kLanes) to.put_at(i, from.at(i) * inverse * factors.at(i));
  }
}

template <DType kDType>
void norm_backward(int64_t rows, int64_t dim, float eps, const void* grad, const void* x, const float* weight,
                   void* grad_x, float* grad_weight) {
  const ValueRow<DType::kFloat, const void> factors{weight, dim};
  const ValueRow<DType::kFloat, void> weight_sums{grad_weight, dim};
  for (int64_t r = 0; r < rows; ++r) {
    const auto slope = row_of<kDType>(grad, r, dim), from = row_of<kDType>(x, r, dim);
    const auto to = row_of<kDType>(grad_x, r, dim);
    const RowSums sums = sum_row(from, [&](int64_t i) { return slope.at(i) * factors.at(i); });
    const float factor = inverse_root_of_mean(sums.squares, dim, eps);
    const vf inverse = splat(factor);
    const vf pull = splat(static_cast<float>(sums.along / static_cast<double>(dim) * factor * factor));
    for (int64_t i = 0; i < dim; i += kLanes) {
      const vf value = from.at(i), g = slope.at(i);
      weight_sums.put_at(i, weight_sums.at(i) + g * value * inverse);
      to.put_at(i, inverse * (g * factors.at(i) - pull * value));
    }
  }
}

void rms_norm_forward(DType dtype, int64_t rows, int64_t dim, float eps, const void* x, const float* weight, void* y) {
  switch (dtype) {
    case DType::kFloat: return norm_forward<DType::kFloat>(rows, dim, eps, x, weight, y);
    case DType::kBFloat16: return norm_forward<DType::kBFloat16>(rows, dim, eps, x, weight, y);
    case DType::kHalf: return norm_forward<DType::kHalf>(rows, dim, eps, x, weight, y);
  }
}

void rms_norm_backward(DType dtype, int64_t rows, int64_t dim, float eps, const void* grad, const void* x,
                       const float* weight, void* grad_x, float* grad_weight) {
  switch (dtype) {
    case DType::kFloat: return norm_backward<DType::kFloat>(rows, dim, eps, grad, x, weight, grad_x, grad_weight);
    case DType::kBFloat16: return norm_backward<DType::kBFloat16>(rows, dim, eps, grad, x, weight, grad_x, grad_weight);
    case DType::kHalf: return norm_backward<DType::kHalf>(rows, dim, eps, grad, x, weight, grad_x, grad_weight);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
