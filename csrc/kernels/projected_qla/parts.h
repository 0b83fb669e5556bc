// The kernels for compute capability 9.0 behind the launch functions of vista/cuda/projected_qla.h.
#pragma once

#include "vista/cuda/projected_qla.h"

namespace vista::cuda::sm90 {

// Without the reduction of states and of their gradients.
int launch_projected_qla_state(const ProjectedQlaParams& params, Stream stream);
int launch_projected_qla_apply(const ProjectedQlaParams& params, Stream stream);
int launch_projected_qla_state_backward(const ProjectedQlaParams& params, Stream stream);
int launch_projected_qla_apply_backward(const ProjectedQlaParams& params, Stream stream);

// Two warpgroups take 128 columns of projections each, whose weights fill shared memory at dim 256: wider rows, and
// heads of 128, whose keys and values are 256 columns, stay with the portable kernels, and so do calls with so few
// columns that a warpgroup would be idle. Rows are numbered by 32 bits.
inline bool serves(const ProjectedQlaParams& p) {
  const QlaParams& q = p.qla;
  return device_is_sm90() && (q.d == 32 || q.d == 64) && p.dim <= 256 && q.heads * q.d >= 128 && q.total > 0 &&
         q.total < INT32_MAX;
}

}  // namespace vista::cuda::sm90
