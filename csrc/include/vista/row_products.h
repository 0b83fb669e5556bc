// Products of rows with weights, and of rows with rows, in the processor's bfloat16 tiles (docs: docs/cpu_layers.md).
//
// bfloat16 values are multiplied as they are. A float32 value is the sum of three bfloat16 parts, and six of the nine
// products of parts are made, the least of them first: what is left out is below 2^-26 of a product. Sums are float32.
// Denormals count as zero; where an operand is infinite, or rounds to infinity, a result may be NaN.
#pragma once

#include <cstdint>

#include "vista/types.h"

namespace vista::cpu {

// dtype: kFloat or kBFloat16. Matrices are contiguous; scratch and packed weights begin at multiples of 64 bytes.
struct RowProducts {
  // A weight [columns, depth], or [depth, columns] if transposed, in the order in which `times` reads it.
  int64_t (*packed_bytes)(DType dtype, int64_t depth, int64_t columns);
  void (*pack)(DType dtype, int64_t depth, int64_t columns, const void* weight, bool transposed, void* packed);
  // out [rows, columns] = x [rows, depth] weight^T + bias [columns], unless null. A row's bits depend on that row
  // alone.
  int64_t (*times_scratch_bytes)(DType dtype, int64_t depth);
  void (*times)(DType dtype, int64_t rows, int64_t depth, int64_t columns, const void* x, const void* packed,
                const float* bias, void* out, bool past_caches, void* scratch);
  // sum [left, right] += a [rows, left]^T b [rows, right]
  int64_t (*outer_scratch_bytes)(DType dtype, int64_t left, int64_t right);
  void (*outer)(DType dtype, int64_t rows, int64_t left, int64_t right, const void* a, const void* b, float* sum,
                void* scratch);
};

const RowProducts* row_products();  // null on a processor without tiles

extern const RowProducts row_products_amx;

}  // namespace vista::cpu
