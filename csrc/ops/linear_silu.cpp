#include "linear_silu.h"

namespace vista {
namespace {

Tensor linear_silu_cpu(Tensor x, Tensor weight, std::optional<Tensor> bias) {
  check_linear("linear_silu", x, weight, bias);
  return compose_linear_silu(x, weight, bias);
}

Tensor linear_silu_backward_cpu(Tensor grad_out, Tensor x, Tensor weight, std::optional<Tensor> bias) {
  const char* op = "linear_silu_backward";
  check_linear(op, x, weight, bias);
  check_linear_grad(op, grad_out, x, weight);
  return compose_linear_silu_backward(grad_out, x, weight, bias);
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("linear_silu", TORCH_BOX(&vista::linear_silu_cpu));
  m.impl("linear_silu_backward", TORCH_BOX(&vista::linear_silu_backward_cpu));
}
