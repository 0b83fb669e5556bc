// What the attention ops share: checks of packed rows, and tasks on torch's thread pool.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "checks.h"
#include "vista/types.h"

namespace vista {

// A result of a few second-level caches and more is gone from there before anyone reads it; written past the caches it
// costs a third less traffic.
constexpr int64_t kStreamBytes = 8 << 20;

inline DType kernel_dtype(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return DType::kBFloat16;
  return dtype == ScalarType::Half ? DType::kHalf : DType::kFloat;
}

inline void check_head_dim(const char* op, const char* name, int64_t dim) {
  check(dim >= 16 && dim <= 256 && dim % 8 == 0, op, name, "'s head dim must be a multiple of 8 from 16 to 256, found ",
        dim);
}

// The device is left to check_like or check_device: the dispatcher vouches for one argument only.
inline void check_rows(const char* op, const char* name, const Tensor& rows) {
  check_rank(op, name, rows, 3, "[total, heads, head_dim]");
  check_float_dtype(op, name, rows);
  check_head_dim(op, name, rows.size(2));
}

// `rows` agrees with `first` in device, dtype, total and heads, and has `dim` columns.
inline void check_like(const char* op, const char* name, const Tensor& rows, const char* first_name,
                       const Tensor& first, int64_t dim) {
  check_device(op, name, rows, first);
  check_rank(op, name, rows, 3, "[total, heads, head_dim]");
  check(rows.scalar_type() == first.scalar_type(), op, name, " must have the dtype of ", first_name, " (",
        dtype_name(first.scalar_type()), "), found ", dtype_name(rows.scalar_type()));
  check(rows.size(0) == first.size(0) && rows.size(1) == first.size(1) && rows.size(2) == dim, op, name,
        " must have shape [", first.size(0), ", ", first.size(1), ", ", dim, "] to go with ", first_name, ", found ",
        shape_of(rows));
}

// What torch made of rows like these, in their dtype: an op that is called under autocast gets products in autocast's.
inline Tensor in_dtype_of(const Tensor& like, const Tensor& rows) {
  return torch::stable::to(rows, like.scalar_type());
}

// Zeroed where a kernel does not write every row.
inline Tensor rows_like(const Tensor& like, bool zero) {
  Tensor rows = torch::stable::new_empty(like, like.sizes());
  if (zero) torch::stable::zero_(rows);
  return rows;
}

inline const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }
inline float* mutable_floats(Tensor& tensor) { return static_cast<float*>(tensor.mutable_data_ptr()); }

// A row of a contiguous matrix.
inline const char* row_at(const Tensor& rows, int64_t row) {
  return static_cast<const char*>(rows.const_data_ptr()) + row * rows.size(1) * rows.element_size();
}
inline char* mutable_row_at(Tensor& rows, int64_t row) {
  return static_cast<char*>(rows.mutable_data_ptr()) + row * rows.size(1) * rows.element_size();
}

// run(begin, end, scratch) over `tasks`, on torch's threads; each range gets its own cache-aligned scratch.
template <typename Run>
void run_tasks(int64_t tasks, int64_t scratch_floats, const Run& run) {
  const size_t bytes = (scratch_floats * sizeof(float) + 63) / 64 * 64;
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<void, decltype(&std::free)> scratch(std::aligned_alloc(64, bytes), &std::free);
    if (scratch == nullptr) throw std::bad_alloc();
    run(begin, end, static_cast<float*>(scratch.get()));
  });
}

}  // namespace vista
