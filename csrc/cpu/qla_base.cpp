#define VISTA_ISA base
#define VISTA_LANES 4
#include "qla_kernels.h"
#include "vista/cpu_isa.h"

namespace vista::cpu {

const QlaKernels qla_kernels_base{base::qla_state, base::qla_apply, base::qla_apply_backward, base::qla_state_backward,
                                  base::qla_state_gradient};

int64_t qla_scratch_floats(int64_t d, int64_t e) {
  const int64_t dp = base::pad(d), ep = base::pad(e);
  // Of the vector kernels, and of those in tiles (Room in qla_amx.cpp).
  const int64_t vectors = base::kBlock * (4 * dp + 2 * ep) + 2 * dp * ep;
  const int64_t dq = (d + 31) / 32 * 32, eq = (e + 31) / 32 * 32;
  const int64_t words = kQlaTileRows * (dq / 2 + eq / 2 + dp + ep / 2) + dq / 2 * ep + eq / 2 * dp;
  const int64_t tiles = 3 * words + kQlaTileRows * (dq + dp + ep) + 3 * dp * ep;
  return vectors > tiles ? vectors : tiles;
}

const QlaKernels& qla_kernels() {
#ifdef VISTA_X86
  return choose(qla_kernels_base, qla_kernels_avx2, qla_kernels_avx512, qla_kernels_amx);
#else
  return qla_kernels_base;
#endif
}

}  // namespace vista::cpu
