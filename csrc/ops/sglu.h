// What the ops of the feed-forward half check, the same on every device.
#pragma once

#include <optional>

#include "attention.h"

namespace vista {

inline void check_matrix(const char* op, const char* name, const Tensor& matrix, const Tensor& x, int64_t rows,
                         int64_t columns) {
  check_device(op, name, matrix, x);
  check(matrix.scalar_type() == x.scalar_type(), op, name, " must have the dtype of x (", dtype_name(x.scalar_type()),
        "), found ", dtype_name(matrix.scalar_type()));
  check(matrix.dim() == 2 && matrix.size(0) == rows && matrix.size(1) == columns, op, name, " must have shape [", rows,
        ", ", columns, "], found ", shape_of(matrix));
}

inline void check_sglu(const char* op, const Tensor& x, const Tensor& up, const Tensor& gate, const Tensor& down,
                       std::optional<double> norm_eps) {
  check_rank(op, "x", x, 2, "[total, dim]");
  check_float_dtype(op, "x", x);
  check(x.size(1) > 0, op, "x must have columns, found ", shape_of(x));
  check_rank(op, "up", up, 2, "[hidden, dim]");
  const int64_t dim = x.size(1), hidden = up.size(0);
  check_matrix(op, "up", up, x, hidden, dim);
  check(hidden > 0, op, "up must have rows, found ", shape_of(up));
  check_matrix(op, "gate", gate, x, hidden, dim);
  check_matrix(op, "down", down, x, dim, hidden);
  check(!norm_eps.has_value() || *norm_eps >= 0, op, "norm_eps must not be negative, found ", norm_eps.value_or(0));
}

inline void check_sglu_grad(const char* op, const Tensor& grad_out, const Tensor& x) {
  check_matrix(op, "grad_out", grad_out, x, x.size(0), x.size(1));
}

// Returns how wide the result is.
inline int64_t check_gated(const char* op, const Tensor& uv) {
  check_rank(op, "uv", uv, 2, "[total, 2 * hidden]");
  check_float_dtype(op, "uv", uv);
  check(uv.size(1) % 2 == 0, op, "uv must have an even number of columns, found ", shape_of(uv));
  return uv.size(1) / 2;
}

}  // namespace vista
