#define VISTA_ISA base
#define VISTA_LANES 4
#include "sglu_kernels.h"
#include "vista/cpu_isa.h"

namespace vista::cpu {

const SgluKernels sglu_kernels_base{base::sglu_normalize,    base::sglu_multiply,  base::sglu_add,
                                    base::sglu_gradients,    base::sglu_grad_rows, base::sglu_gate,
                                    base::sglu_gate_backward};

const SgluKernels& sglu_kernels() {
#ifdef VISTA_X86
  return choose(sglu_kernels_base, sglu_kernels_avx2, sglu_kernels_avx512);
#else
  return sglu_kernels_base;
#endif
}

}  // namespace vista::cpu
