#define VISTA_ISA avx2
#define VISTA_LANES 8
#include "rms_norm_kernels.h"

namespace vista::cpu {

const RmsNormKernels rms_norm_kernels_avx2{avx2::rms_norm_forward, avx2::rms_norm_backward};

}  // namespace vista::cpu
