// Every schema of the package, in one place, present whatever was compiled: torch.ops.vista.x always resolves.
// All tensors of a differentiable op stand before the `*`: register_autograd takes no keyword-only tensors.
// Implementations register beside their op (csrc/ops/<op>.cpp); fake kernels and autograd in vista_ext/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(vista, m) {
  // Quasi-linear attention (paper section 3.2)
  m.def(
      "qla(Tensor q, Tensor k, Tensor v, Tensor seq_offsets, SymInt max_seq_len, Tensor? num_targets=None, Tensor? "
      "attn_scale=None, *, str activation='silu', str state_activation='silu', bool allow_tf32=False) -> (Tensor out, "
      "Tensor state)");
  m.def(
      "qla_backward(Tensor grad_out, Tensor? grad_state, Tensor q, Tensor k, Tensor v, Tensor state, Tensor "
      "seq_offsets, SymInt max_seq_len, Tensor? num_targets=None, Tensor? attn_scale=None, *, str activation='silu', "
      "str state_activation='silu', bool allow_tf32=False) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "qla_state(Tensor k, Tensor v, Tensor seq_offsets, SymInt max_seq_len, Tensor? num_targets=None, *, str "
      "activation='silu', bool allow_tf32=False) -> Tensor");
  m.def(
      "qla_state_backward(Tensor grad_state, Tensor k, Tensor v, Tensor seq_offsets, SymInt max_seq_len, Tensor? "
      "num_targets=None, *, str activation='silu', bool allow_tf32=False) -> (Tensor grad_k, Tensor grad_v)");
  m.def(
      "qla_apply(Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, SymInt max_seq_len, Tensor? "
      "self_k=None, Tensor? self_v=None, Tensor? num_targets=None, *, str activation='silu', str "
      "state_activation='silu', bool allow_tf32=False) -> Tensor");
  m.def(
      "qla_apply_backward(Tensor grad_out, Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, SymInt "
      "max_seq_len, Tensor? self_k=None, Tensor? self_v=None, Tensor? num_targets=None, *, str activation='silu', "
      "str state_activation='silu', bool allow_tf32=False) -> (Tensor grad_q, Tensor grad_state, Tensor grad_self_k, "
      "Tensor grad_self_v)");

  // Quasi-linear attention on projections of the rows, which are made on the way
  m.def(
      "projected_qla_state(Tensor x, Tensor weight_k, Tensor weight_v, Tensor seq_offsets, SymInt max_seq_len, *, int "
      "heads, float? norm_eps=None, str activation='silu') -> Tensor");
  m.def(
      "projected_qla_state_backward(Tensor grad_state, Tensor x, Tensor weight_k, Tensor weight_v, Tensor seq_offsets, "
      "SymInt max_seq_len, *, int heads, float? norm_eps=None, str activation='silu') -> (Tensor grad_k_rows, Tensor "
      "grad_v_rows)");
  m.def(
      "projected_qla_apply(Tensor x, Tensor weight_q, Tensor state, Tensor attn_scale, Tensor seq_offsets, SymInt "
      "max_seq_len, *, float? norm_eps=None, str activation='silu', str state_activation='silu') -> Tensor");
  m.def(
      "projected_qla_apply_backward(Tensor grad_out, Tensor x, Tensor weight_q, Tensor state, Tensor attn_scale, "
      "Tensor seq_offsets, SymInt max_seq_len, *, float? norm_eps=None, str activation='silu', str "
      "state_activation='silu') -> (Tensor grad_q_rows, Tensor grad_state)");

  // Softmax target attention (paper section 3.3)
  m.def(
      "jagged_cross_attn(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor kv_offsets, SymInt max_q_len, SymInt "
      "max_kv_len, Tensor? self_k=None, Tensor? self_v=None, Tensor? kv_index=None, *, float? attn_scale=None) -> "
      "(Tensor out, Tensor lse)");
  m.def(
      "jagged_cross_attn_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor q_offsets, Tensor kv_offsets, SymInt max_q_len, SymInt max_kv_len, Tensor? self_k=None, "
      "Tensor? self_v=None, Tensor? kv_index=None, *, float? attn_scale=None) -> (Tensor grad_q, Tensor grad_k, "
      "Tensor grad_v, Tensor grad_self_k, Tensor grad_self_v)");

  m.def(
      "cached_cross_attn(Tensor q, Tensor k_rows, Tensor v_rows, Tensor slots, Tensor q_offsets, SymInt max_q_len, int "
      "tokens, int kv_heads, Tensor? self_k=None, Tensor? self_v=None, *, int? value_dim=None, str scheme='int8', int? "
      "group=None, str policy='raise', float? attn_scale=None) -> (Tensor out, Tensor lse, Tensor num_bad)");
  // What the gradient of rows takes from the norm in front of projections, whose gradients are divided by it already
  m.def("rms_norm_backward(Tensor grad_rows, Tensor x, *, float norm_eps) -> Tensor grad_x");
  // Products of rows on a CPU: x weight^T + bias, or x weight + bias if transposed; and a^T b
  m.def("row_product(Tensor x, Tensor weight, Tensor? bias=None, *, bool transposed=False) -> Tensor");
  m.def("outer_product(Tensor a, Tensor b) -> Tensor");
  // A norm with its weight
  m.def("weighted_rms_norm(Tensor x, Tensor weight, *, float norm_eps) -> Tensor");
  m.def(
      "weighted_rms_norm_backward(Tensor grad_out, Tensor x, Tensor weight, *, float norm_eps) -> "
      "(Tensor grad_x, Tensor grad_weight)");
  // The first half of an MLP: silu(x weight^T + bias)
  m.def("linear_silu(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def("linear_silu_backward(Tensor grad_out, Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  // The feed-forward half of a layer (paper section 3.2)
  m.def("sglu(Tensor x, Tensor up, Tensor gate, Tensor down, *, float? norm_eps=None, bool residual=False) -> Tensor");
  m.def(
      "sglu_backward(Tensor grad_out, Tensor x, Tensor up, Tensor gate, Tensor down, *, float? norm_eps=None, bool "
      "residual=False) -> (Tensor grad_x, Tensor grad_up_rows, Tensor grad_gate_rows, Tensor hidden)");

  // Its gate on a CPU, where both products are one: [u, v] to u * v
  m.def("gated_product(Tensor uv) -> Tensor");
  m.def("gated_product_backward(Tensor grad_out, Tensor uv) -> Tensor grad_uv");

  // Quantized rows (paper sections 3.1 and 4; layout in vista/row_layout.h)
  m.def("quantize_rows(Tensor x, *, str scheme='int8', int? group=None) -> Tensor");
  m.def(
      "dequantize_rows(Tensor rows, int tokens, int dim, *, str scheme='int8', int? group=None, "
      "ScalarType dtype=float) -> Tensor");
  m.def(
      "cache_gather(Tensor cache, Tensor slots, int tokens, int dim, *, str scheme='int8', int? group=None, "
      "ScalarType dtype=float, str policy='raise') -> (Tensor out, Tensor num_bad)");
  m.def(
      "cache_gather.out(Tensor cache, Tensor slots, int tokens, int dim, *, str scheme='int8', int? group=None, "
      "str policy='raise', Tensor(a!) out) -> Tensor num_bad");
  m.def("cache_scatter_(Tensor(a!) cache, Tensor slots, Tensor rows, *, str policy='raise') -> Tensor num_bad");
}
