// Launches that several launch functions share.
#pragma once

#include "vista/cuda/cross_attn.h"

namespace vista::cuda {

// forward.cu: query rows of a block of the forward, which the plan has to count by
int cross_attn_forward_run(const CrossAttnParams& params);
// prepare.cu: delta and the own item's weight and pull -> workspace; grad_self_k, grad_self_v, but in fp32 only behind
// backward_queries.cu
int launch_cross_attn_prepare(const CrossAttnParams& params, Stream stream);
int launch_cross_attn_own_gradients(const CrossAttnParams& params, Stream stream);
// backward_queries.cu: grad_q
int launch_cross_attn_backward_queries(const CrossAttnParams& params, Stream stream);
// backward_keys.cu: grad_k, grad_v
int launch_cross_attn_backward_keys(const CrossAttnParams& params, Stream stream);

}  // namespace vista::cuda
