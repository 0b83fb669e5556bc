// Describes row-major matrices to the tensor memory accelerator.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "vista/types.h"

namespace vista::cuda::sm90 {

constexpr int kBoxColumns = 64;  // of 2 bytes: one 128-byte line

struct MatrixView {
  const void* data;  // a multiple of 16 bytes
  DType dtype;       // bf16 or fp16
  int64_t rows, columns;
  int64_t stride;  // elements from row to row, a multiple of 8
};

// Copies go in boxes of `box_rows` (at most 256) x 64 elements with 128-byte swizzle. Throws std::invalid_argument for
// a matrix that cannot be described, an empty one among them; an error without a driver that knows how.
cudaError_t encode(CUtensorMap& map, const MatrixView& matrix, int box_rows);

}  // namespace vista::cuda::sm90
