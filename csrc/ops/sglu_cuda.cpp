// The sglu ops on CUDA: allocation and launches. What is built: vista/cuda/sglu.h.
#include "cuda.h"
#include "sglu.h"
#include "vista/cuda/sglu.h"

namespace vista {
namespace {

using cuda::SgluParams;
using cuda::Stream;

// One call of an op: the params, and the tensors that they point at.
class Call : public LaunchTensors {
 public:
  SgluParams params{};

  Call(const char* op, const Tensor& x, const Tensor& up, const Tensor& gate, const Tensor& down,
       std::optional<double> norm_eps, bool residual)
      : op_(op), x_(x) {
    check_sglu(op, x, up, gate, down, norm_eps);
    params.dtype = kernel_dtype(x.scalar_type());
    params.total = x.size(0);
    params.dim = x.size(1);
    params.hidden = up.size(0);
    params.norm = norm_eps.has_value();
    params.eps = static_cast<float>(norm_eps.value_or(0));
    params.residual = residual;
    params.x = read(x);
    params.up = read(up);
    params.gate = read(gate);
  }

  void run(int (*launch)(const SgluParams&, Stream)) {
    std::ostringstream shape;
    shape << params.total << " rows of " << params.dim << ", " << params.hidden << " hidden, in "
          << dtype_name(x_.scalar_type());
    launch_on(op_, x_, shape.str(), [&](Stream stream) { return launch(params, stream); });
  }

 private:
  const char* op_;
  const Tensor& x_;
};

Tensor sglu_cuda(Tensor x, Tensor up, Tensor gate, Tensor down, std::optional<double> norm_eps, bool residual) {
  Call call("sglu", x, up, gate, down, norm_eps, residual);
  call.params.down = call.read(down);
  Tensor out = torch::stable::new_empty(x, x.sizes());
  call.params.out = out.mutable_data_ptr();
  call.run(cuda::launch_sglu);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sglu_backward_cuda(Tensor grad_out, Tensor x, Tensor up, Tensor gate,
                                                              Tensor down, std::optional<double> norm_eps,
                                                              bool residual) {
  const char* op = "sglu_backward";
  Call call(op, x, up, gate, down, norm_eps, residual);
  check_sglu_grad(op, grad_out, x);
  SgluParams& p = call.params;
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  Tensor up_rows = torch::stable::new_empty(x, {p.total, p.hidden});
  Tensor gate_rows = torch::stable::new_empty(x, {p.total, p.hidden});
  Tensor hidden = torch::stable::new_empty(x, {p.total, p.hidden});
  p.down_t = call.read(torch::stable::transpose(down, 0, 1));
  p.grad_out = call.read(grad_out);
  p.grad_x = grad_x.mutable_data_ptr();
  p.grad_up_rows = up_rows.mutable_data_ptr();
  p.grad_gate_rows = gate_rows.mutable_data_ptr();
  p.hidden_rows = hidden.mutable_data_ptr();
  call.run(cuda::launch_sglu_backward);
  return {grad_x, up_rows, gate_rows, hidden};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) {
  m.impl("sglu", TORCH_BOX(&vista::sglu_cuda));
  m.impl("sglu_backward", TORCH_BOX(&vista::sglu_backward_cuda));
}
