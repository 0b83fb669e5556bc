// The QLA launch functions behind one function with flat arguments, for ctypes.
#include <cstdio>
#include <stdexcept>

#include "vista/cuda/qla.h"

namespace {

using vista::cuda::QlaParams;

// In the order of qla_checks.py.
QlaParams params_of(const int64_t* sizes, void* const* pointers) {
  QlaParams p{};
  p.dtype = static_cast<vista::DType>(*sizes++);
  p.allow_tf32 = *sizes++ != 0;
  p.activation = static_cast<vista::Activation>(*sizes++);
  p.state_activation = static_cast<vista::Activation>(*sizes++);
  p.own_term = *sizes++ != 0;
  for (int64_t* size : {&p.total, &p.batch, &p.heads, &p.d, &p.e, &p.max_seq_len, &p.chunk_rows}) *size = *sizes++;
  p.seq_offsets.is_int64 = p.num_targets.is_int64 = *sizes++ != 0;
  p.seq_offsets.data = *pointers++;
  p.num_targets.data = *pointers++;
  p.attn_scale = static_cast<const float*>(*pointers++);
  for (const void** rows : {&p.q, &p.k, &p.v, &p.grad_out}) *rows = *pointers++;
  p.state = static_cast<const float*>(*pointers++);
  p.grad_state = static_cast<const float*>(*pointers++);
  for (void** rows : {&p.out, &p.grad_q, &p.grad_k, &p.grad_v}) *rows = *pointers++;
  p.state_out = static_cast<float*>(*pointers++);
  p.grad_state_out = static_cast<float*>(*pointers++);
  p.workspace = *pointers++;
  return p;
}

}  // namespace

extern "C" int test_qla_workspace_bytes(const int64_t* sizes, void* const* pointers, int64_t sums_rows) {
  return static_cast<int>(vista::cuda::qla_workspace_bytes(params_of(sizes, pointers), sums_rows != 0));
}

extern "C" int test_qla_launch(const int64_t* sizes, void* const* pointers, int64_t which) {
  using Launch = int (*)(const QlaParams&, vista::cuda::Stream);
  constexpr Launch kLaunches[] = {vista::cuda::launch_qla_plan, vista::cuda::launch_qla_state,
                                  vista::cuda::launch_qla_apply, vista::cuda::launch_qla_apply_backward,
                                  vista::cuda::launch_qla_state_backward};
  try {
    return kLaunches[which](params_of(sizes, pointers), nullptr);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}
