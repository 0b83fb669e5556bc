// What products of rows check, the same on every device.
#pragma once

#include <optional>

#include "attention.h"

namespace vista {

inline void check_row_product(const char* op, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                              bool transposed) {
  check_rank(op, "x", x, 2, "[total, in_features]");
  check_float_dtype(op, "x", x);
  check_device(op, "weight", weight, x);
  check_rank(op, "weight", weight, 2, transposed ? "[in_features, out_features]" : "[out_features, in_features]");
  check(weight.scalar_type() == x.scalar_type(), op, "weight must have the dtype of x (", dtype_name(x.scalar_type()),
        "), found ", dtype_name(weight.scalar_type()));
  check(weight.size(transposed ? 0 : 1) == x.size(1), op, "weight must have the in_features of x (", x.size(1),
        "), found ", shape_of(weight));
  if (!bias.has_value()) return;
  const int64_t columns = weight.size(transposed ? 1 : 0);
  check_device(op, "bias", *bias, x);
  check(bias->scalar_type() == x.scalar_type() && bias->dim() == 1 && bias->size(0) == columns, op,
        "bias must have shape [", columns, "] in ", dtype_name(x.scalar_type()), ", found ", shape_of(*bias), " in ",
        dtype_name(bias->scalar_type()));
}

inline void check_outer_product(const char* op, const Tensor& a, const Tensor& b) {
  check_rank(op, "a", a, 2, "[total, left]");
  check_float_dtype(op, "a", a);
  check_device(op, "b", b, a);
  check_rank(op, "b", b, 2, "[total, right]");
  check(b.scalar_type() == a.scalar_type(), op, "b must have the dtype of a (", dtype_name(a.scalar_type()),
        "), found ", dtype_name(b.scalar_type()));
  check(b.size(0) == a.size(0), op, "b must have the rows of a (", a.size(0), "), found ", shape_of(b));
}

}  // namespace vista
