// The cross attention ops on CUDA: allocation and launches. The contents of offsets and kv_index are checked by the
// kernels (vista/cuda/cross_attn.h): the host never waits for the device.
#include <sstream>

#include "cached_cross_attn.h"
#include "cross_attn.h"
#include "cuda.h"
#include "vista/cuda/cross_attn.h"

namespace vista {
namespace {

using cuda::CrossAttnParams;
using cuda::Stream;

// One call of an op: the params, and the tensors that they point at. Arguments are checked already.
class Call : public LaunchTensors {
 public:
  CrossAttnParams params{};

  Call(const char* op, const Tensor& q, const Tensor& q_offsets, int64_t max_q_len, int64_t kv_heads, int64_t e,
       const std::optional<Tensor>& self_k, const std::optional<Tensor>& self_v, std::optional<double> attn_scale)
      : op_(op), q_(q) {
    params.q_offsets = offsets("q_offsets", q_offsets, "max_q_len", max_q_len);
    params.groups = q_offsets.size(0) - 1;
    params.dtype = kernel_dtype(q.scalar_type());
    params.total_q = q.size(0);
    params.q_heads = q.size(1);
    params.kv_heads = kv_heads;
    params.d = q.size(2);
    params.e = e;
    params.max_q_len = max_q_len;
    params.scale = score_scale(attn_scale, params.d);
    params.q = read(q);
    params.self_k = read(self_k);
    params.self_v = read(self_v);
  }

  void set_keys(const Tensor& k, const Tensor& v, const Tensor& kv_offsets, int64_t max_kv_len,
                const std::optional<Tensor>& kv_index) {
    params.kv_offsets = offsets("kv_offsets", kv_offsets, "max_kv_len", max_kv_len);
    params.sequences = kv_offsets.size(0) - 1;
    check_kv_index(op_, kv_index, params.groups, params.sequences);
    if (kv_index.has_value()) params.kv_index = indices("kv_index", *kv_index);
    params.total_kv = k.size(0);
    params.max_kv_len = max_kv_len;
    params.k = read(k);
    params.v = read(v);
  }

  void set_cache(const CachedOptions& options, const Tensor& k_rows, const Tensor& v_rows, const Tensor& slots,
                 IndexPolicy policy, Tensor& num_bad) {
    cuda::CachedRows& cache = params.cache;
    cache.k_layout = options.k_layout;
    cache.v_layout = options.v_layout;
    cache.k_rows = static_cast<const uint8_t*>(read(k_rows));
    cache.v_rows = options.one_cache ? cache.k_rows : static_cast<const uint8_t*>(read(v_rows));
    cache.num_slots = k_rows.size(0);
    cache.slots = indices("slots", slots);
    cache.num_bad = static_cast<int64_t*>(num_bad.mutable_data_ptr());
    cache.bad_slots = bad_slots(policy);
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

  cuda::Indices indices(const char* name, const Tensor& tensor) { return device_indices(op_, name, keep(tensor), q_); }

  cuda::Indices offsets(const char* name, const Tensor& offsets, const char* max_name, int64_t max_len) {
    const cuda::Indices found = indices(name, offsets);
    check(offsets.size(0) > 0, op_, name, " must have batch + 1 entries, found none");
    check(max_len >= 0, op_, max_name, " must not be negative, found ", max_len);
    return found;
  }
};

std::tuple<Tensor, Tensor> cross_attn_cuda(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets,
                                           int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor> self_k,
                                           std::optional<Tensor> self_v, std::optional<Tensor> kv_index,
                                           std::optional<double> attn_scale) {
  const char* op = "jagged_cross_attn";
  check_cross_attn(op, q, k, v, self_k, self_v);
  Call call(op, q, q_offsets, max_q_len, k.size(1), v.size(2), self_k, self_v, attn_scale);
  call.set_keys(k, v, kv_offsets, max_kv_len, kv_index);
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
  check_cross_attn(op, q, k, v, self_k, self_v);
  Call call(op, q, q_offsets, max_q_len, k.size(1), v.size(2), self_k, self_v, attn_scale);
  call.set_keys(k, v, kv_offsets, max_kv_len, kv_index);
  check_cross_attn_grads(op, grad_out, grad_lse, q, v, out, lse);
  CrossAttnParams& p = call.params;
  Tensor grad_q = rows_like(q, false), grad_k = rows_like(k, false), grad_v = rows_like(v, false);
  Tensor grad_self_k = own_gradient(q, self_k, p.kv_heads, p.d), grad_self_v = own_gradient(q, self_k, p.kv_heads, p.e);
  p.grad_out = call.read(grad_out);
  p.grad_lse = call.read_floats(grad_lse);
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

std::tuple<Tensor, Tensor, Tensor> cached_cross_attn_cuda(
    Tensor q, Tensor k_rows, Tensor v_rows, Tensor slots, Tensor q_offsets, int64_t max_q_len, int64_t tokens,
    int64_t kv_heads, std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<int64_t> value_dim,
    std::string scheme, std::optional<int64_t> group, std::string policy, std::optional<double> attn_scale) {
  const char* op = "cached_cross_attn";
  const CachedOptions options = check_cached_cross_attn(op, q, k_rows, v_rows, slots, q_offsets, tokens, kv_heads,
                                                        self_k, self_v, value_dim, scheme, group);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), options.e});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Tensor num_bad = torch::stable::new_empty(q, {}, ScalarType::Long);
  Call call(op, q, q_offsets, max_q_len, kv_heads, options.e, self_k, self_v, attn_scale);
  call.set_cache(options, k_rows, v_rows, slots, parse_policy(op, policy), num_bad);
  call.params.out = out.mutable_data_ptr();
  call.params.lse = mutable_floats(lse);
  call.run(false, cuda::launch_cached_cross_attn);
  return {out, lse, num_bad};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) {
  m.impl("jagged_cross_attn", TORCH_BOX(&vista::cross_attn_cuda));
  m.impl("jagged_cross_attn_backward", TORCH_BOX(&vista::cross_attn_backward_cuda));
  m.impl("cached_cross_attn", TORCH_BOX(&vista::cached_cross_attn_cuda));
}
