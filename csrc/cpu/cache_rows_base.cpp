#define VISTA_ISA base
#define VISTA_LANES 4
#include "cache_rows_kernels.h"
#include "vista/cpu_isa.h"

namespace vista::cpu {

const CacheRowsKernels cache_rows_kernels_base{base::quantize_users, base::dequantize_users};

const CacheRowsKernels& cache_rows_kernels() {
#ifdef VISTA_X86
  return choose(cache_rows_kernels_base, cache_rows_kernels_avx2, cache_rows_kernels_avx512);
#else
  return cache_rows_kernels_base;
#endif
}

void scatter_rows(const ScatterParams& params, int64_t slot_begin, int64_t slot_end) {
  for (int64_t slot = slot_begin; slot < slot_end; ++slot) {
    if (params.source[slot] < 0) continue;
    std::memcpy(params.cache + slot * params.row_bytes, params.rows + params.source[slot] * params.row_bytes,
                params.row_bytes);
  }
}

}  // namespace vista::cpu
