// The cache row ops of every device: what is valid and what shape comes out. A Device has the work itself:
//
//   static void quantize(const char* op, const RowLayout&, const Tensor& x, Tensor& rows);
//   static void dequantize(const char* op, const RowLayout&, const Tensor& rows, Tensor& out);
//   // These return how many slots were out of range, an int64 scalar.
//   static Tensor gather(const char* op, const RowLayout&, const Tensor& cache, Tensor slots, IndexPolicy, Tensor&
//   out); static Tensor scatter(const char* op, Tensor& cache, Tensor slots, const Tensor& rows, IndexPolicy);
//
// Tensors arrive checked and, but for slots, contiguous.
#pragma once

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "attention.h"
#include "vista/row_layout.h"

namespace vista {

inline RowLayout layout_for(const char* op, const std::string& scheme, int64_t tokens, int64_t dim,
                            std::optional<int64_t> group) {
  try {
    check(!group.has_value() || *group > 0, op, "group must be positive, found ", group.value_or(0));
    return make_row_layout(parse_row_scheme(scheme), tokens, dim, group.value_or(0));
  } catch (const std::invalid_argument& error) {
    fail(op, error.what());
  }
}

inline void check_rows(const char* op, const char* name, const Tensor& rows, const char* shape) {
  check_rank(op, name, rows, 2, shape);
  check_dtype(op, name, rows, ScalarType::Byte);
}

// Rows of this layout; before anything of its size is allocated.
inline void check_rows(const char* op, const char* name, const Tensor& rows, const RowLayout& layout) {
  check_rows(op, name, rows, "[n, row_bytes]");
  check(rows.size(1) == layout.row_bytes, op, name, " must have row_bytes ", layout.row_bytes, " for ",
        row_scheme_name(layout.scheme), " of ", layout.tokens, " x ", layout.dim, ", found ", rows.size(1));
}

inline Tensor new_summaries(const char* op, const Tensor& like, int64_t n, const RowLayout& layout, ScalarType dtype) {
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
        "dtype must be float32, bfloat16 or float16, found ", dtype_name(dtype));
  return torch::stable::new_empty(like, {n, layout.tokens, layout.dim}, dtype);
}

// Of slots on the host: marks those out of range by -1; how many there were.
inline int64_t mark_bad_slots(const char* op, std::vector<int64_t>& slots, int64_t num_slots, IndexPolicy policy) {
  int64_t num_bad = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= 0 && slots[i] < num_slots) continue;
    check(policy != IndexPolicy::kRaise, op, "slots must be in [0, ", num_slots, "), found ", slots[i], " at index ",
          i);
    slots[i] = -1;
    ++num_bad;
  }
  return num_bad;
}

// On the host.
inline Tensor count_tensor(const Tensor& like, int64_t value) {
  Tensor count = torch::stable::new_empty(like, {}, ScalarType::Long);
  *static_cast<int64_t*>(count.mutable_data_ptr()) = value;
  return count;
}

template <typename Device>
struct CacheRowOps {
  static Tensor quantize_rows(Tensor x, std::string scheme, std::optional<int64_t> group) {
    const char* op = "quantize_rows";
    check_rank(op, "x", x, 3, "[n, tokens, dim]");
    check_float_dtype(op, "x", x);
    const RowLayout layout = layout_for(op, scheme, x.size(1), x.size(2), group);
    Tensor rows = torch::stable::new_empty(x, {x.size(0), layout.row_bytes}, ScalarType::Byte);
    Device::quantize(op, layout, torch::stable::contiguous(x), rows);
    return rows;
  }

  static Tensor dequantize_rows(Tensor rows, int64_t tokens, int64_t dim, std::string scheme,
                                std::optional<int64_t> group, ScalarType dtype) {
    const char* op = "dequantize_rows";
    const RowLayout layout = layout_for(op, scheme, tokens, dim, group);
    check_rows(op, "rows", rows, layout);
    Tensor out = new_summaries(op, rows, rows.size(0), layout, dtype);
    Device::dequantize(op, layout, torch::stable::contiguous(rows), out);
    return out;
  }

  static std::tuple<Tensor, Tensor> cache_gather(Tensor cache, Tensor slots, int64_t tokens, int64_t dim,
                                                 std::string scheme, std::optional<int64_t> group, ScalarType dtype,
                                                 std::string policy) {
    const char* op = "cache_gather";
    const RowLayout layout = layout_for(op, scheme, tokens, dim, group);
    check_rows(op, "cache", cache, layout);
    check_indices(op, "slots", slots, cache);
    Tensor out = new_summaries(op, cache, slots.size(0), layout, dtype);
    const Tensor packed = torch::stable::contiguous(cache);
    Tensor num_bad = Device::gather(op, layout, packed, slots, parse_policy(op, policy), out);
    return {out, num_bad};
  }

  static Tensor cache_gather_out(Tensor cache, Tensor slots, int64_t tokens, int64_t dim, std::string scheme,
                                 std::optional<int64_t> group, std::string policy, Tensor out) {
    const char* op = "cache_gather";
    const RowLayout layout = layout_for(op, scheme, tokens, dim, group);
    check_rows(op, "cache", cache, layout);
    check_indices(op, "slots", slots, cache);
    check_device(op, "out", out, cache);
    check_float_dtype(op, "out", out);
    check_contiguous(op, "out", out);
    const int64_t n = slots.size(0);
    check(out.dim() == 3 && out.size(0) == n && out.size(1) == tokens && out.size(2) == dim, op,
          "out must have shape [", n, ", ", tokens, ", ", dim, "], found ", shape_of(out));
    return Device::gather(op, layout, torch::stable::contiguous(cache), slots, parse_policy(op, policy), out);
  }

  static Tensor cache_scatter(Tensor cache, Tensor slots, Tensor rows, std::string policy_name) {
    const char* op = "cache_scatter_";
    const IndexPolicy policy = parse_policy(op, policy_name);
    check_rows(op, "cache", cache, "[num_slots, row_bytes]");
    check_contiguous(op, "cache", cache);
    check_rows(op, "rows", rows, "[n, row_bytes]");
    check_device(op, "rows", rows, cache);
    check(rows.size(1) == cache.size(1), op, "rows must have the cache's row_bytes (", cache.size(1), "), found ",
          rows.size(1));
    check_indices(op, "slots", slots, cache);
    check(slots.size(0) == rows.size(0), op, "slots must have one entry per row (", rows.size(0), "), found ",
          slots.size(0));
    return Device::scatter(op, cache, slots, torch::stable::contiguous(rows), policy);
  }

  static void implement(torch::stable::detail::StableLibrary& m) {
    m.impl("quantize_rows", TORCH_BOX(&CacheRowOps::quantize_rows));
    m.impl("dequantize_rows", TORCH_BOX(&CacheRowOps::dequantize_rows));
    m.impl("cache_gather", TORCH_BOX(&CacheRowOps::cache_gather));
    m.impl("cache_gather.out", TORCH_BOX(&CacheRowOps::cache_gather_out));
    m.impl("cache_scatter_", TORCH_BOX(&CacheRowOps::cache_scatter));
  }
};

}  // namespace vista
