// CUDA kernels on quantized rows (layout: vista/row_layout.h). Rows have the bytes of the CPU kernels, and dequantized
// values their bits. Every pointer is of the device; arrays are contiguous and need the alignment of their elements
// only (16 bytes make them fast).
#pragma once

#include <cstdint>

#include "vista/cuda/launch.h"
#include "vista/row_layout.h"
#include "vista/types.h"

namespace vista::cuda {

// A slot outside [0, num_slots) is never read or written. kCount: the user's values are zeros, or its row is skipped,
// and num_bad counts it. kTrap: the kernel traps, which the host learns at its next synchronization, as with torch's
// own assertions on a device.
enum class BadSlots : int32_t { kCount, kTrap };

struct QuantizeParams {
  RowLayout layout;
  DType dtype;    // of x
  int64_t n;      // users
  const void* x;  // [n, tokens, dim]
  uint8_t* rows;  // [n, row_bytes]; every byte is written
};
int quantize_rows(const QuantizeParams& params, Stream stream);

struct DequantizeParams {
  RowLayout layout;
  DType dtype;  // of out
  int64_t n;    // users
  int64_t num_slots;
  const uint8_t* cache;  // [num_slots, row_bytes]
  Indices slots;         // [n] row of the cache for each user
  void* out;             // [n, tokens, dim]
  int64_t* num_bad;      // scalar, written
  BadSlots bad_slots;
};
int gather_rows(const DequantizeParams& params, Stream stream);
// Row i is user i's: slots, num_slots, num_bad and bad_slots are not used.
int dequantize_rows(const DequantizeParams& params, Stream stream);

struct ScatterParams {
  int64_t n;
  int64_t num_slots;
  int64_t row_bytes;
  uint8_t* cache;       // [num_slots, row_bytes]; of rows with one slot the last stays
  Indices slots;        // [n] slot of each row
  const uint8_t* rows;  // [n, row_bytes]
  int64_t* num_bad;     // scalar, written
  BadSlots bad_slots;   // kTrap: nothing is written if any slot is bad
  void* workspace;      // scatter_workspace_bytes(n), aligned to 8
};
int64_t scatter_workspace_bytes(int64_t n);
int scatter_rows(const ScatterParams& params, Stream stream);

}  // namespace vista::cuda
