#define VISTA_ISA avx512
#define VISTA_LANES 16
#include "rms_norm_kernels.h"

namespace vista::cpu {

const RmsNormKernels rms_norm_kernels_avx512{avx512::rms_norm_forward, avx512::rms_norm_backward};

}  // namespace vista::cpu
