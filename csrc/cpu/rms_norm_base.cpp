#define VISTA_ISA base
#define VISTA_LANES 4
#include "rms_norm_kernels.h"
#include "vista/cpu_isa.h"

namespace vista::cpu {

const RmsNormKernels rms_norm_kernels_base{base::rms_norm_forward, base::rms_norm_backward};

const RmsNormKernels& rms_norm_kernels() {
#ifdef VISTA_X86
  return choose(rms_norm_kernels_base, rms_norm_kernels_avx2, rms_norm_kernels_avx512);
#else
  return rms_norm_kernels_base;
#endif
}

}  // namespace vista::cpu
