// The launch functions of projected QLA behind one function with flat arguments, for ctypes.
#include <cstdio>
#include <stdexcept>

#include "vista/cuda/projected_qla.h"

namespace {

using vista::cuda::ProjectedQlaParams;

// In the order of projected_qla_checks.py.
ProjectedQlaParams params_of(const int64_t* sizes, void* const* pointers, double norm_eps) {
  ProjectedQlaParams p{};
  vista::cuda::QlaParams& q = p.qla;
  q.dtype = static_cast<vista::DType>(*sizes++);
  q.activation = static_cast<vista::Activation>(*sizes++);
  q.state_activation = static_cast<vista::Activation>(*sizes++);
  for (int64_t* size : {&q.total, &q.batch, &q.heads, &q.d, &q.e, &q.max_seq_len, &q.chunk_rows, &p.dim})
    *size = *sizes++;
  q.seq_offsets.is_int64 = *sizes++ != 0;
  p.normalise = *sizes++ != 0;
  p.norm_eps = static_cast<float>(norm_eps);
  q.seq_offsets.data = *pointers++;
  q.attn_scale = static_cast<const float*>(*pointers++);
  for (const void** rows : {&p.x, &p.weight_q, &p.weight_k, &p.weight_v, &q.grad_out}) *rows = *pointers++;
  q.state = static_cast<const float*>(*pointers++);
  q.grad_state = static_cast<const float*>(*pointers++);
  for (void** rows : {&q.out, &q.grad_q, &q.grad_k, &q.grad_v}) *rows = *pointers++;
  q.state_out = static_cast<float*>(*pointers++);
  q.grad_state_out = static_cast<float*>(*pointers++);
  q.workspace = *pointers++;
  return p;
}

int launch_plan(const ProjectedQlaParams& p, vista::cuda::Stream stream) { return launch_qla_plan(p.qla, stream); }

}  // namespace

extern "C" int test_workspace_bytes(const int64_t* sizes, void* const* pointers, int64_t sums_rows) {
  return static_cast<int>(vista::cuda::qla_workspace_bytes(params_of(sizes, pointers, 0).qla, sums_rows != 0));
}

extern "C" int test_fits(const int64_t* sizes, void* const* pointers, int64_t which) {
  return projected_qla_fits(static_cast<vista::cuda::ProjectedQla>(which), params_of(sizes, pointers, 0));
}

extern "C" int test_launch(const int64_t* sizes, void* const* pointers, const double* norm_eps, int64_t which) {
  using Launch = int (*)(const ProjectedQlaParams&, vista::cuda::Stream);
  constexpr Launch kLaunches[] = {
      launch_plan, vista::cuda::launch_projected_qla_state, vista::cuda::launch_projected_qla_apply,
      vista::cuda::launch_projected_qla_state_backward, vista::cuda::launch_projected_qla_apply_backward};
  try {
    return kLaunches[which](params_of(sizes, pointers, *norm_eps), nullptr);
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return -1;
  }
}
