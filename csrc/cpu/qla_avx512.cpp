#define VISTA_ISA avx512
#define VISTA_LANES 16
#include "qla_kernels.h"

namespace vista::cpu {

const QlaKernels qla_kernels_avx512{avx512::qla_state, avx512::qla_apply, avx512::qla_apply_backward,
                                    avx512::qla_state_backward, avx512::qla_state_gradient};

}  // namespace vista::cpu
