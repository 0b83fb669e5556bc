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

void scatter_rows(const ScatterParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const int64_t row = params.writes[i];
    std::memcpy(params.cache + params.slots[row] * params.row_bytes, params.rows + row * params.row_bytes,
                params.row_bytes);
  }
}

}  // namespace vista::cpu
