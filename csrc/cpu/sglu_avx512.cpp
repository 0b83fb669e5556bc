#define VISTA_ISA avx512
#define VISTA_LANES 16
#include "sglu_kernels.h"

namespace vista::cpu {

const SgluKernels sglu_kernels_avx512{avx512::sglu_normalize,    avx512::sglu_multiply,  avx512::sglu_add,
                                      avx512::sglu_gradients,    avx512::sglu_grad_rows, avx512::sglu_gate,
                                      avx512::sglu_gate_backward};

}  // namespace vista::cpu
