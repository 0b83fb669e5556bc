// What the cross attention ops check and allocate, the same on every device. The contents of offsets and kv_index are
// the business of the device that can read them (cross_attn.cpp, cross_attn_cuda.cpp).
#pragma once

#include <cmath>
#include <optional>

#include "attention.h"

namespace vista {

inline void check_own_items(const char* op, const char* name, const Tensor& rows, const Tensor& q, int64_t heads,
                            int64_t dim) {
  check_rows(op, name, rows);
  check_device(op, name, rows, q);
  check(rows.scalar_type() == q.scalar_type(), op, name, " must have the dtype of q (", dtype_name(q.scalar_type()),
        "), found ", dtype_name(rows.scalar_type()));
  check(rows.size(0) == q.size(0) && rows.size(1) == heads && rows.size(2) == dim, op, name, " must have shape [",
        q.size(0), ", ", heads, ", ", dim, "], found ", shape_of(rows));
}

// The rows that forward and backward share.
inline void check_cross_attn(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                             const std::optional<Tensor>& self_k, const std::optional<Tensor>& self_v) {
  check_rows(op, "q", q);
  check_rows(op, "k", k);
  check_device(op, "k", k, q);
  check_rows(op, "v", v);
  const int64_t d = q.size(2), e = v.size(2), q_heads = q.size(1), kv_heads = k.size(1);
  check(k.scalar_type() == q.scalar_type(), op, "k must have the dtype of q (", dtype_name(q.scalar_type()),
        "), found ", dtype_name(k.scalar_type()));
  check(k.size(2) == d, op, "k must have q's head dim (", d, "), found ", k.size(2));
  check(kv_heads > 0 && q_heads % kv_heads == 0, op, "k's heads must divide q's heads (", q_heads, "), found ",
        kv_heads);
  check_like(op, "v", v, "k", k, e);
  check(self_k.has_value() == self_v.has_value(), op, "self_k and self_v must be given together, found only ",
        self_k.has_value() ? "self_k" : "self_v");
  if (!self_k.has_value()) return;
  check_own_items(op, "self_k", *self_k, q, kv_heads, d);
  check_own_items(op, "self_v", *self_v, q, kv_heads, e);
}

// One entry per query group, where it is given; else as many groups as sequences.
inline void check_kv_index(const char* op, const std::optional<Tensor>& kv_index, int64_t groups, int64_t sequences) {
  if (!kv_index.has_value())
    check(groups == sequences, op, "kv_index is needed where q_offsets (", groups, " groups) and kv_offsets (",
          sequences, " sequences) differ in number, found none");
  else
    check(kv_index->dim() != 1 || kv_index->size(0) == groups, op, "kv_index must have one entry per query group (",
          groups, "), found ", kv_index->size(0));
}

inline void check_lse(const char* op, const char* name, const Tensor& rows, const Tensor& q) {
  check_device(op, name, rows, q);
  check_rank(op, name, rows, 2, "[total_q, heads]");
  check_dtype(op, name, rows, ScalarType::Float);
  check(rows.size(0) == q.size(0) && rows.size(1) == q.size(1), op, name, " must have shape [", q.size(0), ", ",
        q.size(1), "], found ", shape_of(rows));
}

// What only the backward reads.
inline void check_cross_attn_grads(const char* op, const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                   const Tensor& q, const Tensor& v, const Tensor& out, const Tensor& lse) {
  check_like(op, "grad_out", grad_out, "q", q, v.size(2));
  check_like(op, "out", out, "q", q, v.size(2));
  check_lse(op, "lse", lse, q);
  if (grad_lse.has_value()) check_lse(op, "grad_lse", *grad_lse, q);
}

inline float score_scale(std::optional<double> attn_scale, int64_t d) {
  return static_cast<float>(attn_scale.value_or(1.0 / std::sqrt(static_cast<double>(d))));
}

// Gradients of own items: without them no rows.
inline Tensor own_gradient(const Tensor& q, const std::optional<Tensor>& own, int64_t kv_heads, int64_t dim) {
  return torch::stable::new_empty(q, {own.has_value() ? q.size(0) : 0, kv_heads, dim});
}

}  // namespace vista
