#define VISTA_ISA avx512
#define VISTA_LANES 16
#include "cache_rows_kernels.h"

namespace vista::cpu {

const CacheRowsKernels cache_rows_kernels_avx512{avx512::quantize_users, avx512::dequantize_users};

}  // namespace vista::cpu
