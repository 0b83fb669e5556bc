// CPU kernels on quantized rows (layout: vista/row_layout.h). Each works on a range of users so that the caller owns
// the threads.
#pragma once

#include <cstdint>

#include "vista/row_layout.h"
#include "vista/types.h"

namespace vista::cpu {

struct RowsParams {
  RowLayout layout;
  DType dtype;           // of x and out
  const void* x;         // [n, tokens, dim] to quantize
  uint8_t* rows;         // [n, row_bytes] quantized
  const uint8_t* cache;  // [num_slots, row_bytes] to read
  const int64_t* slots;  // [n] row of the cache for each user, negative for zeros
  void* out;             // [n, tokens, dim] dequantized
  bool stream;           // the result is too large to be read from the caches: write past them
};

constexpr int64_t kQuantizeGroups = 16;  // taken at a time: a whole number of vectors in any instruction set

struct CacheRowsKernels {
  // scratch: kQuantizeGroups groups of floats, 64-byte aligned, one per thread
  void (*quantize)(const RowsParams&, int64_t begin, int64_t end, float* scratch);
  void (*dequantize)(const RowsParams&, int64_t begin, int64_t end);
};

const CacheRowsKernels& cache_rows_kernels();  // the best for this processor, chosen once

extern const CacheRowsKernels cache_rows_kernels_base;
#ifdef VISTA_X86
extern const CacheRowsKernels cache_rows_kernels_avx2;
extern const CacheRowsKernels cache_rows_kernels_avx512;
#endif

struct ScatterParams {
  uint8_t* cache;         // [num_slots, row_bytes]
  const uint8_t* rows;    // [n, row_bytes]
  const int64_t* slots;   // [n] slot of each row
  const int64_t* writes;  // the rows to write, no two of one slot
  int64_t row_bytes;
};
void scatter_rows(const ScatterParams& params, int64_t begin, int64_t end);  // a range of `writes`

}  // namespace vista::cpu
