// Root-mean-square norms and their gradients, compiled once per instruction set. A row is read once from memory: what
// is read of it again is in the first-level cache.
#pragma once

#include "lanes.h"
#include "row_vectors.h"
#include "vista/rms_norm.h"

namespace vista::cpu {
namespace VISTA_ISA {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// kLanes float16 values; the compiler's own conversion goes value by value.
inline vf widen_half(const uint16_t* from) {
#if VISTA_LANES == 16
  return (vf)_mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif VISTA_LANES == 8
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  alignas(16) float wide[kLanes];
  load_row(DType::kHalf, from, 0, wide, kLanes, kLanes);
  return load(wide);
#endif
}

// A row of any dtype, kLanes values at a time; what lies beyond its end reads as zeros and is not written.
template <DType kDType, typename Value>
struct NormRow {
  Value* base;
  int64_t n;

  vf at(int64_t i) const {
    if constexpr (kDType == DType::kFloat) {
      if (i + kLanes <= n) return load(static_cast<const float*>(base) + i);
    } else if constexpr (kDType == DType::kHalf) {
      if (i + kLanes <= n) return widen_half(static_cast<const uint16_t*>(base) + i);
    } else {
      if (i + kLanes <= n) {
        const uint16_t* from = static_cast<const uint16_t*>(base) + i;
        return reinterpret_cast<vf>(__builtin_convertvector(*reinterpret_cast<const vh_memory*>(from), vi) << 16);
      }
    }
    float part[kLanes];
    load_row(kDType, base, i, part, least(n - i, kLanes), kLanes);
    return load(part);
  }

  void put_at(int64_t i, vf x) const {
    if (i + kLanes <= n) return put<kDType>(static_cast<char*>(base) + i * kBytes, x, false);
    float part[kLanes];
    store(part, x);
    store_row(kDType, base, i, part, n - i);
  }

  static constexpr int64_t kBytes = kDType == DType::kFloat ? 4 : 2;
};

template <DType kDType>
NormRow<kDType, const void> row_of(const void* base, int64_t row, int64_t dim) {
  return {static_cast<const char*>(base) + row * dim * NormRow<kDType, const void>::kBytes, dim};
}
template <DType kDType>
NormRow<kDType, void> row_of(void* base, int64_t row, int64_t dim) {
  return {static_cast<char*>(base) + row * dim * NormRow<kDType, void>::kBytes, dim};
}

// The sum of f(i) over a row, a piece in float32 and the pieces in double.
template <typename F>
inline double sum_row(int64_t dim, const F& f) {
  constexpr int64_t kTogether = 256;
  double total = 0.0;
  for (int64_t begin = 0; begin < dim; begin += kTogether) {
    vf even{}, odd{};
    const int64_t end = least(dim, begin + kTogether);
    for (int64_t i = begin; i < end; i += 2 * kLanes) {
      even += f(i);
      if (i + kLanes < end) odd += f(i + kLanes);
    }
    total += sum_lanes(even + odd);
  }
  return total;
}

template <DType kDType>
void norm_forward(int64_t rows, int64_t dim, float eps, const void* x, const float* weight, void* y, float* inverse) {
  const NormRow<DType::kFloat, const void> factors{weight, dim};
  for (int64_t r = 0; r < rows; ++r) {
    const auto from = row_of<kDType>(x, r, dim);
    const auto to = row_of<kDType>(y, r, dim);
    const double squares = sum_row(dim, [&](int64_t i) { return from.at(i) * from.at(i); });
    inverse[r] = static_cast<float>(1.0 / __builtin_sqrt(squares / static_cast<double>(dim) + eps));
    const vf factor = splat(inverse[r]);
    for (int64_t i = 0; i < dim; i += kLanes) to.put_at(i, from.at(i) * factor * factors.at(i));
  }
}

template <DType kDType>
void norm_backward(int64_t rows, int64_t dim, const void* grad, const void* x, const float* weight,
                   const float* inverse, void* grad_x, float* grad_weight) {
  const NormRow<DType::kFloat, const void> factors{weight, dim};
  const NormRow<DType::kFloat, void> sums{grad_weight, dim};
  for (int64_t r = 0; r < rows; ++r) {
    const auto g = row_of<kDType>(grad, r, dim), from = row_of<kDType>(x, r, dim);
    const auto to = row_of<kDType>(grad_x, r, dim);
    const double along = sum_row(dim, [&](int64_t i) { return g.at(i) * factors.at(i) * from.at(i); });
    const vf factor = splat(inverse[r]);
    const vf pull = splat(static_cast<float>(along / static_cast<double>(dim) * inverse[r] * inverse[r]));
    for (int64_t i = 0; i < dim; i += kLanes) {
      const vf value = from.at(i), slope = g.at(i);
      sums.put_at(i, sums.at(i) + slope * value * factor);
      to.put_at(i, factor * (slope * factors.at(i) - pull * value));
    }
  }
}

void rms_norm_forward(DType dtype, int64_t rows, int64_t dim, float eps, const void* x, const float* weight, void* y,
                      float* inverse) {
  switch (dtype) {
    case DType::kFloat: return norm_forward<DType::kFloat>(rows, dim, eps, x, weight, y, inverse);
    case DType::kBFloat16: return norm_forward<DType::kBFloat16>(rows, dim, eps, x, weight, y, inverse);
    case DType::kHalf: return norm_forward<DType::kHalf>(rows, dim, eps, x, weight, y, inverse);
  }
}

void rms_norm_backward(DType dtype, int64_t rows, int64_t dim, const void* grad, const void* x, const float* weight,
                       const float* inverse, void* grad_x, float* grad_weight) {
  switch (dtype) {
    case DType::kFloat: return norm_backward<DType::kFloat>(rows, dim, grad, x, weight, inverse, grad_x, grad_weight);
    case DType::kBFloat16:
      return norm_backward<DType::kBFloat16>(rows, dim, grad, x, weight, inverse, grad_x, grad_weight);
    case DType::kHalf: return norm_backward<DType::kHalf>(rows, dim, grad, x, weight, inverse, grad_x, grad_weight);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
