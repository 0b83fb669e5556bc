#include "vista/cache_rows.h"

#include <algorithm>

#include "attention.h"

namespace vista {
namespace {

Tensor count_tensor(const Tensor& like, int64_t value) {
  Tensor count = torch::stable::new_empty(like, {}, ScalarType::Long);
  *static_cast<int64_t*>(count.mutable_data_ptr()) = value;
  return count;
}

void check_cache(const char* op, const Tensor& cache) {
  check_rank(op, "cache", cache, 2, "[num_slots, row_bytes]");
  check_dtype(op, "cache", cache, ScalarType::Byte);
}

RowLayout layout_for(const char* op, const std::string& scheme, int64_t tokens, int64_t dim,
                     std::optional<int64_t> group) {
  try {
    check(!group.has_value() || *group > 0, op, "group must be positive, found ", group.value_or(0));
    return make_row_layout(parse_row_scheme(scheme), tokens, dim, group.value_or(0));
  } catch (const std::invalid_argument& error) {
    fail(op, error.what());
  }
}

void run_rows(const cpu::RowsParams& params, int64_t users,
              void (*kernel)(const cpu::RowsParams&, int64_t, int64_t, float*)) {
  run_tasks(users, params.layout.dim,
            [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
}

Tensor quantize_rows_cpu(Tensor x, std::string scheme, std::optional<int64_t> group) {
  const char* op = "quantize_rows";
  check_cpu(op, "x", x);
  check_rank(op, "x", x, 3, "[n, tokens, dim]");
  check_float_dtype(op, "x", x);
  cpu::RowsParams params{};
  params.layout = layout_for(op, scheme, x.size(1), x.size(2), group);
  params.dtype = kernel_dtype(x.scalar_type());
  x = torch::stable::contiguous(x);
  Tensor rows = torch::stable::new_empty(x, {x.size(0), params.layout.row_bytes}, ScalarType::Byte);
  params.x = x.const_data_ptr();
  params.rows = static_cast<uint8_t*>(rows.mutable_data_ptr());
  run_rows(params, x.size(0), cpu::cache_rows_kernels().quantize);
  return rows;
}

// Rows of this layout; before anything of its size is allocated.
void check_rows(const char* op, const char* name, const Tensor& rows, const RowLayout& layout) {
  check_rank(op, name, rows, 2, "[n, row_bytes]");
  check_cpu(op, name, rows);
  check_dtype(op, name, rows, ScalarType::Byte);
  check(rows.size(1) == layout.row_bytes, op, name, " must have row_bytes ", layout.row_bytes, " for ",
        row_scheme_name(layout.scheme), " of ", layout.tokens, " x ", layout.dim, ", found ", rows.size(1));
}

// Reads `cache` at `slots` into `out`; the number of slots out of range.
int64_t gather(const char* op, const Tensor& cache, const std::vector<int64_t>& wanted, const RowLayout& layout,
               IndexPolicy policy, Tensor& out) {
  std::vector<int64_t> slots = wanted;
  int64_t num_bad = 0;
  for (size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= 0 && slots[i] < cache.size(0)) continue;
    check(policy != IndexPolicy::kRaise, op, "slots must be in [0, ", cache.size(0), "), found ", slots[i],
          " at index ", i);
    slots[i] = -1;
    ++num_bad;
  }
  const Tensor packed = torch::stable::contiguous(cache);
  cpu::RowsParams params{};
  params.layout = layout;
  params.dtype = kernel_dtype(out.scalar_type());
  params.cache = static_cast<const uint8_t*>(packed.const_data_ptr());
  params.slots = slots.data();
  params.out = out.mutable_data_ptr();
  run_rows(params, static_cast<int64_t>(slots.size()), cpu::cache_rows_kernels().dequantize);
  return num_bad;
}

Tensor new_summaries(const char* op, const Tensor& like, int64_t n, const RowLayout& layout, ScalarType dtype) {
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op,
        "dtype must be float32, bfloat16 or float16, found ", dtype_name(dtype));
  return torch::stable::new_empty(like, {n, layout.tokens, layout.dim}, dtype);
}

Tensor dequantize_rows_cpu(Tensor rows, int64_t tokens, int64_t dim, std::string scheme, std::optional<int64_t> group,
                           ScalarType dtype) {
  const char* op = "dequantize_rows";
  const RowLayout layout = layout_for(op, scheme, tokens, dim, group);
  check_rows(op, "rows", rows, layout);
  std::vector<int64_t> all(rows.size(0));
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<int64_t>(i);
  Tensor out = new_summaries(op, rows, rows.size(0), layout, dtype);
  gather(op, rows, all, layout, IndexPolicy::kRaise, out);
  return out;
}

std::tuple<Tensor, Tensor> cache_gather_cpu(Tensor cache, Tensor slots, int64_t tokens, int64_t dim, std::string scheme,
                                            std::optional<int64_t> group, ScalarType dtype, std::string policy) {
  const char* op = "cache_gather";
  const RowLayout layout = layout_for(op, scheme, tokens, dim, group);
  check_rows(op, "cache", cache, layout);
  const std::vector<int64_t> wanted = read_indices(op, "slots", slots);
  Tensor out = new_summaries(op, cache, static_cast<int64_t>(wanted.size()), layout, dtype);
  const int64_t num_bad = gather(op, cache, wanted, layout, parse_policy(op, policy), out);
  return {out, count_tensor(cache, num_bad)};
}

Tensor cache_gather_out_cpu(Tensor cache, Tensor slots, int64_t tokens, int64_t dim, std::string scheme,
                            std::optional<int64_t> group, std::string policy, Tensor out) {
  const char* op = "cache_gather";
  const RowLayout layout = layout_for(op, scheme, tokens, dim, group);
  check_rows(op, "cache", cache, layout);
  const std::vector<int64_t> wanted = read_indices(op, "slots", slots);
  check_cpu(op, "out", out);
  check_float_dtype(op, "out", out);
  check_contiguous(op, "out", out);
  const int64_t n = static_cast<int64_t>(wanted.size());
  check(out.dim() == 3 && out.size(0) == n && out.size(1) == tokens && out.size(2) == dim, op, "out must have shape [",
        n, ", ", tokens, ", ", dim, "], found ", shape_of(out));
  return count_tensor(cache, gather(op, cache, wanted, layout, parse_policy(op, policy), out));
}

Tensor cache_scatter_cpu(Tensor cache, Tensor slots, Tensor rows, std::string policy_name) {
  const char* op = "cache_scatter_";
  const IndexPolicy policy = parse_policy(op, policy_name);
  check_cache(op, cache);
  check_contiguous(op, "cache", cache);
  check_cpu(op, "rows", rows);
  check_rank(op, "rows", rows, 2, "[n, row_bytes]");
  check_dtype(op, "rows", rows, ScalarType::Byte);
  check(rows.size(1) == cache.size(1), op, "rows must have the cache's row_bytes (", cache.size(1), "), found ",
        rows.size(1));
  const std::vector<int64_t> slot_of = read_indices(op, "slots", slots);
  check(static_cast<int64_t>(slot_of.size()) == rows.size(0), op, "slots must have one entry per row (", rows.size(0),
        "), found ", slot_of.size());

  const int64_t num_slots = cache.size(0);
  std::vector<int64_t> writes;  // rows that are written, in the order of their slots
  writes.reserve(slot_of.size());
  for (size_t i = 0; i < slot_of.size(); ++i) {
    if (slot_of[i] >= 0 && slot_of[i] < num_slots) {
      writes.push_back(static_cast<int64_t>(i));
    } else {
      check(policy != IndexPolicy::kRaise, op, "slots must be in [0, ", num_slots, "), found ", slot_of[i],
            " at index ", i);
    }
  }
  const int64_t num_bad = static_cast<int64_t>(slot_of.size() - writes.size());
  // Of equal slots the last row stays: a later row comes first, and the others of its slot are dropped.
  std::sort(writes.begin(), writes.end(),
            [&](int64_t a, int64_t b) { return slot_of[a] != slot_of[b] ? slot_of[a] < slot_of[b] : a > b; });
  const auto same_slot = [&](int64_t a, int64_t b) { return slot_of[a] == slot_of[b]; };
  writes.erase(std::unique(writes.begin(), writes.end(), same_slot), writes.end());

  const Tensor packed = torch::stable::contiguous(rows);
  const cpu::ScatterParams params{static_cast<uint8_t*>(cache.mutable_data_ptr()),
                                  static_cast<const uint8_t*>(packed.const_data_ptr()), slot_of.data(), writes.data(),
                                  cache.size(1)};
  torch::stable::parallel_for(0, static_cast<int64_t>(writes.size()), 64,
                              [&](int64_t begin, int64_t end) { cpu::scatter_rows(params, begin, end); });
  return count_tensor(cache, num_bad);
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("quantize_rows", TORCH_BOX(&vista::quantize_rows_cpu));
  m.impl("dequantize_rows", TORCH_BOX(&vista::dequantize_rows_cpu));
  m.impl("cache_gather", TORCH_BOX(&vista::cache_gather_cpu));
  m.impl("cache_gather.out", TORCH_BOX(&vista::cache_gather_out_cpu));
  m.impl("cache_scatter_", TORCH_BOX(&vista::cache_scatter_cpu));
}
