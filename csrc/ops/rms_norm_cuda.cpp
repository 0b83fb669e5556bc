// The backward pass of an RMS norm on CUDA: allocation and launch.
#include <sstream>

#include "cuda.h"
#include "rms_norm.h"
#include "vista/cuda/rms_norm.h"

namespace vista {
namespace {

Tensor rms_norm_backward_cuda(Tensor grad_rows, Tensor x, double norm_eps) {
  const char* op = "rms_norm_backward";
  check_rms_norm(op, grad_rows, x, norm_eps);
  LaunchTensors tensors;
  Tensor grad_x = torch::stable::new_empty(x, x.sizes());
  cuda::RmsNormParams params{};
  params.dtype = kernel_dtype(x.scalar_type());
  params.rows = x.size(0);
  params.dim = x.size(1);
  params.eps = static_cast<float>(norm_eps);
  params.grad_rows = tensors.read(grad_rows);
  params.x = tensors.read(x);
  params.grad_x = grad_x.mutable_data_ptr();
  std::ostringstream shape;
  shape << params.rows << " rows of " << params.dim << " in " << dtype_name(x.scalar_type());
  launch_on(op, x, shape.str(), [&](cuda::Stream stream) { return cuda::launch_rms_norm_backward(params, stream); });
  return grad_x;
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CUDA, m) { m.impl("rms_norm_backward", TORCH_BOX(&vista::rms_norm_backward_cuda)); }
