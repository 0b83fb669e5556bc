#include "vista/cache_rows.h"

#include "checks.h"

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
  std::vector<int64_t> source(num_slots, -1);
  int64_t num_bad = 0;
  for (size_t i = 0; i < slot_of.size(); ++i) {
    if (slot_of[i] >= 0 && slot_of[i] < num_slots) {
      source[slot_of[i]] = static_cast<int64_t>(i);  // of equal slots the last row stays
    } else {
      check(policy != IndexPolicy::kRaise, op, "slots must be in [0, ", num_slots, "), found ", slot_of[i],
            " at index ", i);
      ++num_bad;
    }
  }

  const Tensor packed = torch::stable::contiguous(rows);
  const cpu::ScatterParams params{static_cast<uint8_t*>(cache.mutable_data_ptr()),
                                  static_cast<const uint8_t*>(packed.const_data_ptr()), source.data(), num_slots,
                                  cache.size(1)};
  torch::stable::parallel_for(0, num_slots, 64,
                              [&](int64_t begin, int64_t end) { cpu::scatter_rows(params, begin, end); });
  return count_tensor(cache, num_bad);
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) { m.impl("cache_scatter_", TORCH_BOX(&vista::cache_scatter_cpu)); }
