#define VISTA_ISA avx512
#define VISTA_LANES 16
#include "cross_attn_kernels.h"

namespace vista::cpu {

const CrossAttnKernels cross_attn_kernels_avx512{avx512::cross_attn_forward, avx512::cross_attn_backward_short,
                                                 avx512::cross_attn_backward_queries, avx512::cross_attn_backward_keys};

}  // namespace vista::cpu
