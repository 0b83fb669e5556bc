// What the backward pass of an RMS norm checks, the same on every device.
#pragma once

#include "attention.h"

namespace vista {

inline void check_rms_norm(const char* op, const Tensor& grad_rows, const Tensor& x, double norm_eps) {
  check_rank(op, "x", x, 2, "[total, dim]");
  check_float_dtype(op, "x", x);
  check(x.size(1) > 0, op, "x must have at least one column, found shape ", shape_of(x));
  check_device(op, "grad_rows", grad_rows, x);
  check(grad_rows.scalar_type() == x.scalar_type() && grad_rows.dim() == 2 && grad_rows.size(0) == x.size(0) &&
            grad_rows.size(1) == x.size(1),
        op, "grad_rows must be like x, ", shape_of(x), " in ", dtype_name(x.scalar_type()), ", found ",
        shape_of(grad_rows), " in ", dtype_name(grad_rows.scalar_type()));
  check(norm_eps >= 0, op, "norm_eps must not be negative, found ", norm_eps);
}

}  // namespace vista
