// The projected QLA ops: what they check, the same on every device, and their composition out of torch's products and
// the QLA ops, which is all there is on the CPU and what CUDA falls back on.
#pragma once

#include <torch/csrc/stable/device.h>

#include <algorithm>
#include <array>
#include <string>
#include <tuple>

#include "qla.h"

namespace vista {

inline void check_projected_rows(const char* op, const Tensor& x) {
  check_rank(op, "x", x, 2, "[total, dim]");
  check_float_dtype(op, "x", x);
  check(x.size(1) > 0, op, "x must have at least one column, found shape ", shape_of(x));
}

inline void check_heads(const char* op, int64_t heads) {
  check(heads >= 1, op, "heads must be at least 1, found ", heads);
}

inline void check_eps(const char* op, std::optional<double> norm_eps) {
  check(!norm_eps.has_value() || *norm_eps >= 0, op, "norm_eps must not be negative, found ", norm_eps.value_or(0));
}

// Returns the head dim of the rows that the weight makes of x.
inline int64_t check_weight(const char* op, const char* name, const Tensor& weight, const Tensor& x, int64_t heads) {
  check_device(op, name, weight, x);
  check_rank(op, name, weight, 2, "[heads * head_dim, dim]");
  check(weight.scalar_type() == x.scalar_type(), op, name, " must have the dtype of x (", dtype_name(x.scalar_type()),
        "), found ", dtype_name(weight.scalar_type()));
  check(weight.size(1) == x.size(1), op, name, " must have the columns of x (", x.size(1), "), found ",
        shape_of(weight));
  check(weight.size(0) % heads == 0, op, name, " must have as many rows for each of the ", heads, " heads, found ",
        shape_of(weight));
  check_head_dim(op, name, weight.size(0) / heads);
  return weight.size(0) / heads;
}

struct HeadDims {
  int64_t d, e;
};

// What the state and its backward share.
inline HeadDims check_projected_state(const char* op, const Tensor& x, const Tensor& weight_k, const Tensor& weight_v,
                                      int64_t heads, std::optional<double> norm_eps) {
  check_projected_rows(op, x);
  check_heads(op, heads);
  check_eps(op, norm_eps);
  const int64_t d = check_weight(op, "weight_k", weight_k, x, heads);
  return {d, check_weight(op, "weight_v", weight_v, x, heads)};
}

// As check_state of qla.h, for rows that are not there.
inline void check_projected_states(const char* op, const char* name, const Tensor& state, int64_t batch, int64_t heads,
                                   HeadDims dims, const Tensor& like) {
  check_device(op, name, state, like);
  check_dtype(op, name, state, ScalarType::Float);
  check(state.dim() == 4 && state.size(0) == batch && state.size(1) == heads && state.size(2) == dims.d &&
            state.size(3) == dims.e,
        op, name, " must have shape [", batch, ", ", heads, ", ", dims.d, ", ", dims.e, "], found ", shape_of(state));
}

inline int64_t batch_of(const Tensor& seq_offsets) { return std::max<int64_t>(0, seq_offsets.numel() - 1); }

// What the apply and its backward share. `state` says how many heads there are.
inline HeadDims check_projected_apply(const char* op, const Tensor& x, const Tensor& weight_q, const Tensor& state,
                                      const Tensor& attn_scale, const Tensor& seq_offsets,
                                      std::optional<double> norm_eps, const std::string& activation,
                                      const std::string& state_activation) {
  check_projected_rows(op, x);
  check_eps(op, norm_eps);
  parse_activation(op, "activation", activation);
  parse_activation(op, "state_activation", state_activation);
  check_rank(op, "state", state, 4, "[batch, heads, d, e]");
  check_heads(op, state.size(1));
  const HeadDims dims{check_weight(op, "weight_q", weight_q, x, state.size(1)), state.size(3)};
  check_head_dim(op, "state", dims.e);
  check_projected_states(op, "state", state, batch_of(seq_offsets), state.size(1), dims, x);
  check_scale(op, attn_scale, batch_of(seq_offsets), x);
  return dims;
}

inline void check_grad_rows(const char* op, const Tensor& grad_out, const Tensor& x, int64_t heads, int64_t e) {
  check_device(op, "grad_out", grad_out, x);
  check(grad_out.scalar_type() == x.scalar_type(), op, "grad_out must have the dtype of x (",
        dtype_name(x.scalar_type()), "), found ", dtype_name(grad_out.scalar_type()));
  check(grad_out.dim() == 3 && grad_out.size(0) == x.size(0) && grad_out.size(1) == heads && grad_out.size(2) == e, op,
        "grad_out must have shape [", x.size(0), ", ", heads, ", ", e, "], found ", shape_of(grad_out));
}

// Rows that share offsets, and their projections.
class ProjectedRows {
 public:
  ProjectedRows(const Tensor& x, int64_t heads, std::optional<double> norm_eps) : x_(x), heads_(heads) {
    if (!norm_eps.has_value()) return;
    const Tensor wide = torch::stable::to(x_, ScalarType::Float);
    const std::array<int64_t, 1> columns{1};
    const Tensor squares = torch::stable::sum(mul(wide, wide), columns, true);
    const Tensor count =
        torch::stable::full({1}, 1. / static_cast<double>(x.size(1)), ScalarType::Float, std::nullopt, x.device());
    const Tensor eps = torch::stable::full({1}, *norm_eps, ScalarType::Float, std::nullopt, x.device());
    std::array<StableIValue, 1> stack{
        torch::stable::detail::from(torch::stable::subtract(mul(squares, count), eps, -1.))};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::rsqrt", "", stack.data(), TORCH_ABI_VERSION));
    factors_ = torch::stable::detail::to<Tensor>(stack[0]);
  }

  // x weight^T, normalised: [total, heads, head_dim]
  Tensor project(const Tensor& weight) const {
    const Tensor rows = times_factors(torch::stable::matmul(x_, torch::stable::transpose(weight, 0, 1)));
    return torch::stable::view(rows, {x_.size(0), heads_, weight.size(0) / heads_});
  }

  // Gradients of rows of projections, times what the norm divides x by: [total, heads * head_dim]
  Tensor scaled(const Tensor& grad) const {
    return times_factors(torch::stable::view(grad, {x_.size(0), heads_ * grad.size(2)}));
  }

 private:
  Tensor times_factors(const Tensor& rows) const {
    return in_dtype_of(x_, factors_.has_value() ? mul(rows, *factors_) : rows);
  }

  static Tensor mul(const Tensor& a, const Tensor& b) {
    std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
  }

  Tensor x_;
  int64_t heads_;
  std::optional<Tensor> factors_;
};

}  // namespace vista
