#include "cached_cross_attn.h"

#include <algorithm>

#include "vista/cache_rows.h"
#include "vista/cross_attn.h"

namespace vista {
namespace {

using cpu::CrossAttnParams;
using cpu::QueryBlock;

std::tuple<Tensor, Tensor, Tensor> cached_cross_attn_cpu(Tensor q, Tensor k_rows, Tensor v_rows, Tensor slots,
                                                         Tensor q_offsets, int64_t max_q_len, int64_t tokens,
                                                         int64_t kv_heads, std::optional<Tensor> self_k,
                                                         std::optional<Tensor> self_v, std::optional<int64_t> value_dim,
                                                         std::string scheme, std::optional<int64_t> group,
                                                         std::string policy, std::optional<double> attn_scale) {
  const char* op = "cached_cross_attn";
  const CachedOptions options = check_cached_cross_attn(op, q, k_rows, v_rows, slots, q_offsets, tokens, kv_heads,
                                                        self_k, self_v, value_dim, scheme, group);
  const std::vector<int64_t> offsets = read_offsets(op, "q_offsets", q_offsets, q.size(0), "max_q_len", max_q_len);
  std::vector<int64_t> slot_of = read_indices(op, "slots", slots);
  const int64_t num_bad = mark_bad_slots(op, slot_of, k_rows.size(0), parse_policy(op, policy));
  q = torch::stable::contiguous(q);
  k_rows = torch::stable::contiguous(k_rows);
  v_rows = torch::stable::contiguous(v_rows);

  CrossAttnParams params{};
  params.dtype = kernel_dtype(q.scalar_type());
  params.q_heads = q.size(1);
  params.kv_heads = kv_heads;
  params.d = options.d;
  params.e = options.e;
  params.scale = score_scale(attn_scale, options.d);
  params.q = q.const_data_ptr();
  if (self_k.has_value()) {
    self_k = torch::stable::contiguous(*self_k);
    self_v = torch::stable::contiguous(*self_v);
    params.self_k = self_k->const_data_ptr();
    params.self_v = self_v->const_data_ptr();
  }
  std::vector<QueryBlock> runs;
  std::vector<int64_t> slot_of_run;
  for (size_t g = 0; g + 1 < offsets.size(); ++g)
    for (int64_t row = offsets[g]; row < offsets[g + 1]; row += cpu::kQueryRun) {
      runs.push_back({row, std::min(row + cpu::kQueryRun, offsets[g + 1]), 0, slot_of[g] < 0 ? 0 : tokens});
      slot_of_run.push_back(slot_of[g]);
    }
  params.query_runs = runs.data();

  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), options.e});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  if (offsets.back() < q.size(0)) {
    torch::stable::zero_(out);
    torch::stable::zero_(lse);
  }
  params.out = out.mutable_data_ptr();
  params.lse = mutable_floats(lse);

  const auto floats_for = [&](const RowLayout& layout) {
    const int64_t bytes = layout.tokens * layout.dim * static_cast<int64_t>(q.element_size());
    return (bytes + 63) / 64 * 16;
  };
  const int64_t keys_at = cpu::cross_attn_scratch_floats(options.d, options.e);
  const int64_t values_at = keys_at + floats_for(options.k_layout);
  const int64_t end_at = options.one_cache ? values_at : values_at + floats_for(options.v_layout);
  run_tasks(static_cast<int64_t>(runs.size()), end_at, [&](int64_t begin, int64_t end, float* scratch) {
    const auto dequantize = [&](const RowLayout& layout, const Tensor& rows, const int64_t& slot, float* to) {
      cpu::RowsParams reading{};
      reading.layout = layout;
      reading.dtype = params.dtype;
      reading.cache = static_cast<const uint8_t*>(rows.const_data_ptr());
      reading.slots = &slot;
      reading.out = to;
      cpu::cache_rows_kernels().dequantize(reading, 0, 1);
    };
    CrossAttnParams mine = params;
    mine.k = scratch + keys_at;
    mine.v = scratch + (options.one_cache ? keys_at : values_at);
    int64_t held = -1;  // the slot whose rows are in scratch
    for (int64_t i = begin; i < end; ++i) {
      const int64_t& slot = slot_of_run[i];
      if (slot >= 0 && slot != held) {
        dequantize(options.k_layout, k_rows, slot, scratch + keys_at);
        if (!options.one_cache) dequantize(options.v_layout, v_rows, slot, scratch + values_at);
        held = slot;
      }
      cpu::cross_attn_kernels().forward(mine, i * params.q_heads, (i + 1) * params.q_heads, scratch);
    }
  });
  return {out, lse, count_tensor(k_rows, num_bad)};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) { m.impl("cached_cross_attn", TORCH_BOX(&vista::cached_cross_attn_cpu)); }
