#include "vista/cross_attn.h"

#include <algorithm>
#include <numeric>

#include "cross_attn.h"

namespace vista {
namespace {

using cpu::CrossAttnParams;
using cpu::KeyBlock;
using cpu::QueryBlock;

// The arguments that forward and backward share, checked, made contiguous, and cut into blocks.
struct Inputs {
  CrossAttnParams params{};
  std::vector<int64_t> q_offsets, kv_offsets, group_kv;
  std::vector<QueryBlock> query_blocks, query_runs;
  std::vector<QueryBlock> long_queries;
  std::vector<KeyBlock> short_sequences, key_blocks;
  std::vector<int64_t> readers;
  bool padded_queries, padded_keys;

  Inputs(const char* op, Tensor& q, Tensor& k, Tensor& v, const Tensor& q_offsets_tensor,
         const Tensor& kv_offsets_tensor, int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor>& self_k,
         std::optional<Tensor>& self_v, const std::optional<Tensor>& kv_index, std::optional<double> attn_scale) {
    check_cross_attn(op, q, k, v, self_k, self_v);
    if (self_k.has_value()) {
      self_k = torch::stable::contiguous(*self_k);
      self_v = torch::stable::contiguous(*self_v);
      params.self_k = self_k->const_data_ptr();
      params.self_v = self_v->const_data_ptr();
    }
    q_offsets = read_offsets(op, "q_offsets", q_offsets_tensor, q.size(0), "max_q_len", max_q_len);
    kv_offsets = read_offsets(op, "kv_offsets", kv_offsets_tensor, k.size(0), "max_kv_len", max_kv_len);
    read_index(op, kv_index);
    q = torch::stable::contiguous(q);
    k = torch::stable::contiguous(k);
    v = torch::stable::contiguous(v);
    params.dtype = kernel_dtype(q.scalar_type());
    params.q_heads = q.size(1);
    params.kv_heads = k.size(1);
    params.d = q.size(2);
    params.e = v.size(2);
    params.scale = score_scale(attn_scale, q.size(2));
    params.q = q.const_data_ptr();
    params.k = k.const_data_ptr();
    params.v = v.const_data_ptr();
    padded_queries = q_offsets.back() < q.size(0);
    padded_keys = kv_offsets.back() < k.size(0);
    query_runs = cut_queries(cpu::kQueryRun);
    query_blocks = cut_queries(cpu::kQueryBlock);
    params.query_runs = query_runs.data();
    params.query_blocks = query_blocks.data();
  }

  // The inverse of kv_index: one owner per key block reads its queries in a fixed order, so nothing is added
  // atomically.
  void plan_keys() {
    const int64_t sequences = static_cast<int64_t>(kv_offsets.size()) - 1;
    std::vector<int64_t> sequence_of;
    for (size_t g = 0; g + 1 < q_offsets.size(); ++g)
      for (int64_t row = q_offsets[g]; row < q_offsets[g + 1]; row += cpu::kQueryBlock)
        sequence_of.push_back(group_kv[g]);
    std::vector<int64_t> first(sequences + 1, 0);
    for (int64_t sequence : sequence_of) ++first[sequence + 1];
    std::partial_sum(first.begin(), first.end(), first.begin());
    readers.resize(sequence_of.size());
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (size_t i = 0; i < sequence_of.size(); ++i) readers[next[sequence_of[i]]++] = static_cast<int64_t>(i);
    for (int64_t s = 0; s < sequences; ++s) {
      // By its own length alone: its gradients do not depend on what else is in the batch.
      if (kv_offsets[s + 1] - kv_offsets[s] <= cpu::kShortKeys) {
        short_sequences.push_back({kv_offsets[s], kv_offsets[s + 1], first[s], first[s + 1]});
        continue;
      }
      for (int64_t i = first[s]; i < first[s + 1]; ++i) long_queries.push_back(query_blocks[readers[i]]);
      for (int64_t row = kv_offsets[s]; row < kv_offsets[s + 1]; row += cpu::kKeyBlock)
        key_blocks.push_back({row, std::min(row + cpu::kKeyBlock, kv_offsets[s + 1]), first[s], first[s + 1]});
    }
    params.short_sequences = short_sequences.data();
    params.long_queries = long_queries.data();
    params.readers = readers.data();
    params.key_blocks = key_blocks.data();
  }

  using Kernel = void (*)(const CrossAttnParams&, int64_t, int64_t, float*);
  void run(Kernel kernel, int64_t tasks) const {
    run_tasks(tasks, cpu::cross_attn_scratch_floats(params.d, params.e),
              [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
  }

 private:
  std::vector<QueryBlock> cut_queries(int64_t length) const {
    std::vector<QueryBlock> parts;
    for (size_t g = 0; g + 1 < q_offsets.size(); ++g)
      for (int64_t row = q_offsets[g]; row < q_offsets[g + 1]; row += length)
        parts.push_back(
            {row, std::min(row + length, q_offsets[g + 1]), kv_offsets[group_kv[g]], kv_offsets[group_kv[g] + 1]});
    return parts;
  }

  void read_index(const char* op, const std::optional<Tensor>& kv_index) {
    const int64_t groups = static_cast<int64_t>(q_offsets.size()) - 1;
    const int64_t sequences = static_cast<int64_t>(kv_offsets.size()) - 1;
    check_kv_index(op, kv_index, groups, sequences);
    if (!kv_index.has_value()) {
      group_kv.resize(groups);
      std::iota(group_kv.begin(), group_kv.end(), 0);
      return;
    }
    group_kv = read_indices(op, "kv_index", *kv_index);
    for (int64_t g = 0; g < groups; ++g)
      check(group_kv[g] >= 0 && group_kv[g] < sequences, op, "kv_index must be in [0, ", sequences, "), found ",
            group_kv[g], " at index ", g);
  }
};

std::tuple<Tensor, Tensor> cross_attn_cpu(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets,
                                          int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor> self_k,
                                          std::optional<Tensor> self_v, std::optional<Tensor> kv_index,
                                          std::optional<double> attn_scale) {
  Inputs in("jagged_cross_attn", q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index,
            attn_scale);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  if (in.padded_queries) {
    torch::stable::zero_(out);
    torch::stable::zero_(lse);
  }
  in.params.out = out.mutable_data_ptr();
  in.params.lse = mutable_floats(lse);
  in.run(cpu::cross_attn_kernels().forward, static_cast<int64_t>(in.query_runs.size()) * in.params.q_heads);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_attn_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor q_offsets, Tensor kv_offsets, int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor> self_k,
    std::optional<Tensor> self_v, std::optional<Tensor> kv_index, std::optional<double> attn_scale) {
  const char* op = "jagged_cross_attn_backward";
  Inputs in(op, q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index, attn_scale);
  CrossAttnParams& params = in.params;
  check_cross_attn_grads(op, grad_out, grad_lse, q, v, out, lse);
  grad_out = torch::stable::contiguous(grad_out);
  out = torch::stable::contiguous(out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse.has_value()) {
    grad_lse = torch::stable::contiguous(*grad_lse);
    params.grad_lse = floats(*grad_lse);
  }
  Tensor delta = torch::stable::new_empty(lse, lse.sizes()), norm = torch::stable::new_empty(lse, lse.sizes());
  Tensor grad_q = rows_like(q, in.padded_queries);
  Tensor grad_k = rows_like(k, in.padded_keys), grad_v = rows_like(v, in.padded_keys);
  Tensor grad_self_k = own_gradient(q, self_k, params.kv_heads, params.d);
  Tensor grad_self_v = own_gradient(q, self_k, params.kv_heads, params.e);
  if (in.padded_queries) {
    torch::stable::zero_(grad_self_k);
    torch::stable::zero_(grad_self_v);
  }
  params.grad_out = grad_out.const_data_ptr();
  params.out = out.mutable_data_ptr();
  params.lse = mutable_floats(lse);
  params.delta = mutable_floats(delta);
  params.norm = mutable_floats(norm);
  params.grad_q = grad_q.mutable_data_ptr();
  params.grad_k = grad_k.mutable_data_ptr();
  params.grad_v = grad_v.mutable_data_ptr();
  params.grad_self_k = grad_self_k.mutable_data_ptr();
  params.grad_self_v = grad_self_v.mutable_data_ptr();
  in.plan_keys();
  const cpu::CrossAttnKernels& kernels = cpu::cross_attn_kernels();
  in.run(kernels.backward_short, static_cast<int64_t>(in.short_sequences.size()) * params.kv_heads);
  in.run(kernels.backward_queries, static_cast<int64_t>(in.long_queries.size()) * params.kv_heads);
  in.run(kernels.backward_keys, static_cast<int64_t>(in.key_blocks.size()) * params.kv_heads);
  return {grad_q, grad_k, grad_v, grad_self_k, grad_self_v};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("jagged_cross_attn", TORCH_BOX(&vista::cross_attn_cpu));
  m.impl("jagged_cross_attn_backward", TORCH_BOX(&vista::cross_attn_backward_cpu));
}
