// A call of a QLA op on CUDA: what its launches read, and the tensors behind it.
#pragma once

#include <sstream>

#include "cuda.h"
#include "qla.h"
#include "vista/cuda/qla.h"

namespace vista {

// One call of an op: the params, and the tensors that they point at.
class QlaCall : public LaunchTensors {
 public:
  cuda::QlaParams params{};

  // `rows`: of the batch, one for each packed row.
  QlaCall(const char* op, const Tensor& rows, int64_t heads, int64_t d, int64_t e, const Tensor& seq_offsets,
          int64_t max_seq_len, const std::optional<Tensor>& num_targets, const std::string& activation, bool allow_tf32)
      : op_(op), rows_(rows), seq_offsets_(seq_offsets), num_targets_(num_targets) {
    params.seq_offsets = device_indices(op, "seq_offsets", seq_offsets_, rows);
    check(seq_offsets_.size(0) > 0, op, "seq_offsets must have batch + 1 entries, found none");
    check(max_seq_len >= 0, op, "max_seq_len must not be negative, found ", max_seq_len);
    params.dtype = kernel_dtype(rows.scalar_type());
    params.allow_tf32 = allow_tf32;
    params.activation = parse_activation(op, "activation", activation);
    params.total = rows.size(0);
    params.batch = seq_offsets_.size(0) - 1;
    params.heads = heads;
    params.d = d;
    params.e = e;
    params.max_seq_len = max_seq_len;
    if (num_targets_.has_value()) {
      check_per_sequence(op, "num_targets", *num_targets_, params.batch, rows);
      params.num_targets = device_indices(op, "num_targets", *num_targets_, rows);
    }
  }

  void scale_by(const std::optional<Tensor>& attn_scale) {
    if (!attn_scale.has_value()) return;
    check_scale(op_, *attn_scale, params.batch, rows_);
    scale_ = torch::stable::contiguous(*attn_scale);
    params.attn_scale = floats(*scale_);
  }

  // The plan, then launch(stream). `sums_rows`: whether that takes a state or apply_backward.
  template <typename Launch>
  void run(bool sums_rows, const Launch& launch) {
    Tensor workspace = torch::stable::new_empty(
        rows_, {static_cast<int64_t>(cuda::qla_workspace_bytes(params, sums_rows))}, ScalarType::Byte);
    params.workspace = workspace.mutable_data_ptr();
    std::ostringstream shape;
    shape << params.batch << " sequences, " << params.total << " rows of " << params.heads << " heads, head dims "
          << params.d << " and " << params.e << " in " << dtype_name(rows_.scalar_type());
    launch_on(op_, rows_, shape.str(), [&](cuda::Stream stream) {
      const int code = cuda::launch_qla_plan(params, stream);
      return code != 0 ? code : launch(stream);
    });
  }

 private:
  const char* op_;
  const Tensor& rows_;
  Tensor seq_offsets_;
  std::optional<Tensor> num_targets_, scale_;
};

}  // namespace vista
