// Launches that several launch functions share.
#pragma once

#include "vista/cuda/qla.h"

namespace vista::cuda {

// Partial sums of sequences longer than a chunk -> state_out, or, as gradient, W -> grad_state_out.
int launch_reduce(const QlaParams& params, bool gradient, Stream stream);

// state.cu: Z, or, as gradient, W, of any size, reduction included
int launch_sum(const QlaParams& params, bool gradient, Stream stream);

// apply.cu: out <- phi1(q) P; as gradient, grad_v <- phi1(k) grad_state on source rows
int launch_map(const QlaParams& params, bool gradient, Stream stream);

// pull.cu: grad_q <- phi1'(q) * (grad_out P^T + own term), grad_k and grad_v of targets; as gradient,
// grad_k <- phi1'(k) * (v grad_state^T) on source rows
int launch_pull(const QlaParams& params, bool gradient, Stream stream);

}  // namespace vista::cuda
