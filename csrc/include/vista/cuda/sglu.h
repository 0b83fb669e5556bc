// The feed-forward half of a layer on the GPU: rows normalised, ((y up^T) * (y gate^T)) down^T, plus the rows
// themselves (what it computes: vista_ext/ops/sglu.py, the same on the CPU: csrc/ops/sglu.cpp).
//
// All pointers 16-byte aligned and contiguous, weights as torch.nn.Linear holds them. bfloat16 and float16; dim a
// multiple of 8 from 16 to 256, hidden a multiple of 8 from 8 to 2^24. Deterministic: the bits of a row depend on that
// row and the weights only.
#pragma once

#include "vista/cuda/launch.h"
#include "vista/types.h"

namespace vista::cuda {

// Null where a call does not use a field.
struct SgluParams {
  DType dtype;
  int64_t total, dim, hidden;
  bool norm;             // rows are divided by their root mean square, in fp32
  float eps;             // added to the mean square; read with norm only
  bool residual;         // the rows are added to the result
  const void* x;         // [total, dim]
  const void* up;        // [hidden, dim]
  const void* gate;      // [hidden, dim]
  const void* down;      // [dim, hidden], read forward
  const void* down_t;    // [hidden, dim], the transpose, read backward
  const void* grad_out;  // [total, dim]
  void* out;             // [total, dim]
  void* grad_x;          // [total, dim]
  void* grad_up_rows;    // [total, hidden]; grad_up_rows^T x is the gradient of up
  void* grad_gate_rows;  // [total, hidden]; grad_gate_rows^T x is the gradient of gate
  void* hidden_rows;     // [total, hidden]; grad_out^T hidden_rows is the gradient of down
};

// out
int launch_sglu(const SgluParams& params, Stream stream);
// grad_x, grad_up_rows, grad_gate_rows, hidden_rows
int launch_sglu_backward(const SgluParams& params, Stream stream);

}  // namespace vista::cuda
