// What cached_cross_attn checks, the same on every device. The contents of q_offsets and slots are the business of the
// device that can read them.
#pragma once

#include "cache_rows.h"
#include "cross_attn.h"

namespace vista {

// Options of the op beside its tensors.
struct CachedOptions {
  int64_t tokens, kv_heads, d, e;
  RowLayout k_layout, v_layout;
  bool one_cache;  // the values are the keys
};

inline CachedOptions check_cached_cross_attn(const char* op, const Tensor& q, const Tensor& k_rows,
                                             const Tensor& v_rows, const Tensor& slots, const Tensor& q_offsets,
                                             int64_t tokens, int64_t kv_heads, const std::optional<Tensor>& self_k,
                                             const std::optional<Tensor>& self_v, std::optional<int64_t> value_dim,
                                             const std::string& scheme, std::optional<int64_t> group) {
  check_rows(op, "q", q);
  const int64_t d = q.size(2), e = value_dim.value_or(d);
  check(value_dim.value_or(16) >= 16 && value_dim.value_or(16) <= 256 && value_dim.value_or(16) % 8 == 0, op,
        "value_dim must be a multiple of 8 from 16 to 256, found ", e);
  check(kv_heads > 0 && q.size(1) % kv_heads == 0, op, "kv_heads must divide q's heads (", q.size(1), "), found ",
        kv_heads);
  CachedOptions options{tokens,
                        kv_heads,
                        d,
                        e,
                        layout_for(op, scheme, tokens, kv_heads * d, group),
                        layout_for(op, scheme, tokens, kv_heads * e, group),
                        false};
  check_rows(op, "k_rows", k_rows, options.k_layout);
  check_device(op, "k_rows", k_rows, q);
  check_rows(op, "v_rows", v_rows, options.v_layout);
  check_device(op, "v_rows", v_rows, q);
  check(k_rows.size(0) == v_rows.size(0), op, "v_rows must have as many slots as k_rows (", k_rows.size(0), "), found ",
        v_rows.size(0));
  options.one_cache =
      k_rows.const_data_ptr() == v_rows.const_data_ptr() && k_rows.strides().equals(v_rows.strides()) && d == e;
  check_indices(op, "slots", slots, q);
  check_indices(op, "q_offsets", q_offsets, q);
  check(q_offsets.size(0) == slots.size(0) + 1, op, "q_offsets must have one entry more than slots (", slots.size(0),
        "), found ", q_offsets.size(0));
  check(self_k.has_value() == self_v.has_value(), op, "self_k and self_v must be given together, found only ",
        self_k.has_value() ? "self_k" : "self_v");
  if (self_k.has_value()) {
    check_own_items(op, "self_k", *self_k, q, kv_heads, d);
    check_own_items(op, "self_v", *self_v, q, kv_heads, e);
  }
  return options;
}

}  // namespace vista
