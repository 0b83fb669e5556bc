// The root-mean-square norm of rows on the CPU (docs: vista_ext/ops/rms_norm.py).
#pragma once

#include <cstdint>

#include "vista/types.h"

namespace vista::cpu {

// Rows are contiguous, weights and sums are float32. With r_i = 1 / sqrt(mean of x_i^2 + eps):
struct RmsNormKernels {
  // y_i = x_i * r_i * weight
  void (*forward)(DType dtype, int64_t rows, int64_t dim, float eps, const void* x, const float* weight, void* y);
  // grad_x_i = r_i * (t_i - x_i * r_i^2 * <t_i, x_i> / dim) with t_i = grad_i * weight;
  // grad_weight += grad_i * x_i * r_i
  void (*backward)(DType dtype, int64_t rows, int64_t dim, float eps, const void* grad, const void* x,
                   const float* weight, void* grad_x, float* grad_weight);
};

const RmsNormKernels& rms_norm_kernels();  // the best for this processor, chosen once

extern const RmsNormKernels rms_norm_kernels_base;
#ifdef VISTA_X86
extern const RmsNormKernels rms_norm_kernels_avx2;
extern const RmsNormKernels rms_norm_kernels_avx512;
#endif

}  // namespace vista::cpu
