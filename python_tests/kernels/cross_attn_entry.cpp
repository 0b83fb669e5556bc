// The cross attention launch functions behind one function with flat arguments, for ctypes.
#include <cstdio>
#include <stdexcept>

#include "vista/cuda/cross_attn.h"

namespace {

using vista::cuda::CrossAttnParams;

// In the order of cross_attn_checks.py.
CrossAttnParams params_of(const int64_t* sizes, void* const* pointers, double scale) {
  CrossAttnParams p{};
  p.dtype = static_cast<vista::DType>(*sizes++);
  for (int64_t* size : {&p.total_q, &p.total_kv, &p.groups, &p.sequences, &p.q_heads, &p.kv_heads, &p.d, &p.e,
                        &p.max_q_len, &p.max_kv_len, &p.enough_blocks})
    *size = *sizes++;
  p.scale = static_cast<float>(scale);
  for (vista::cuda::Indices* indices : {&p.q_offsets, &p.kv_offsets, &p.kv_index})
    *indices = {*pointers++, *sizes != 0};
  for (const void** rows : {&p.q, &p.k, &p.v, &p.self_k, &p.self_v, &p.grad_out}) *rows = *pointers++;
  p.grad_lse = static_cast<const float*>(*pointers++);
  p.out = *pointers++;
  p.lse = static_cast<float*>(*pointers++);
  for (void** rows : {&p.grad_q, &p.grad_k, &p.grad_v, &p.grad_self_k, &p.grad_self_v}) *rows = *pointers++;
  p.workspace = *pointers++;
  vista::cuda::CachedRows& cache = p.cache;
  cache.k_rows = static_cast<const uint8_t*>(*pointers++);
  cache.v_rows = static_cast<const uint8_t*>(*pointers++);
  cache.num_bad = static_cast<int64_t*>(pointers[1]);
  cache.slots = {*pointers, *sizes++ != 0};
  if (cache.num_bad == nullptr) return p;
  const auto scheme = static_cast<vista::RowScheme>(*sizes++);
  const int64_t tokens = *sizes++, k_group = *sizes++, v_group = *sizes++;
  cache.k_layout = vista::make_row_layout(scheme, tokens, p.kv_heads * p.d, k_group);
  cache.v_layout = vista::make_row_layout(scheme, tokens, p.kv_heads * p.e, v_group);
  cache.num_slots = *sizes++;
  cache.bad_slots = *sizes++ != 0 ? vista::cuda::BadSlots::kTrap : vista::cuda::BadSlots::kCount;
  return p;
}

}  // namespace

extern "C" int test_cross_attn_workspace_bytes(const int64_t* sizes, void* const* pointers, int64_t backward) {
  return static_cast<int>(vista::cuda::cross_attn_workspace_bytes(params_of(sizes, pointers, 1), backward != 0));
}

extern "C" int test_cross_attn(const int64_t* sizes, void* const* pointers, double scale, int64_t backward) {
  try {
    const CrossAttnParams params = params_of(sizes, pointers, scale);
    const int code = vista::cuda::launch_cross_attn_plan(params, backward != 0, nullptr);
    if (code != 0) return code;
    if (params.cache.k_layout.tokens > 0) return vista::cuda::launch_cached_cross_attn(params, nullptr);
    return backward != 0 ? vista::cuda::launch_cross_attn_backward(params, nullptr)
                         : vista::cuda::launch_cross_attn(params, nullptr);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}
