#define VISTA_ISA base
#define VISTA_LANES 4
#include "qla_kernels.h"
#include "vista/cpu_isa.h"

namespace vista::cpu {

const QlaKernels qla_kernels_base{base::qla_state, base::qla_apply, base::qla_apply_backward, base::qla_state_backward,
                                  base::qla_state_gradient};

int64_t qla_scratch_floats(int64_t d, int64_t e) {
  const int64_t dp = base::pad(d), ep = base::pad(e);
  return base::kBlock * (4 * dp + 2 * ep) + 2 * dp * ep;
}

const QlaKernels& qla_kernels() {
#ifdef VISTA_X86
  return choose(qla_kernels_base, qla_kernels_avx2, qla_kernels_avx512);
#else
  return qla_kernels_base;
#endif
}

}  // namespace vista::cpu
