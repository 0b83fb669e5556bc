// The QLA ops on CUDA: allocation and launches. The contents of offsets and targets are checked by the kernels
// (vista/cuda/qla.h): the host never waits for the device.
#include "qla_call.h"

namespace vista {
namespace {

using cuda::QlaParams;
using cuda::Stream;

Tensor qla_state_cuda(Tensor k, Tensor v, Tensor seq_offsets, int64_t max_seq_len, std::optional<Tensor> num_targets,
                      std::string activation, bool allow_tf32) {
  const char* op = "qla_state";
  check_kv(op, k, v);
  QlaCall call(op, k, k.size(1), k.size(2), v.size(2), seq_offsets, max_seq_len, num_targets, activation, allow_tf32);
  QlaParams& p = call.params;
  Tensor state = state_like(k, p.batch, p.d, p.e);
  p.k = call.read(k);
  p.v = call.read(v);
  p.state_out = mutable_floats(state);
  call.run(true, [&](Stream stream) { return cuda::launch_qla_state(p, stream); });
  return state;
}

std::tuple<Tensor, Tensor> qla_state_backward_cuda(Tensor grad_state, Tensor k, Tensor v, Tensor seq_offsets,
                                                   int64_t max_seq_len, std::optional<Tensor> num_targets,
                                                   std::string activation, bool allow_tf32) {
  const char* op = "qla_state_backward";
  check_kv(op, k, v);
  QlaCall call(op, k, k.size(1), k.size(2), v.size(2), seq_offsets, max_seq_len, num_targets, activation, allow_tf32);
  QlaParams& p = call.params;
  check_state(op, "grad_state", grad_state, p.batch, k, p.d, p.e);
  Tensor grad_k = rows_like(k, false), grad_v = rows_like(v, false);
  p.k = call.read(k);
  p.v = call.read(v);
  p.grad_state = call.read_floats(grad_state);
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  call.run(false, [&](Stream stream) { return cuda::launch_qla_state_backward(p, stream); });
  return {grad_k, grad_v};
}

// What qla_apply and its backward read.
void read_apply(const char* op, QlaCall& call, const Tensor& q, const Tensor& state, const Tensor& attn_scale,
                const std::optional<Tensor>& num_targets, const std::optional<Tensor>& self_k,
                const std::optional<Tensor>& self_v, const std::string& state_activation) {
  QlaParams& p = call.params;
  check_apply(op, q, state, p.batch, num_targets, self_k, self_v);
  call.scale_by(attn_scale);
  p.state_activation = parse_activation(op, "state_activation", state_activation);
  p.own_term = self_k.has_value();
  p.q = call.read(q);
  p.k = call.read(self_k);
  p.v = call.read(self_v);
  p.state = call.read_floats(state);
}

int64_t last_size(const Tensor& tensor) { return tensor.dim() == 0 ? 0 : tensor.size(tensor.dim() - 1); }

Tensor qla_apply_cuda(Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
                      std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<Tensor> num_targets,
                      std::string activation, std::string state_activation, bool allow_tf32) {
  const char* op = "qla_apply";
  check_rows(op, "q", q);
  QlaCall call(op, q, q.size(1), q.size(2), last_size(state), seq_offsets, max_seq_len, num_targets, activation,
               allow_tf32);
  read_apply(op, call, q, state, attn_scale, num_targets, self_k, self_v, state_activation);
  QlaParams& p = call.params;
  Tensor out = torch::stable::new_empty(q, {p.total, p.heads, p.e});
  p.out = out.mutable_data_ptr();
  call.run(false, [&](Stream stream) { return cuda::launch_qla_apply(p, stream); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qla_apply_backward_cuda(
    Tensor grad_out, Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
    std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<Tensor> num_targets,
    std::string activation, std::string state_activation, bool allow_tf32) {
  const char* op = "qla_apply_backward";
  check_rows(op, "q", q);
  QlaCall call(op, q, q.size(1), q.size(2), last_size(state), seq_offsets, max_seq_len, num_targets, activation,
               allow_tf32);
  read_apply(op, call, q, state, attn_scale, num_targets, self_k, self_v, state_activation);
  QlaParams& p = call.params;
  check_like(op, "grad_out", grad_out, "q", q, p.e);
  // Without the own term its gradients have no rows; with it the kernel writes those of the targets only.
  const int64_t own_rows = p.own_term ? p.total : 0;
  Tensor grad_q = rows_like(q, false), grad_state = rows_like(state, false);
  Tensor grad_self_k = torch::stable::new_zeros(q, {own_rows, p.heads, p.d});
  Tensor grad_self_v = torch::stable::new_zeros(q, {own_rows, p.heads, p.e});
  p.grad_out = call.read(grad_out);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_self_k.mutable_data_ptr();
  p.grad_v = grad_self_v.mutable_data_ptr();
  p.grad_state_out = mutable_floats(grad_state);
  call.run(true, [&](Stream stream) { return cuda::launch_qla_apply_backward(p, stream); });
  return {grad_q, grad_state, grad_self_k, grad_self_v};
}

std::tuple<Tensor, Tensor> qla_cuda(Tensor q, Tensor k, Tensor v, Tensor seq_offsets, int64_t max_seq_len,
                                    std::optional<Tensor> num_targets, std::optional<Tensor> attn_scale,
                                    std::string activation, std::string state_activation, bool allow_tf32) {
  const char* op = "qla";
  check_qkv(op, q, k, v);
  QlaCall call(op, q, q.size(1), q.size(2), v.size(2), seq_offsets, max_seq_len, num_targets, activation, allow_tf32);
  QlaParams& p = call.params;
  call.scale_by(attn_scale);
  p.state_activation = parse_activation(op, "state_activation", state_activation);
  p.own_term = num_targets.has_value();
  Tensor state = state_like(q, p.batch, p.d, p.e), out = rows_like(v, false);
  p.q = call.read(q);
  p.k = call.read(k);
  p.v = call.read(v);
  p.state = p.state_out = mutable_floats(state);
  p.out = out.mutable_data_ptr();
  call.run(true, [&](Stream stream) {
    const int code = cuda::launch_qla_state(p, stream);
    return code != 0 ? code : cuda::launch_qla_apply(p, stream);
  });
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor> qla_backward_cuda(Tensor grad_out, std::optional<Tensor> grad_state, Tensor q,
                                                     Tensor k, Tensor v, Tensor state, Tensor seq_offsets,
                                                     int64_t max_seq_len, std::optional<Tensor> num_targets,
                                                     std::optional<Tensor> attn_scale, std::string activation,
                                                     std::string state_activation, bool allow_tf32) {
  const char* op = "qla_backward";
  check_qkv(op, q, k, v);
  check_like(op, "grad_out", grad_out, "q", q, v.size(2));
  QlaCall call(op, q, q.size(1), q.size(2), v.size(2), seq_offsets, max_seq_len, num_targets, activation, allow_tf32);
  QlaParams& p = call.params;
  call.scale_by(attn_scale);
  p.state_activation = parse_activation(op, "state_activation", state_activation);
  p.own_term = num_targets.has_value();
  check_state(op, "state", state, p.batch, q, p.d, p.e);
  if (grad_state.has_value()) check_state(op, "grad_state", *grad_state, p.batch, q, p.d, p.e);
  Tensor grad_q = rows_like(q, false), grad_k = rows_like(k, false), grad_v = rows_like(v, false),
         total_grad_state = rows_like(state, false);
  p.q = call.read(q);
  p.k = call.read(k);
  p.v = call.read(v);
  p.grad_out = call.read(grad_out);
  p.state = call.read_floats(state);
  p.grad_state = call.read_floats(grad_state);
  p.grad_q = grad_q.mutable_data_ptr();
  p.grad_k = grad_k.mutable_data_ptr();
  p.grad_v = grad_v.mutable_data_ptr();
  p.grad_state_out = mutable_floats(total_grad_state);
  call.run(true, [&](Stream stream) {
    const int code = cuda::launch_qla_apply_backward(p, stream);
    if (code != 0) return code;
    p.grad_state = p.grad_state_out;
    return cuda::launch_qla_state_backward(p, stream);
  });
  return {grad_q, grad_k, grad_v};
}

}  // namespace

const QlaHalves qla_halves_cuda{qla_state_cuda, qla_state_backward_cuda, qla_apply_cuda, qla_apply_backward_cuda};

}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) {
  m.impl("qla", TORCH_BOX(&vista::qla_cuda));
  m.impl("qla_backward", TORCH_BOX(&vista::qla_backward_cuda));
  m.impl("qla_state", TORCH_BOX(&vista::qla_state_cuda));
  m.impl("qla_state_backward", TORCH_BOX(&vista::qla_state_backward_cuda));
  m.impl("qla_apply", TORCH_BOX(&vista::qla_apply_cuda));
  m.impl("qla_apply_backward", TORCH_BOX(&vista::qla_apply_backward_cuda));
}
