// What the feed-forward half of a layer does between its products, on the CPU (docs: vista_ext/ops/sglu.py). The
// products themselves are torch's (csrc/ops/sglu.cpp).
#pragma once

#include <cstdint>

#include "vista/types.h"

namespace vista::cpu {

// Rows are contiguous; sums are in float32.
struct SgluKernels {
  // inverse[i] = 1 / sqrt(mean of x_i^2 + eps), y_i = inverse[i] * x_i
  void (*normalize)(DType dtype, int64_t rows, int64_t dim, float eps, const void* x, void* y, float* inverse);
  // out = a * b; out may be a or b
  void (*multiply)(DType dtype, int64_t n, const void* a, const void* b, void* out);
  // out = a + b; likewise
  void (*add)(DType dtype, int64_t n, const void* a, const void* b, void* out);
  // up_rows = grad * v and gate_rows = grad * u, both times inverse[i] unless null; product = u * v. Results may take
  // the place of inputs.
  void (*gradients)(DType dtype, int64_t rows, int64_t hidden, const float* inverse, const void* grad, const void* u,
                    const void* v, void* up_rows, void* gate_rows, void* product);
  // With t_i = a_i + b_i, or a_i where b is null: grad_x_i = t_i, less x_i * inverse[i]^2 * <t_i, x_i> / dim unless
  // inverse is null, plus grad_out_i unless null.
  void (*grad_rows)(DType dtype, int64_t rows, int64_t dim, const float* inverse, const void* a, const void* b,
                    const void* x, const void* grad_out, void* grad_x);
  // out_i = u_i * v_i of rows [u_i, v_i], and the gradients of u and v in the same order
  void (*gate)(DType dtype, int64_t rows, int64_t hidden, const void* uv, void* out);
  void (*gate_backward)(DType dtype, int64_t rows, int64_t hidden, const void* grad, const void* uv, void* grad_uv);
};

const SgluKernels& sglu_kernels();  // the best for this processor, chosen once

extern const SgluKernels sglu_kernels_base;
#ifdef VISTA_X86
extern const SgluKernels sglu_kernels_avx2;
extern const SgluKernels sglu_kernels_avx512;
#endif

}  // namespace vista::cpu
