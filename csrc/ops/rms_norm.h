// What RMS norms and their gradients check, the same on every device.
#pragma once

#include "attention.h"

namespace vista {

inline void check_normed_rows(const char* op, const Tensor& x, double norm_eps) {
  check_rank(op, "x", x, 2, "[total, dim]");
  check_float_dtype(op, "x", x);
  check(x.size(1) > 0, op, "x must have at least one column, found shape ", shape_of(x));
  check(norm_eps >= 0, op, "norm_eps must not be negative, found ", norm_eps);
}

inline void check_grad_like(const char* op, const char* name, const Tensor& grad, const Tensor& x) {
  check_device(op, name, grad, x);
  check(grad.scalar_type() == x.scalar_type() && grad.dim() == 2 && grad.size(0) == x.size(0) &&
            grad.size(1) == x.size(1),
        op, name, " must be like x, ", shape_of(x), " in ", dtype_name(x.scalar_type()), ", found ", shape_of(grad),
        " in ", dtype_name(grad.scalar_type()));
}

inline void check_rms_norm(const char* op, const Tensor& grad_rows, const Tensor& x, double norm_eps) {
  check_normed_rows(op, x, norm_eps);
  check_grad_like(op, "grad_rows", grad_rows, x);
}

inline void check_weighted_rms_norm(const char* op, const Tensor& x, const Tensor& weight, double norm_eps) {
  check_normed_rows(op, x, norm_eps);
  check_device(op, "weight", weight, x);
  check(weight.scalar_type() == x.scalar_type() && weight.dim() == 1 && weight.size(0) == x.size(1), op,
        "weight must have shape [", x.size(1), "] in ", dtype_name(x.scalar_type()), ", found ", shape_of(weight),
        " in ", dtype_name(weight.scalar_type()));
}

}  // namespace vista
