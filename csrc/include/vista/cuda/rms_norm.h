// The backward pass of an RMS norm on the GPU (what it computes: csrc/ops/schema.cpp, the same on the CPU:
// csrc/ops/rms_norm.cpp).
#pragma once

#include "vista/cuda/launch.h"
#include "vista/types.h"

namespace vista::cuda {

// Contiguous arrays, pointers 16-byte aligned. Sums in fp32, one rounding. Deterministic.
struct RmsNormParams {
  DType dtype;
  int64_t rows, dim;
  float eps;              // added to the mean square
  const void* grad_rows;  // [rows, dim], divided by the root mean square of the row already
  const void* x;          // [rows, dim]
  void* grad_x;           // [rows, dim]
};

int launch_rms_norm_backward(const RmsNormParams& params, Stream stream);

}  // namespace vista::cuda
