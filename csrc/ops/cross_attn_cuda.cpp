// The cross attention ops on CUDA: allocation and launches. The contents of offsets and kv_index are checked by the
// kernels (vista/cuda/cross_attn.h): the host never waits for the device.
#include <sstream>

#include "cross_attn.h"
#include "cuda.h"
#include "vista/cuda/cross_attn.h"

namespace vista {
namespace {

using cuda::CrossAttnParams;
using cuda::Stream;

// One call of an op: the params, and the tensors that they point at.
class Call {
 public:
  CrossAttnParams params{};

  Call(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& q_offsets,
       const Tensor& kv_offsets, int64_t max_q_len, int64_t max_kv_len, const std::optional<Tensor>& self_k,
       const std::optional<Tensor>& self_v, const std::optional<Tensor>& kv_index, std::optional<double> attn_scale)
      : op_(op), q_(q), q_offsets_(q_offsets), kv_offsets_(kv_offsets), kv_index_(kv_index) {
    check_cross_attn(op, q, k, v, self_k, self_v);
    params.q_offsets = read_offsets("q_offsets", q_offsets_, "max_q_len", max_q_len);
    params.kv_offsets = read_offsets("kv_offsets", kv_offsets_, "max_kv_len", max_kv_len);
    params.groups = q_offsets_.size(0) - 1;
    params.sequences = kv_offsets_.size(0) - 1;
    check_kv_index(op, kv_index_, params.groups, params.sequences);
    if (kv_index_.has_value()) params.kv_index = device_indices(op, "kv_index", *kv_index_, q);
    params.dtype = kernel_dtype(q.scalar_type());
    params.total_q = q.size(0);
    params.total_kv = k.size(0);
    params.q_heads = q.size(1);
    params.kv_heads = k.size(1);
    params.d = q.size(2);
    params.e = v.size(2);
    params.max_q_len = max_q_len;
    params.max_kv_len = max_kv_len;
    params.scale = score_scale(attn_scale, params.d);
    params.q = read(q);
    params.k = read(k);
    params.v = read(v);
    params.self_k = read(self_k);
    params.self_v = read(self_v);
  }

  // A tensor that a launch reads; a null pointer for an absent one.
  const void* read(const std::optional<Tensor>& tensor) {
    if (!tensor.has_value()) return nullptr;
    kept_.push_back(packed(*tensor));
    return kept_.back().const_data_ptr();
  }

  // The plan, then `launch`.
  void run(bool backward, int (*launch)(const CrossAttnParams&, Stream)) {
    Tensor workspace = torch::stable::new_empty(
        q_, {static_cast<int64_t>(cuda::cross_attn_workspace_bytes(params, backward))}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    std::ostringstream shape;
    shape << params.groups << " groups and " << params.sequences << " sequences, " << params.total_q << " rows of "
          << params.q_heads << " heads on " << params.total_kv << " rows of " << params.kv_heads << " heads, head dims "
          << params.d << " and " << params.e << " in " << dtype_name(q_.scalar_type());
    launch_on(op_, q_, shape.str(), [&](Stream stream) {
      const int code = cuda::launch_cross_attn_plan(params, backward, stream);
      return code != 0 ? code : launch(params, stream);
    });
  }

 private:
  const char* op_;
  const Tensor& q_;
  Tensor q_offsets_, kv_offsets_;
  std::optional<Tensor> kv_index_;
  std::vector<Tensor> kept_;

  cuda::Indices read_offsets(const char* name, Tensor& offsets, const char* max_name, int64_t max_len) {
    const cuda::Indices indices = device_indices(op_, name, offsets, q_);
    check(offsets.size(0) > 0, op_, name, " must have batch + 1 entries, found none");
    check(max_len >= 0, op_, max_name, " must not be negative, found ", max_len);
    return indices;
  }
};

std::tuple<Tensor, Tensor> cross_attn_cuda(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets,
                                           int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor> self_k,
                                           std::optional<Tensor> self_v, std::optional<Tensor> kv_index,
                                           std::optional<double> attn_scale) {
  Call call("jagged_cross_attn", q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index,
            attn_scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  call.params.out = out.mutable_data_ptr();
  call.params.lse = mutable_floats(lse);
  call.run(false, cuda::launch_cross_attn);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_attn_backward_cuda(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor q_offsets, Tensor kv_offsets, int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor> self_k,
    std::optional<Tensor> self_v, std::optional<Tensor> kv_index, std::optional<double> attn_scale) {
  const char* op = "jagged_cross_attn_backward";
  Call call(op, q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index, attn_scale);
  check_cross_attn_grads(op, grad_out, grad_lse, q, v, out, lse);
  CrossAttnParams& p = call.params;
  Tensor grad_q = rows_like(q, false), grad_k = rows_like(k, false), grad_v = rows_like(v, false);
  Tensor grad_self_k = own_gradient(q, self_k, p.kv_heads, p.d), grad_self_v = own_gradient(q, self_k, p.kv_heads, p.e);
  p.grad_out = call.read(grad_out);
  p.grad_lse = static_cast<const float*>(call.read(grad_lse));
  p.out = const_cast<void*>(call.read(out));  // the backward only reads it
  p.lse = static_cast<float*>(const_cast<void*>(call.read(lse)));
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_self_k = grad_self_k.mutable_data_ptr();
  p.grad_self_v = grad_self_v.mutable_data_ptr();
  call.run(true, cuda::launch_cross_attn_backward);
  return {grad_q, grad_k, grad_v, grad_self_k, grad_self_v};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) {
  m.impl("jagged_cross_attn", TORCH_BOX(&vista::cross_attn_cuda));
  m.impl("jagged_cross_attn_backward", TORCH_BOX(&vista::cross_attn_backward_cuda));
}
