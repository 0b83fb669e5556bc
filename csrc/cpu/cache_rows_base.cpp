#include <cstring>

#include "vista/cache_rows.h"

namespace vista::cpu {

void scatter_rows(const ScatterParams& params, int64_t slot_begin, int64_t slot_end) {
  for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
    if (params.source[slot] < 0) continue;
    std::memcpy(params.cache + slot * params.row_bytes, params.rows + params.source[slot] * params.row_bytes,
                params.row_bytes);
  }
}

}  // namespace vista::cpu
