#define VISTA_ISA avx2
#define VISTA_LANES 8
#include "sglu_kernels.h"

namespace vista::cpu {

const SgluKernels sglu_kernels_avx2{avx2::sglu_normalize,    avx2::sglu_multiply,  avx2::sglu_add,
                                    avx2::sglu_gradients,    avx2::sglu_grad_rows, avx2::sglu_gate,
                                    avx2::sglu_gate_backward};

}  // namespace vista::cpu
