// The projected QLA ops on the CPU: a piece of a sequence's rows at a time through torch's products and the QLA ops, so
// that keys, values and queries are never all there. A piece belongs to one sequence and is cut by its length only, so
// that what a sequence gets does not depend on the batch.
#include "projected_qla.h"

#include <algorithm>
#include <cstring>

namespace vista {
namespace {

constexpr int64_t kPieceRows = 4096;  // of 256 values: some MB, which stay in the cache

// run(sequence, first row, rows, offsets of the piece alone)
template <typename Run>
void for_each_piece(const char* op, const Tensor& x, const Tensor& seq_offsets, int64_t max_seq_len, const Run& run) {
  const std::vector<int64_t> offsets =
      read_offsets(op, "seq_offsets", seq_offsets, x.size(0), "max_seq_len", max_seq_len);
  for (size_t b = 0; b + 1 < offsets.size(); ++b)
    for (int64_t row = offsets[b]; row < offsets[b + 1]; row += kPieceRows) {
      const int64_t rows = std::min(kPieceRows, offsets[b + 1] - row);
      Tensor ends = torch::stable::new_zeros(seq_offsets, {2}, ScalarType::Long);
      static_cast<int64_t*>(ends.mutable_data_ptr())[1] = rows;
      run(static_cast<int64_t>(b), row, rows, ends);
    }
}

void add_to(Tensor& states, int64_t sequence, const Tensor& part) {
  const int64_t n = part.numel();
  float* sum = mutable_floats(states) + sequence * n;
  for (int64_t i = 0; i < n; ++i) sum[i] += floats(part)[i];
}

void write_rows(Tensor& to, int64_t row, const Tensor& from) {
  Tensor place = torch::stable::narrow(to, 0, row, from.size(0));
  torch::stable::copy_(place, from);
}

Tensor projected_qla_state_cpu(Tensor x, Tensor weight_k, Tensor weight_v, Tensor seq_offsets, int64_t max_seq_len,
                               int64_t heads, std::optional<double> norm_eps, std::string activation) {
  const char* op = "projected_qla_state";
  const HeadDims dims = check_projected_state(op, x, weight_k, weight_v, heads, norm_eps);
  parse_activation(op, "activation", activation);
  Tensor states = torch::stable::new_zeros(x, {batch_of(seq_offsets), heads, dims.d, dims.e}, ScalarType::Float);
  for_each_piece(op, x, seq_offsets, max_seq_len, [&](int64_t sequence, int64_t row, int64_t rows, const Tensor& ends) {
    const ProjectedRows piece(torch::stable::narrow(x, 0, row, rows), heads, norm_eps);
    const Tensor k = piece.project(weight_k), v = piece.project(weight_v);
    add_to(states, sequence, qla_halves_cpu.state(k, v, ends, rows, std::nullopt, activation, false));
  });
  return states;
}

std::tuple<Tensor, Tensor> projected_qla_state_backward_cpu(Tensor grad_state, Tensor x, Tensor weight_k,
                                                            Tensor weight_v, Tensor seq_offsets, int64_t max_seq_len,
                                                            int64_t heads, std::optional<double> norm_eps,
                                                            std::string activation) {
  const char* op = "projected_qla_state_backward";
  const HeadDims dims = check_projected_state(op, x, weight_k, weight_v, heads, norm_eps);
  parse_activation(op, "activation", activation);
  check_projected_states(op, "grad_state", grad_state, batch_of(seq_offsets), heads, dims, x);
  Tensor grad_k = torch::stable::new_zeros(x, {x.size(0), heads * dims.d});
  Tensor grad_v = torch::stable::new_zeros(x, {x.size(0), heads * dims.e});
  for_each_piece(op, x, seq_offsets, max_seq_len, [&](int64_t sequence, int64_t row, int64_t rows, const Tensor& ends) {
    const ProjectedRows piece(torch::stable::narrow(x, 0, row, rows), heads, norm_eps);
    const Tensor k = piece.project(weight_k), v = piece.project(weight_v);
    const auto [of_k, of_v] = qla_halves_cpu.state_backward(torch::stable::narrow(grad_state, 0, sequence, 1), k, v,
                                                            ends, rows, std::nullopt, activation, false);
    write_rows(grad_k, row, piece.scaled(of_k));
    write_rows(grad_v, row, piece.scaled(of_v));
  });
  return {grad_k, grad_v};
}

Tensor projected_qla_apply_cpu(Tensor x, Tensor weight_q, Tensor state, Tensor attn_scale, Tensor seq_offsets,
                               int64_t max_seq_len, std::optional<double> norm_eps, std::string activation,
                               std::string state_activation) {
  const char* op = "projected_qla_apply";
  const HeadDims dims =
      check_projected_apply(op, x, weight_q, state, attn_scale, seq_offsets, norm_eps, activation, state_activation);
  const int64_t heads = state.size(1);
  Tensor out = torch::stable::new_zeros(x, {x.size(0), heads, dims.e});
  for_each_piece(op, x, seq_offsets, max_seq_len, [&](int64_t sequence, int64_t row, int64_t rows, const Tensor& ends) {
    const ProjectedRows piece(torch::stable::narrow(x, 0, row, rows), heads, norm_eps);
    write_rows(out, row,
               qla_halves_cpu.apply(piece.project(weight_q), torch::stable::narrow(state, 0, sequence, 1),
                                    torch::stable::narrow(attn_scale, 0, sequence, 1), ends, rows, std::nullopt,
                                    std::nullopt, std::nullopt, activation, state_activation, false));
  });
  return out;
}

std::tuple<Tensor, Tensor> projected_qla_apply_backward_cpu(Tensor grad_out, Tensor x, Tensor weight_q, Tensor state,
                                                            Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
                                                            std::optional<double> norm_eps, std::string activation,
                                                            std::string state_activation) {
  const char* op = "projected_qla_apply_backward";
  const HeadDims dims =
      check_projected_apply(op, x, weight_q, state, attn_scale, seq_offsets, norm_eps, activation, state_activation);
  const int64_t heads = state.size(1);
  check_grad_rows(op, grad_out, x, heads, dims.e);
  Tensor grad_q = torch::stable::new_zeros(x, {x.size(0), heads * dims.d});
  Tensor grad_state = torch::stable::new_zeros(state, state.sizes());
  for_each_piece(op, x, seq_offsets, max_seq_len, [&](int64_t sequence, int64_t row, int64_t rows, const Tensor& ends) {
    const ProjectedRows piece(torch::stable::narrow(x, 0, row, rows), heads, norm_eps);
    const auto [of_q, of_state, of_self_k, of_self_v] = qla_halves_cpu.apply_backward(
        torch::stable::narrow(grad_out, 0, row, rows), piece.project(weight_q),
        torch::stable::narrow(state, 0, sequence, 1), torch::stable::narrow(attn_scale, 0, sequence, 1), ends, rows,
        std::nullopt, std::nullopt, std::nullopt, activation, state_activation, false);
    write_rows(grad_q, row, piece.scaled(of_q));
    add_to(grad_state, sequence, of_state);  // linear in the rows' sum, so the parts add up
  });
  return {grad_q, grad_state};
}

}  // namespace
}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("projected_qla_state", TORCH_BOX(&vista::projected_qla_state_cpu));
  m.impl("projected_qla_state_backward", TORCH_BOX(&vista::projected_qla_state_backward_cpu));
  m.impl("projected_qla_apply", TORCH_BOX(&vista::projected_qla_apply_cpu));
  m.impl("projected_qla_apply_backward", TORCH_BOX(&vista::projected_qla_apply_backward_cpu));
}
