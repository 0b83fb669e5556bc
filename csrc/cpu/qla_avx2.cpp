#define VISTA_ISA avx2
#define VISTA_LANES 8
#include "qla_kernels.h"

namespace vista::cpu {

const QlaKernels qla_kernels_avx2{avx2::qla_state, avx2::qla_apply, avx2::qla_apply_backward, avx2::qla_state_backward,
                                  avx2::qla_state_gradient};

}  // namespace vista::cpu
