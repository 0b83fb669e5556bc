// Matrix products with what follows them in the same kernel, on the GPU (what they compute:
// vista_ext/ops/linear_silu.py, the same on the CPU: csrc/ops/linear_silu.cpp).
//
// Two kernels, for compute capability 9.x and for every card from 8.0 on; launch_linear_silu picks by the current
// device. Tensor core products of bf16 or fp16, summed in fp32; bias and SiLU in fp32; one rounding. Deterministic, no
// workspace. The order in which a value is summed is that of its row and column, whatever the tile.
#pragma once

#include <cstdint>

#include "vista/cuda/launch.h"
#include "vista/types.h"

namespace vista::cuda {

// Pointers 16-byte aligned, arrays contiguous. rows, in_features and out_features below 2^31; in_features and
// out_features positive multiples of 8, which is what 16-byte and TMA accesses of 16-bit rows need; rows may be 0.
struct LinearSiluParams {
  DType dtype;  // kBFloat16 or kHalf
  int64_t rows, in_features, out_features;
  const void* x;         // [rows, in_features]
  const void* weight;    // [out_features, in_features]
  const void* bias;      // [out_features] or null
  const void* grad_out;  // [rows, out_features], or null: forward
  void* out;             // [rows, out_features]
};

// Whether the kernels take this dtype and these widths: callers compose what they do not.
bool linear_silu_is_built(DType dtype, int64_t in_features, int64_t out_features);

// out <- silu(x weight^T + bias), or with grad_out: out <- grad_out * silu'(x weight^T + bias)
int launch_linear_silu(const LinearSiluParams& params, Stream stream);

// The two that launch_linear_silu picks from; for tests.
int launch_linear_silu_sm80(const LinearSiluParams& params, Stream stream);
int launch_linear_silu_sm90(const LinearSiluParams& params, Stream stream);

// The part of the result that a block computes at a time.
struct GemmTile {
  int rows, columns;
};
GemmTile linear_silu_tile(int64_t rows, int64_t out_features, int multiprocessors, bool sm90);

}  // namespace vista::cuda
