// The projected QLA ops on CUDA: the kernels where they fit, else the composition of all rows at once (the host cannot
// read where sequences end).
#include "projected_qla.h"
#include "qla_call.h"
#include "vista/cuda/projected_qla.h"

namespace vista {
namespace {

using cuda::ProjectedQla;
using cuda::ProjectedQlaParams;
using cuda::Stream;

// A call of one of the ops: the params, and the tensors that they point at.
class ProjectedCall : public QlaCall {
 public:
  ProjectedQlaParams projected{};

  ProjectedCall(const char* op, const Tensor& x, int64_t heads, HeadDims dims, const Tensor& seq_offsets,
                int64_t max_seq_len, std::optional<double> norm_eps, const std::string& activation)
      : QlaCall(op, x, heads, dims.d, dims.e, seq_offsets, max_seq_len, std::nullopt, activation, false), x_(x) {
    projected.dim = x.size(1);
    projected.normalise = norm_eps.has_value();
    projected.norm_eps = static_cast<float>(norm_eps.value_or(0));
  }

  bool fits(ProjectedQla which) {
    const torch::stable::accelerator::DeviceGuard guard(x_.get_device_index());
    projected.qla = params;
    return cuda::projected_qla_fits(which, projected);
  }

  void launch(bool sums_rows, int (*launch)(const ProjectedQlaParams&, Stream)) {
    projected.x = read(x_);
    run(sums_rows, [&](Stream stream) {
      projected.qla = params;
      return launch(projected, stream);
    });
  }

 private:
  const Tensor& x_;
};

Tensor projected_qla_state_cuda(Tensor x, Tensor weight_k, Tensor weight_v, Tensor seq_offsets, int64_t max_seq_len,
                                int64_t heads, std::optional<double> norm_eps, std::string activation) {
  const char* op = "projected_qla_state";
  const HeadDims dims = check_projected_state(op, x, weight_k, weight_v, heads, norm_eps);
  ProjectedCall call(op, x, heads, dims, seq_offsets, max_seq_len, norm_eps, activation);
  if (!call.fits(ProjectedQla::kState)) {
    const ProjectedRows rows(x, heads, norm_eps);
    return qla_halves_cuda.state(rows.project(weight_k), rows.project(weight_v), seq_offsets, max_seq_len, std::nullopt,
                                 activation, false);
  }
  Tensor state = torch::stable::new_empty(x, {call.params.batch, heads, dims.d, dims.e}, ScalarType::Float);
  call.projected.weight_k = call.read(weight_k);
  call.projected.weight_v = call.read(weight_v);
  call.params.state_out = mutable_floats(state);
  call.launch(true, cuda::launch_projected_qla_state);
  return state;
}

std::tuple<Tensor, Tensor> projected_qla_state_backward_cuda(Tensor grad_state, Tensor x, Tensor weight_k,
                                                             Tensor weight_v, Tensor seq_offsets, int64_t max_seq_len,
                                                             int64_t heads, std::optional<double> norm_eps,
                                                             std::string activation) {
  const char* op = "projected_qla_state_backward";
  const HeadDims dims = check_projected_state(op, x, weight_k, weight_v, heads, norm_eps);
  ProjectedCall call(op, x, heads, dims, seq_offsets, max_seq_len, norm_eps, activation);
  check_projected_states(op, "grad_state", grad_state, call.params.batch, heads, dims, x);
  if (!call.fits(ProjectedQla::kStateBackward)) {
    const ProjectedRows rows(x, heads, norm_eps);
    const auto [of_k, of_v] = qla_halves_cuda.state_backward(grad_state, rows.project(weight_k), rows.project(weight_v),
                                                             seq_offsets, max_seq_len, std::nullopt, activation, false);
    return {rows.scaled(of_k), rows.scaled(of_v)};
  }
  Tensor grad_k = torch::stable::new_empty(x, {x.size(0), heads * dims.d});
  Tensor grad_v = torch::stable::new_empty(x, {x.size(0), heads * dims.e});
  call.projected.weight_k = call.read(weight_k);
  call.projected.weight_v = call.read(weight_v);
  call.params.grad_state = call.read_floats(grad_state);
  call.params.grad_k = grad_k.mutable_data_ptr();
  call.params.grad_v = grad_v.mutable_data_ptr();
  call.launch(false, cuda::launch_projected_qla_state_backward);
  return {grad_k, grad_v};
}

// What the apply and its backward read.
ProjectedCall apply_call(const char* op, const Tensor& x, const Tensor& weight_q, const Tensor& state,
                         const Tensor& attn_scale, const Tensor& seq_offsets, int64_t max_seq_len,
                         std::optional<double> norm_eps, const std::string& activation,
                         const std::string& state_activation) {
  const HeadDims dims =
      check_projected_apply(op, x, weight_q, state, attn_scale, seq_offsets, norm_eps, activation, state_activation);
  ProjectedCall call(op, x, state.size(1), dims, seq_offsets, max_seq_len, norm_eps, activation);
  call.params.state_activation = parse_activation(op, "state_activation", state_activation);
  call.scale_by(attn_scale);
  call.params.state = call.read_floats(state);
  call.projected.weight_q = call.read(weight_q);
  return call;
}

Tensor projected_qla_apply_cuda(Tensor x, Tensor weight_q, Tensor state, Tensor attn_scale, Tensor seq_offsets,
                                int64_t max_seq_len, std::optional<double> norm_eps, std::string activation,
                                std::string state_activation) {
  const char* op = "projected_qla_apply";
  ProjectedCall call =
      apply_call(op, x, weight_q, state, attn_scale, seq_offsets, max_seq_len, norm_eps, activation, state_activation);
  if (!call.fits(ProjectedQla::kApply))
    return qla_halves_cuda.apply(ProjectedRows(x, state.size(1), norm_eps).project(weight_q), state, attn_scale,
                                 seq_offsets, max_seq_len, std::nullopt, std::nullopt, std::nullopt, activation,
                                 state_activation, false);
  Tensor out = torch::stable::new_empty(x, {x.size(0), state.size(1), state.size(3)});
  call.params.out = out.mutable_data_ptr();
  call.launch(false, cuda::launch_projected_qla_apply);
  return out;
}

std::tuple<Tensor, Tensor> projected_qla_apply_backward_cuda(Tensor grad_out, Tensor x, Tensor weight_q, Tensor state,
                                                             Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
                                                             std::optional<double> norm_eps, std::string activation,
                                                             std::string state_activation) {
  const char* op = "projected_qla_apply_backward";
  ProjectedCall call =
      apply_call(op, x, weight_q, state, attn_scale, seq_offsets, max_seq_len, norm_eps, activation, state_activation);
  check_grad_rows(op, grad_out, x, state.size(1), state.size(3));
  if (!call.fits(ProjectedQla::kApplyBackward)) {
    const ProjectedRows rows(x, state.size(1), norm_eps);
    const auto [of_q, of_state, of_self_k, of_self_v] =
        qla_halves_cuda.apply_backward(grad_out, rows.project(weight_q), state, attn_scale, seq_offsets, max_seq_len,
                                       std::nullopt, std::nullopt, std::nullopt, activation, state_activation, false);
    return {rows.scaled(of_q), of_state};
  }
  Tensor grad_q = torch::stable::new_empty(x, {x.size(0), weight_q.size(0)});
  Tensor grad_state = torch::stable::new_empty(state, state.sizes());
  call.params.grad_out = call.read(grad_out);
  call.params.grad_q = grad_q.mutable_data_ptr();
  call.params.grad_state_out = mutable_floats(grad_state);
  call.launch(true, cuda::launch_projected_qla_apply_backward);
  return {grad_q, grad_state};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) {
  m.impl("projected_qla_state", TORCH_BOX(&vista::projected_qla_state_cuda));
  m.impl("projected_qla_state_backward", TORCH_BOX(&vista::projected_qla_state_backward_cuda));
  m.impl("projected_qla_apply", TORCH_BOX(&vista::projected_qla_apply_cuda));
  m.impl("projected_qla_apply_backward", TORCH_BOX(&vista::projected_qla_apply_backward_cuda));
}
