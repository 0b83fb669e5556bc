#include "cache_rows.h"

#include <algorithm>
#include <numeric>

#include "vista/cache_rows.h"

namespace vista {
namespace {

// Negative slots give zeros.
void read_rows(const RowLayout& layout, const Tensor& cache, const std::vector<int64_t>& slots, Tensor& out) {
  cpu::RowsParams params{};
  params.layout = layout;
  params.dtype = kernel_dtype(out.scalar_type());
  params.cache = static_cast<const uint8_t*>(cache.const_data_ptr());
  params.slots = slots.data();
  params.out = out.mutable_data_ptr();
  params.stream = out.numel() * static_cast<int64_t>(out.element_size()) >= kStreamBytes;
  torch::stable::parallel_for(0, static_cast<int64_t>(slots.size()), 1, [&](int64_t begin, int64_t end) {
    cpu::cache_rows_kernels().dequantize(params, begin, end);
  });
}

struct Cpu {
  static void quantize(const char*, const RowLayout& layout, const Tensor& x, Tensor& rows) {
    cpu::RowsParams params{};
    params.layout = layout;
    params.dtype = kernel_dtype(x.scalar_type());
    params.x = x.const_data_ptr();
    params.rows = static_cast<uint8_t*>(rows.mutable_data_ptr());
    params.stream = rows.numel() >= kStreamBytes;
    run_tasks(x.size(0), cpu::kQuantizeGroups * layout.group, [&](int64_t begin, int64_t end, float* scratch) {
      cpu::cache_rows_kernels().quantize(params, begin, end, scratch);
    });
  }

  static void dequantize(const char*, const RowLayout& layout, const Tensor& rows, Tensor& out) {
    std::vector<int64_t> all(rows.size(0));
    std::iota(all.begin(), all.end(), 0);
    read_rows(layout, rows, all, out);
  }

  static Tensor gather(const char* op, const RowLayout& layout, const Tensor& cache, const Tensor& slots,
                       IndexPolicy policy, Tensor& out) {
    std::vector<int64_t> slot_of = read_indices(op, "slots", slots);
    const int64_t num_bad = mark_bad_slots(op, slot_of, cache.size(0), policy);
    read_rows(layout, cache, slot_of, out);
    return count_tensor(cache, num_bad);
  }

  static Tensor scatter(const char* op, Tensor& cache, const Tensor& slots, const Tensor& rows, IndexPolicy policy) {
    std::vector<int64_t> slot_of = read_indices(op, "slots", slots);
    const int64_t num_bad = mark_bad_slots(op, slot_of, cache.size(0), policy);
    std::vector<int64_t> writes;  // rows that are written, in the order of their slots
    writes.reserve(slot_of.size());
    for (size_t i = 0; i < slot_of.size(); ++i)
      if (slot_of[i] >= 0) writes.push_back(static_cast<int64_t>(i));
    // Of equal slots the last row stays: a later row comes first, and the others of its slot are dropped.
    std::sort(writes.begin(), writes.end(),
              [&](int64_t a, int64_t b) { return slot_of[a] != slot_of[b] ? slot_of[a] < slot_of[b] : a > b; });
    const auto same_slot = [&](int64_t a, int64_t b) { return slot_of[a] == slot_of[b]; };
    writes.erase(std::unique(writes.begin(), writes.end(), same_slot), writes.end());

    const cpu::ScatterParams params{static_cast<uint8_t*>(cache.mutable_data_ptr()),
                                    static_cast<const uint8_t*>(rows.const_data_ptr()), slot_of.data(), writes.data(),
                                    cache.size(1)};
    torch::stable::parallel_for(0, static_cast<int64_t>(writes.size()), 64,
                                [&](int64_t begin, int64_t end) { cpu::scatter_rows(params, begin, end); });
    return count_tensor(cache, num_bad);
  }
};

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) { vista::CacheRowOps<vista::Cpu>::implement(m); }
