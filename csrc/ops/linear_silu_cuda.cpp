// linear_silu on CUDA: allocation and launch, or torch's own ops for what no kernel serves.
#include <sstream>

#include "attention.h"
#include "cuda.h"
#include "linear_silu.h"
#include "vista/cuda/gemm.h"

namespace vista {
namespace {

bool is_built(const Tensor& x, const Tensor& weight) {
  return cuda::linear_silu_is_built(kernel_dtype(x.scalar_type()), x.size(1), weight.size(0));
}

Tensor run(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
           const std::optional<Tensor>& grad_out) {
  LaunchTensors tensors;
  Tensor out = torch::stable::new_empty(x, {x.size(0), weight.size(0)});
  cuda::LinearSiluParams params{};
  params.dtype = kernel_dtype(x.scalar_type());
  params.rows = x.size(0);
  params.in_features = x.size(1);
  params.out_features = weight.size(0);
  params.x = tensors.read(x);
  params.weight = tensors.read(weight);
  params.bias = tensors.read(bias);
  params.grad_out = tensors.read(grad_out);
  params.out = out.mutable_data_ptr();
  if (params.rows == 0) return out;  // torch gives empty tensors no address, and a null gradient would mean forward
  std::ostringstream shape;
  shape << params.rows << " rows of " << params.in_features << " to " << params.out_features << " features in "
        << dtype_name(x.scalar_type());
  launch_on(op, x, shape.str(), [&](cuda::Stream stream) { return cuda::launch_linear_silu(params, stream); });
  return out;
}

Tensor linear_silu_cuda(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear_silu";
  check_linear(op, x, weight, bias);
  return is_built(x, weight) ? run(op, x, weight, bias, std::nullopt) : compose_linear_silu(x, weight, bias);
}

Tensor linear_silu_backward_cuda(Tensor grad_out, Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear_silu_backward";
  check_linear(op, x, weight, bias);
  check_linear_grad(op, grad_out, x, weight);
  return is_built(x, weight) ? run(op, x, weight, bias, grad_out)
                             : compose_linear_silu_backward(grad_out, x, weight, bias);
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) {
  m.impl("linear_silu", TORCH_BOX(&vista::linear_silu_cuda));
  m.impl("linear_silu_backward", TORCH_BOX(&vista::linear_silu_backward_cuda));
}
