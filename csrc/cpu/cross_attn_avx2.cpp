#define VISTA_ISA avx2
#define VISTA_LANES 8
#include "cross_attn_kernels.h"

namespace vista::cpu {

const CrossAttnKernels cross_attn_kernels_avx2{avx2::cross_attn_forward, avx2::cross_attn_backward_short,
                                               avx2::cross_attn_backward_queries, avx2::cross_attn_backward_keys};

}  // namespace vista::cpu
