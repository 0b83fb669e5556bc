#include "vista/qla.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "qla.h"

namespace vista {
namespace {

using cpu::QlaChunk;
using cpu::QlaParams;

// A sequence is cut by its own length only, so that its bits do not depend on the batch or the threads. Few chunks
// bound the partial sums of a lifelong history; long enough chunks keep the state a small share of the traffic.
constexpr int64_t kMinChunk = 1024;
constexpr int64_t kMaxChunks = 64;

struct Sequences {
  std::vector<int64_t> offsets;
  std::vector<int64_t> source_ends;  // packed row at which a sequence's targets begin
  int64_t batch() const { return static_cast<int64_t>(offsets.size()) - 1; }
  bool has_targets() const {
    for (int64_t b = 0; b < batch(); ++b)
      if (source_ends[b] < offsets[b + 1]) return true;
    return false;
  }
};

Sequences read_sequences(const char* op, const Tensor& seq_offsets, int64_t max_seq_len,
                         const std::optional<Tensor>& num_targets, const Tensor& rows) {
  Sequences s;
  s.offsets = read_offsets(op, "seq_offsets", seq_offsets, rows.size(0), "max_seq_len", max_seq_len);
  s.source_ends.assign(s.offsets.begin() + 1, s.offsets.end());
  if (num_targets.has_value()) {
    check_per_sequence(op, "num_targets", *num_targets, s.batch(), rows);
    const std::vector<int64_t> targets = read_indices(op, "num_targets", *num_targets);
    for (int64_t b = 0; b < s.batch(); ++b) {
      const int64_t length = s.offsets[b + 1] - s.offsets[b];
      check(targets[b] >= 0 && targets[b] <= length, op, "num_targets must be between 0 and the sequence's length (",
            length, "), found ", targets[b], " for sequence ", b);
      s.source_ends[b] -= targets[b];
    }
  }
  return s;
}

std::vector<float> read_scale(const char* op, const std::optional<Tensor>& attn_scale, const Sequences& s,
                              const Tensor& rows) {
  std::vector<float> scale(s.batch());
  if (!attn_scale.has_value()) {
    for (int64_t b = 0; b < s.batch(); ++b)
      scale[b] = 1.f / static_cast<float>(std::max<int64_t>(1, s.source_ends[b] - s.offsets[b]));
    return scale;
  }
  check_scale(op, *attn_scale, s.batch(), rows);
  const Tensor packed = torch::stable::contiguous(*attn_scale);
  std::copy_n(floats(packed), s.batch(), scale.begin());
  return scale;
}

using Kernel = void (*)(const QlaParams&, int64_t, int64_t, float*);

// The chunks of a batch, and sums over them in a fixed order.
class Plan {
 public:
  Plan(const Sequences& s, int64_t matrix) : batch_(s.batch()), matrix_(matrix) {
    int64_t shared = 0;  // partial matrices of sequences with more than one chunk
    std::vector<int64_t> slot;
    for (int64_t b = 0; b < batch_; ++b) {
      const int64_t begin = s.offsets[b], end = s.offsets[b + 1];
      int64_t rows = std::max(kMinChunk, (end - begin + kMaxChunks - 1) / kMaxChunks);
      rows = (rows + 31) / 32 * 32;
      const bool single = end - begin <= rows;
      for (int64_t row = begin; row < end; row += rows) {
        chunks.push_back({b, row, std::min(end, row + rows), s.source_ends[b], nullptr});
        slot.push_back(single ? -1 : shared++);
      }
    }
    partials_.reset(new float[shared * matrix]);
    slots_ = std::move(slot);
  }

  // Chunk sums go to `sums` [batch, matrix] where a sequence is one chunk, else to this plan's partials.
  void direct_to(float* sums) {
    for (size_t c = 0; c < chunks.size(); ++c)
      chunks[c].partial = slots_[c] < 0 ? sums + chunks[c].seq * matrix_ : partials_.get() + slots_[c] * matrix_;
  }

  // Whether every sequence is one chunk, so that its state needs nothing of other tasks.
  bool single() const {
    for (const int64_t slot : slots_)
      if (slot >= 0) return false;
    return true;
  }

  // A state and its use, a few tasks at a time: it is read where it was written, in the cache.
  void run_both(const QlaParams& params, Kernel first, Kernel second) const {
    constexpr int64_t kTogether = 8;
    const auto both = [&](const QlaParams& p, int64_t begin, int64_t end, float* scratch) {
      for (int64_t t = begin; t < end; t += kTogether) {
        first(p, t, std::min(end, t + kTogether), scratch);
        second(p, t, std::min(end, t + kTogether), scratch);
      }
    };
    run(params, both);
  }

  template <typename Kernels>
  void run(const QlaParams& params, const Kernels& kernel) const {
    run_tasks(static_cast<int64_t>(chunks.size()) * params.heads, cpu::qla_scratch_floats(params.d, params.e),
              [&](int64_t begin, int64_t end, float* scratch) { kernel(params, begin, end, scratch); });
  }

  void reduce(float* sums) const {
    std::vector<int64_t> first(batch_ + 1, static_cast<int64_t>(chunks.size()));
    for (int64_t c = static_cast<int64_t>(chunks.size()) - 1; c >= 0; --c) first[chunks[c].seq] = c;
    for (int64_t b = batch_ - 1; b >= 0; --b)
      if (first[b] == static_cast<int64_t>(chunks.size())) first[b] = first[b + 1];
    torch::stable::parallel_for(0, batch_, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        float* sum = sums + b * matrix_;
        if (first[b + 1] - first[b] == 1) continue;  // written directly
        std::memset(sum, 0, matrix_ * sizeof(float));
        for (int64_t c = first[b]; c < first[b + 1]; ++c)
          for (int64_t i = 0; i < matrix_; ++i) sum[i] += chunks[c].partial[i];
      }
    });
  }

  std::vector<QlaChunk> chunks;

 private:
  int64_t batch_, matrix_;
  std::unique_ptr<float[]> partials_;
  std::vector<int64_t> slots_;
};

void compute_state(QlaParams params, Plan& plan, Tensor& state) {
  plan.direct_to(mutable_floats(state));
  params.chunks = plan.chunks.data();
  plan.run(params, cpu::qla_kernels().state);
  plan.reduce(mutable_floats(state));
}

// W, then the gradient of the state in place of it.
void compute_apply_backward(QlaParams params, Plan& plan, int64_t batch, const float* extra, Tensor& grad_state) {
  float* sums = mutable_floats(grad_state);
  plan.direct_to(sums);
  params.chunks = plan.chunks.data();
  plan.run(params, cpu::qla_kernels().apply_backward);
  plan.reduce(sums);
  const int64_t matrix = params.heads * params.d * params.e;
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * matrix;
      cpu::qla_kernels().state_gradient(params.state_activation, params.scale[b], params.state + at, sums + at,
                                        extra == nullptr ? nullptr : extra + at, sums + at, matrix);
    }
  });
}

QlaParams make_params(const Tensor& rows, int64_t d, int64_t e) {
  QlaParams params{};
  params.dtype = kernel_dtype(rows.scalar_type());
  params.stream = rows.numel() * (params.dtype == DType::kFloat ? 4 : 2) >= kStreamBytes;
  params.heads = rows.size(1);
  params.d = d;
  params.e = e;
  return params;
}

Tensor qla_state_cpu(Tensor k, Tensor v, Tensor seq_offsets, int64_t max_seq_len, std::optional<Tensor> num_targets,
                     std::string activation, bool /*allow_tf32*/) {
  const char* op = "qla_state";
  check_kv(op, k, v);
  const Sequences s = read_sequences(op, seq_offsets, max_seq_len, num_targets, k);
  QlaParams params = make_params(k, k.size(2), v.size(2));
  params.activation = parse_activation(op, "activation", activation);
  k = torch::stable::contiguous(k);
  v = torch::stable::contiguous(v);
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  Tensor state = state_like(k, s.batch(), params.d, params.e);
  Plan plan(s, params.heads * params.d * params.e);
  compute_state(params, plan, state);
  return state;
}

std::tuple<Tensor, Tensor> qla_state_backward_cpu(Tensor grad_state, Tensor k, Tensor v, Tensor seq_offsets,
                                                  int64_t max_seq_len, std::optional<Tensor> num_targets,
                                                  std::string activation, bool /*allow_tf32*/) {
  const char* op = "qla_state_backward";
  check_kv(op, k, v);
  const Sequences s = read_sequences(op, seq_offsets, max_seq_len, num_targets, k);
  QlaParams params = make_params(k, k.size(2), v.size(2));
  params.activation = parse_activation(op, "activation", activation);
  check_state(op, "grad_state", grad_state, s.batch(), k, params.d, params.e);
  k = torch::stable::contiguous(k);
  v = torch::stable::contiguous(v);
  grad_state = torch::stable::contiguous(grad_state);
  const bool partly = s.has_targets() || s.offsets.back() < k.size(0);
  Tensor grad_k = rows_like(k, partly), grad_v = rows_like(v, partly);
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.grad_state = floats(grad_state);
  params.grad_k = grad_k.mutable_data_ptr();
  params.grad_v = grad_v.mutable_data_ptr();
  Plan plan(s, 0);
  params.chunks = plan.chunks.data();
  plan.run(params, cpu::qla_kernels().state_backward);
  return {grad_k, grad_v};
}

// The arguments that qla_apply and its backward share, checked and made contiguous.
struct ApplyInputs {
  Sequences sequences;
  std::vector<float> scale;
  std::optional<Tensor> self_k, self_v;
  QlaParams params;

  ApplyInputs(const char* op, Tensor& q, Tensor& state, const Tensor& attn_scale, const Tensor& seq_offsets,
              int64_t max_seq_len, const std::optional<Tensor>& num_targets, const std::optional<Tensor>& k,
              const std::optional<Tensor>& v, const std::string& activation, const std::string& state_activation) {
    check_rows(op, "q", q);
    sequences = read_sequences(op, seq_offsets, max_seq_len, num_targets, q);
    check_apply(op, q, state, sequences.batch(), num_targets, k, v);
    scale = read_scale(op, attn_scale, sequences, q);
    q = torch::stable::contiguous(q);
    state = torch::stable::contiguous(state);
    params = make_params(q, q.size(2), state.size(3));
    params.activation = parse_activation(op, "activation", activation);
    params.state_activation = parse_activation(op, "state_activation", state_activation);
    params.q = q.const_data_ptr();
    params.state = floats(state);
    params.scale = scale.data();
    params.own_term = k.has_value();
    if (params.own_term) {
      self_k = contiguous(k);
      self_v = contiguous(v);
      params.k = self_k->const_data_ptr();
      params.v = self_v->const_data_ptr();
    }
  }
};

Tensor qla_apply_cpu(Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
                     std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<Tensor> num_targets,
                     std::string activation, std::string state_activation, bool /*allow_tf32*/) {
  ApplyInputs in("qla_apply", q, state, attn_scale, seq_offsets, max_seq_len, num_targets, self_k, self_v, activation,
                 state_activation);
  Tensor out = torch::stable::new_empty(q, {q.size(0), in.params.heads, in.params.e});
  if (in.sequences.offsets.back() < q.size(0)) torch::stable::zero_(out);
  in.params.out = out.mutable_data_ptr();
  Plan plan(in.sequences, 0);
  in.params.chunks = plan.chunks.data();
  plan.run(in.params, cpu::qla_kernels().apply);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qla_apply_backward_cpu(
    Tensor grad_out, Tensor q, Tensor state, Tensor attn_scale, Tensor seq_offsets, int64_t max_seq_len,
    std::optional<Tensor> self_k, std::optional<Tensor> self_v, std::optional<Tensor> num_targets,
    std::string activation, std::string state_activation, bool /*allow_tf32*/) {
  const char* op = "qla_apply_backward";
  ApplyInputs in(op, q, state, attn_scale, seq_offsets, max_seq_len, num_targets, self_k, self_v, activation,
                 state_activation);
  QlaParams& params = in.params;
  check_like(op, "grad_out", grad_out, "q", q, params.e);
  grad_out = torch::stable::contiguous(grad_out);
  params.grad_out = grad_out.const_data_ptr();
  Tensor grad_q = rows_like(q, in.sequences.offsets.back() < q.size(0));
  Tensor grad_state = rows_like(state, false);
  // Without the own term its gradients have no rows.
  const int64_t own_rows = params.own_term ? q.size(0) : 0;
  Tensor grad_self_k = torch::stable::new_zeros(q, {own_rows, params.heads, params.d});
  Tensor grad_self_v = torch::stable::new_zeros(q, {own_rows, params.heads, params.e});
  params.grad_q = grad_q.mutable_data_ptr();
  params.grad_k = grad_self_k.mutable_data_ptr();
  params.grad_v = grad_self_v.mutable_data_ptr();
  Plan plan(in.sequences, params.heads * params.d * params.e);
  compute_apply_backward(params, plan, in.sequences.batch(), nullptr, grad_state);
  return {grad_q, grad_state, grad_self_k, grad_self_v};
}

std::tuple<Tensor, Tensor> qla_cpu(Tensor q, Tensor k, Tensor v, Tensor seq_offsets, int64_t max_seq_len,
                                   std::optional<Tensor> num_targets, std::optional<Tensor> attn_scale,
                                   std::string activation, std::string state_activation, bool /*allow_tf32*/) {
  const char* op = "qla";
  check_qkv(op, q, k, v);
  const Sequences s = read_sequences(op, seq_offsets, max_seq_len, num_targets, q);
  const std::vector<float> scale = read_scale(op, attn_scale, s, q);
  QlaParams params = make_params(q, q.size(2), v.size(2));
  params.activation = parse_activation(op, "activation", activation);
  params.state_activation = parse_activation(op, "state_activation", state_activation);
  q = torch::stable::contiguous(q);
  k = torch::stable::contiguous(k);
  v = torch::stable::contiguous(v);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.scale = scale.data();
  params.own_term = s.has_targets();

  Tensor state = state_like(q, s.batch(), params.d, params.e);
  Tensor out = rows_like(v, s.offsets.back() < v.size(0));
  params.state = floats(state);
  params.out = out.mutable_data_ptr();
  Plan plan(s, params.heads * params.d * params.e);
  params.chunks = plan.chunks.data();
  if (plan.single()) {
    plan.direct_to(mutable_floats(state));
    plan.run_both(params, cpu::qla_kernels().state, cpu::qla_kernels().apply);
    plan.reduce(mutable_floats(state));  // zeros for sequences without rows
  } else {
    compute_state(params, plan, state);
    plan.run(params, cpu::qla_kernels().apply);
  }
  return {out, state};
}

std::tuple<Tensor, Tensor, Tensor> qla_backward_cpu(Tensor grad_out, std::optional<Tensor> grad_state, Tensor q,
                                                    Tensor k, Tensor v, Tensor state, Tensor seq_offsets,
                                                    int64_t max_seq_len, std::optional<Tensor> num_targets,
                                                    std::optional<Tensor> attn_scale, std::string activation,
                                                    std::string state_activation, bool /*allow_tf32*/) {
  const char* op = "qla_backward";
  check_qkv(op, q, k, v);
  check_like(op, "grad_out", grad_out, "q", q, v.size(2));
  const Sequences s = read_sequences(op, seq_offsets, max_seq_len, num_targets, q);
  const std::vector<float> scale = read_scale(op, attn_scale, s, q);
  QlaParams params = make_params(q, q.size(2), v.size(2));
  params.activation = parse_activation(op, "activation", activation);
  params.state_activation = parse_activation(op, "state_activation", state_activation);
  check_state(op, "state", state, s.batch(), q, params.d, params.e);
  if (grad_state.has_value()) {
    check_state(op, "grad_state", *grad_state, s.batch(), q, params.d, params.e);
    grad_state = torch::stable::contiguous(*grad_state);
  }
  q = torch::stable::contiguous(q);
  k = torch::stable::contiguous(k);
  v = torch::stable::contiguous(v);
  state = torch::stable::contiguous(state);
  grad_out = torch::stable::contiguous(grad_out);
  const bool padded = s.offsets.back() < q.size(0);
  Tensor grad_q = rows_like(q, padded), grad_k = rows_like(k, padded), grad_v = rows_like(v, padded);
  Tensor total_grad_state = rows_like(state, false);
  params.q = q.const_data_ptr();
  params.k = k.const_data_ptr();
  params.v = v.const_data_ptr();
  params.grad_out = grad_out.const_data_ptr();
  params.state = floats(state);
  params.scale = scale.data();
  params.grad_q = grad_q.mutable_data_ptr();
  params.grad_k = grad_k.mutable_data_ptr();
  params.grad_v = grad_v.mutable_data_ptr();
  params.own_term = s.has_targets();
  Plan plan(s, params.heads * params.d * params.e);
  compute_apply_backward(params, plan, s.batch(), grad_state.has_value() ? floats(*grad_state) : nullptr,
                         total_grad_state);
  params.grad_state = floats(total_grad_state);
  params.chunks = plan.chunks.data();
  plan.run(params, cpu::qla_kernels().state_backward);
  return {grad_q, grad_k, grad_v};
}

}  // namespace

const QlaHalves qla_halves_cpu{qla_state_cpu, qla_state_backward_cpu, qla_apply_cpu, qla_apply_backward_cpu};

}  // namespace vista

STABLE_TORCH_LIBRARY_IMPL(vista, CPU, m) {
  m.impl("qla", TORCH_BOX(&vista::qla_cpu));
  m.impl("qla_backward", TORCH_BOX(&vista::qla_backward_cpu));
  m.impl("qla_state", TORCH_BOX(&vista::qla_state_cpu));
  m.impl("qla_state_backward", TORCH_BOX(&vista::qla_state_backward_cpu));
  m.impl("qla_apply", TORCH_BOX(&vista::qla_apply_cpu));
  m.impl("qla_apply_backward", TORCH_BOX(&vista::qla_apply_backward_cpu));
}
