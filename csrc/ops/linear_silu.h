// What linear_silu and its backward check, the same on every device, and their composition of torch's own ops: all of
// the CPU, and what no kernel of ours serves on CUDA.
#pragma once

#include <array>
#include <optional>

#include "attention.h"

namespace vista {

// `tensor` agrees with x in device and dtype and has shape [rows, columns], or [columns] if rows < 0.
inline void check_linear_operand(const char* op, const char* name, const Tensor& tensor, const Tensor& x, int64_t rows,
                                 int64_t columns) {
  check_device(op, name, tensor, x);
  check(tensor.scalar_type() == x.scalar_type(), op, name, " must have the dtype of x (", dtype_name(x.scalar_type()),
        "), found ", dtype_name(tensor.scalar_type()));
  const bool vector = rows < 0;
  const int64_t rank = vector ? 1 : 2;
  check(tensor.dim() == rank && (vector || tensor.size(0) == rows) && tensor.size(rank - 1) == columns, op, name,
        " must have shape [", vector ? "" : std::to_string(rows) + ", ", columns, "], found ", shape_of(tensor));
}

inline void check_linear(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  check_rank(op, "x", x, 2, "[total, in_features]");
  check_float_dtype(op, "x", x);
  check_rank(op, "weight", weight, 2, "[out_features, in_features]");
  check_linear_operand(op, "weight", weight, x, weight.size(0), x.size(1));
  if (bias.has_value()) check_linear_operand(op, "bias", *bias, x, -1, weight.size(0));
}

inline void check_linear_grad(const char* op, const Tensor& grad_out, const Tensor& x, const Tensor& weight) {
  check_linear_operand(op, "grad_out", grad_out, x, x.size(0), weight.size(0));
}

template <typename... Inputs>
Tensor call_aten(const char* name, const Inputs&... inputs) {
  std::array<StableIValue, sizeof...(Inputs)> stack{torch::stable::detail::from(inputs)...};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline Tensor compose_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return in_dtype_of(x, call_aten("aten::linear", x, weight, bias));
}

inline Tensor compose_linear_silu(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return call_aten("aten::silu_", compose_linear(x, weight, bias));
}

inline Tensor compose_linear_silu_backward(const Tensor& grad_out, const Tensor& x, const Tensor& weight,
                                           const std::optional<Tensor>& bias) {
  // The result has the strides of the gradient, which may come expanded or transposed.
  return call_aten("aten::silu_backward", torch::stable::contiguous(grad_out), compose_linear(x, weight, bias));
}

}  // namespace vista
