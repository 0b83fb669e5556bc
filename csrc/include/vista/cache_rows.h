// CPU kernels on quantized rows. Each works on the users [begin, end) so that the caller owns the threads.
#pragma once

#include <cstdint>

#include "vista/row_layout.h"

namespace vista::cpu {

struct ScatterParams {
  uint8_t* cache;         // [num_slots, row_bytes]
  const uint8_t* rows;    // [n, row_bytes]
  const int64_t* source;  // [num_slots] row written to that slot, -1 for none
  int64_t num_slots;
  int64_t row_bytes;
};
void scatter_rows(const ScatterParams& params, int64_t slot_begin, int64_t slot_end);

}  // namespace vista::cpu
