#include "vista/cross_attn.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "attention.h"

namespace vista {
namespace {

using cpu::CrossAttnParams;
using cpu::KeyBlock;
using cpu::QueryBlock;

// The arguments that forward and backward share, checked, made contiguous, and cut into blocks.
struct Inputs {
  CrossAttnParams params{};
  std::vector<int64_t> q_offsets, kv_offsets, group_kv;
  std::vector<QueryBlock> query_blocks;
  std::vector<KeyBlock> key_blocks;
  std::vector<int64_t> readers;
  bool padded_queries, padded_keys;

  Inputs(const char* op, Tensor& q, Tensor& k, Tensor& v, const Tensor& q_offsets_tensor,
         const Tensor& kv_offsets_tensor, int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor>& self_k,
         std::optional<Tensor>& self_v, const std::optional<Tensor>& kv_index, std::optional<double> attn_scale) {
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
    if (self_k.has_value()) {
      check_own(op, "self_k", *self_k, q, kv_heads, d);
      check_own(op, "self_v", *self_v, q, kv_heads, e);
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
    params.q_heads = q_heads;
    params.kv_heads = kv_heads;
    params.d = d;
    params.e = e;
    params.scale = static_cast<float>(attn_scale.value_or(1.0 / std::sqrt(static_cast<double>(d))));
    params.q = q.const_data_ptr();
    params.k = k.const_data_ptr();
    params.v = v.const_data_ptr();
    padded_queries = q_offsets.back() < q.size(0);
    padded_keys = kv_offsets.back() < k.size(0);
    for (size_t g = 0; g + 1 < q_offsets.size(); ++g)
      for (int64_t row = q_offsets[g]; row < q_offsets[g + 1]; row += cpu::kQueryBlock)
        query_blocks.push_back({row, std::min(row + cpu::kQueryBlock, q_offsets[g + 1]), kv_offsets[group_kv[g]],
                                kv_offsets[group_kv[g] + 1]});
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
    for (int64_t s = 0; s < sequences; ++s)
      for (int64_t row = kv_offsets[s]; row < kv_offsets[s + 1]; row += cpu::kKeyBlock)
        key_blocks.push_back({row, std::min(row + cpu::kKeyBlock, kv_offsets[s + 1]), first[s], first[s + 1]});
    params.readers = readers.data();
    params.key_blocks = key_blocks.data();
  }

  using Kernel = void (*)(const CrossAttnParams&, int64_t, int64_t, float*);
  void run(Kernel kernel, int64_t tasks) const {
    run_tasks(tasks, cpu::cross_attn_scratch_floats(params.d, params.e),
              [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
  }

 private:
  static void check_own(const char* op, const char* name, const Tensor& rows, const Tensor& q, int64_t heads,
                        int64_t dim) {
    check_rows(op, name, rows);
    check_device(op, name, rows, q);
    check(rows.scalar_type() == q.scalar_type(), op, name, " must have the dtype of q (", dtype_name(q.scalar_type()),
          "), found ", dtype_name(rows.scalar_type()));
    check(rows.size(0) == q.size(0) && rows.size(1) == heads && rows.size(2) == dim, op, name, " must have shape [",
          q.size(0), ", ", heads, ", ", dim, "], found ", shape_of(rows));
  }

  void read_index(const char* op, const std::optional<Tensor>& kv_index) {
    const int64_t groups = static_cast<int64_t>(q_offsets.size()) - 1;
    const int64_t sequences = static_cast<int64_t>(kv_offsets.size()) - 1;
    if (!kv_index.has_value()) {
      check(groups == sequences, op, "kv_index is needed where q_offsets (", groups, " groups) and kv_offsets (",
            sequences, " sequences) differ in number, found none");
      group_kv.resize(groups);
      std::iota(group_kv.begin(), group_kv.end(), 0);
      return;
    }
    group_kv = read_indices(op, "kv_index", *kv_index);
    check(static_cast<int64_t>(group_kv.size()) == groups, op, "kv_index must have one entry per query group (", groups,
          "), found ", group_kv.size());
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
  in.run(cpu::cross_attn_kernels().forward, static_cast<int64_t>(in.query_blocks.size()) * in.params.q_heads);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cross_attn_backward_cpu(
    Tensor grad_out, std::optional<Tensor> grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor q_offsets, Tensor kv_offsets, int64_t max_q_len, int64_t max_kv_len, std::optional<Tensor> self_k,
    std::optional<Tensor> self_v, std::optional<Tensor> kv_index, std::optional<double> attn_scale) {
  const char* op = "jagged_cross_attn_backward";
  Inputs in(op, q, k, v, q_offsets, kv_offsets, max_q_len, max_kv_len, self_k, self_v, kv_index, attn_scale);
  CrossAttnParams& params = in.params;
  check_like(op, "grad_out", grad_out, "q", q, params.e);
  check_like(op, "out", out, "q", q, params.e);
  const auto check_lse = [&](const char* name, const Tensor& rows) {
    check_cpu(op, name, rows);
    check_rank(op, name, rows, 2, "[total_q, heads]");
    check_dtype(op, name, rows, ScalarType::Float);
    check(rows.size(0) == q.size(0) && rows.size(1) == params.q_heads, op, name, " must have shape [", q.size(0), ", ",
          params.q_heads, "], found ", shape_of(rows));
  };
  check_lse("lse", lse);
  grad_out = torch::stable::contiguous(grad_out);
  out = torch::stable::contiguous(out);
  lse = torch::stable::contiguous(lse);
  if (grad_lse.has_value()) {
    check_lse("grad_lse", *grad_lse);
    grad_lse = torch::stable::contiguous(*grad_lse);
    params.grad_lse = floats(*grad_lse);
  }
  Tensor delta = torch::stable::new_empty(lse, lse.sizes()), norm = torch::stable::new_empty(lse, lse.sizes());
  Tensor grad_q = rows_like(q, in.padded_queries);
  Tensor grad_k = rows_like(k, in.padded_keys), grad_v = rows_like(v, in.padded_keys);
  // Without the own item its gradients have no rows.
  const int64_t own_rows = self_k.has_value() ? q.size(0) : 0;
  Tensor grad_self_k = torch::stable::new_zeros(q, {own_rows, params.kv_heads, params.d});
  Tensor grad_self_v = torch::stable::new_zeros(q, {own_rows, params.kv_heads, params.e});
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
  in.run(cpu::cross_attn_kernels().backward_queries, static_cast<int64_t>(in.query_blocks.size()) * params.kv_heads);
  in.run(cpu::cross_attn_kernels().backward_keys, static_cast<int64_t>(in.key_blocks.size()) * params.kv_heads);
  return {grad_q, grad_k, grad_v, grad_self_k, grad_self_v};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("jagged_cross_attn", TORCH_BOX(&vista::cross_attn_cpu));
  m.impl("jagged_cross_attn_backward", TORCH_BOX(&vista::cross_attn_backward_cpu));
}
