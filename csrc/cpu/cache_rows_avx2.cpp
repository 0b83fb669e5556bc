#define VISTA_ISA avx2
#define VISTA_LANES 8
#include "cache_rows_kernels.h"

namespace vista::cpu {

const CacheRowsKernels cache_rows_kernels_avx2{avx2::quantize_users, avx2::dequantize_users};

}  // namespace vista::cpu
