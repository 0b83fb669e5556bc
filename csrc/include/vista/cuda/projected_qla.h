// Quasi-linear attention on projections of the rows, on the GPU (what it computes: vista_ext/ops/projected_qla.py).
//
// A call is launch_qla_plan (vista/cuda/qla.h), once, with the params' qla, and then the launch on the same stream with
// the same params and workspace. Who writes which rows is as in qla.h for calls without targets: every row, padding as
// zeros.
//
// Built for bfloat16 and float16, d = e of 32, 64 or 128, and a dim that is a multiple of 8, as long as the weights of
// a group of heads fit into the shared memory of the device (projected_qla_fits).
// All pointers 16-byte aligned and contiguous. Deterministic: the bits of a sequence depend on its own rows only.
#pragma once

#include "vista/cuda/qla.h"

namespace vista::cuda {

enum class ProjectedQla { kState, kApply, kStateBackward, kApplyBackward };

struct ProjectedQlaParams {
  QlaParams qla;  // without q, k, v, num_targets and own_term; grad_q, grad_k and grad_v are [total, heads * d]
  int64_t dim;
  bool normalise;  // divide rows by their root mean square
  float norm_eps;
  const void* x;         // [total, dim]
  const void* weight_q;  // [heads * d, dim]
  const void* weight_k;  // [heads * d, dim]
  const void* weight_v;  // [heads * d, dim]
};

// Whether there is a kernel for these sizes that fits the current device. Reads dtype, heads, d, e, dim.
bool projected_qla_fits(ProjectedQla which, const ProjectedQlaParams& params);

// qla.state_out <- sum over rows of phi1(x weight_k^T)^T (x weight_v^T)
int launch_projected_qla_state(const ProjectedQlaParams& params, Stream stream);
// qla.out <- phi1(x weight_q^T) phi2(scale * qla.state)
int launch_projected_qla_apply(const ProjectedQlaParams& params, Stream stream);
// qla.grad_k, qla.grad_v <- gradients of the projections from qla.grad_state, divided as x is by the norm
int launch_projected_qla_state_backward(const ProjectedQlaParams& params, Stream stream);
// qla.grad_q likewise, and qla.grad_state_out, from qla.grad_out and qla.state
int launch_projected_qla_apply_backward(const ProjectedQlaParams& params, Stream stream);

}  // namespace vista::cuda
