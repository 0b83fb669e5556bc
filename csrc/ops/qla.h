// What the QLA ops check and allocate, the same on every device. The contents of offsets, targets and scales are the
// business of the device that can read them (qla.cpp, qla_cuda.cpp).
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "attention.h"

namespace vista {

inline Activation parse_activation(const char* op, const char* name, const std::string& value) {
  if (value == "silu") return Activation::kSilu;
  if (value == "shifted_elu") return Activation::kShiftedElu;
  if (value == "relu") return Activation::kRelu;
  if (value == "identity") return Activation::kIdentity;
  fail(op, name, " must be 'silu', 'shifted_elu', 'relu' or 'identity', found '", value, "'");
}

inline void check_kv(const char* op, const Tensor& k, const Tensor& v) {
  check_rows(op, "k", k);
  check_rows(op, "v", v);
  check_like(op, "v", v, "k", k, v.size(2));
}

inline void check_qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check_rows(op, "q", q);
  check_rows(op, "v", v);
  check_like(op, "k", k, "q", q, q.size(2));
  check_like(op, "v", v, "q", q, v.size(2));
}

// A tensor of one entry per sequence.
inline void check_per_sequence(const char* op, const char* name, const Tensor& tensor, int64_t batch,
                               const Tensor& like) {
  check_device(op, name, tensor, like);
  check_rank(op, name, tensor, 1, "[batch]");
  check(tensor.size(0) == batch, op, name, " must have one entry per sequence (", batch, "), found ", tensor.size(0));
}

inline void check_scale(const char* op, const Tensor& attn_scale, int64_t batch, const Tensor& like) {
  check_per_sequence(op, "attn_scale", attn_scale, batch, like);
  check_dtype(op, "attn_scale", attn_scale, ScalarType::Float);
}

// e < 0: any.
inline void check_state(const char* op, const char* name, const Tensor& state, int64_t batch, const Tensor& like,
                        int64_t d, int64_t e) {
  const int64_t heads = like.size(1);
  check_device(op, name, state, like);
  check_rank(op, name, state, 4, "[batch, heads, d, e]");
  check_dtype(op, name, state, ScalarType::Float);
  check(state.size(0) == batch && state.size(1) == heads && state.size(2) == d && (e < 0 || state.size(3) == e), op,
        name, " must have shape [", batch, ", ", heads, ", ", d, ", ", e < 0 ? "e" : std::to_string(e), "], found ",
        shape_of(state));
}

inline Tensor state_like(const Tensor& like, int64_t batch, int64_t d, int64_t e) {
  return torch::stable::new_empty(like, {batch, like.size(1), d, e}, ScalarType::Float);
}

// What qla_apply and its backward share.
inline void check_apply(const char* op, const Tensor& q, const Tensor& state, int64_t batch,
                        const std::optional<Tensor>& num_targets, const std::optional<Tensor>& self_k,
                        const std::optional<Tensor>& self_v) {
  check_state(op, "state", state, batch, q, q.size(2), -1);
  check_head_dim(op, "state", state.size(3));
  const bool own = self_k.has_value();
  check(num_targets.has_value() == own && own == self_v.has_value(), op,
        "num_targets, self_k and self_v must be given together (own term) or not at all, found ",
        num_targets.has_value() ? "" : "no ", "num_targets, ", own ? "" : "no ", "self_k, ",
        self_v.has_value() ? "" : "no ", "self_v");
  if (!own) return;
  check_like(op, "self_k", *self_k, "q", q, q.size(2));
  check_like(op, "self_v", *self_v, "q", q, state.size(3));
}

// The halves of the op on one device, for ops that are composed of them.
struct QlaHalves {
  Tensor (*state)(Tensor k, Tensor v, Tensor seq_offsets, int64_t max_seq_len, std::optional<Tensor> num_targets,
                  std::string activation, bool allow_tf32);
  std::tuple<Tensor, Tensor> (*state_backward)(Tensor grad_state, Tensor k, Tensor v, Tensor seq_offsets,
                                               int64_t max_seq_len, std::optional<Tensor> num_targets,
                                               std::string activation, bool allow_tf32);
  Tensor (*apply)(Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
                  std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<Tensor> num_targets,
                  std::string activation, std::string state_activation, bool allow_tf32);
  std::tuple<Tensor, Tensor, Tensor, Tensor> (*apply_backward)(
      Tensor grad_out, Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
      std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<Tensor> num_targets,
      std::string activation, std::string state_activation, bool allow_tf32);
};
extern const QlaHalves qla_halves_cpu, qla_halves_cuda;

inline std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

}  // namespace vista
