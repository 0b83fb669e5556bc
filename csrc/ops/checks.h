// Argument checks shared by the ops. Every message names the op, the argument, what was expected and what was found.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace vista {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const char* op, const Parts&... parts) {
  std::ostringstream text;
  text << "vista::" << op << ": ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

template <typename... Parts>
void check(bool ok, const char* op, const Parts&... parts) {
  if (!ok) fail(op, parts...);
}

inline const char* dtype_name(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::Half: return "float16";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
  }
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return text + "]";
}

inline void check_rank(const char* op, const char* name, const Tensor& tensor, int64_t rank, const char* shape) {
  check(tensor.dim() == rank, op, name, " must have shape ", shape, ", found ", shape_of(tensor));
}

inline void check_dtype(const char* op, const char* name, const Tensor& tensor, ScalarType dtype) {
  check(tensor.scalar_type() == dtype, op, name, " must be ", dtype_name(dtype), ", found ",
        dtype_name(tensor.scalar_type()));
}

inline void check_float_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, op, name,
        " must be float32, bfloat16 or float16, found ", dtype_name(dtype));
}

inline void check_index_dtype(const char* op, const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  check(dtype == ScalarType::Long || dtype == ScalarType::Int, op, name, " must be int64 or int32, found ",
        dtype_name(dtype));
}

inline void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_contiguous(), op, name, " must be contiguous (it is written in place), found shape ",
        shape_of(tensor));
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return tensor.is_cpu() ? "cpu" : "another device";
}

inline void check_device(const char* op, const char* name, const Tensor& tensor, const Tensor& like) {
  check(tensor.device() == like.device(), op, name, " must be on ", device_name(like),
        " like the other arguments, found ", device_name(tensor));
}

// Of what the host reads.
inline void check_cpu(const char* op, const char* name, const Tensor& tensor) {
  check(tensor.is_cpu(), op, name, " must be on cpu, found ", device_name(tensor));
}

// A 1-d int32 or int64 CPU tensor as int64 values: the kernels know one index type.
inline std::vector<int64_t> read_indices(const char* op, const char* name, const Tensor& tensor) {
  check_cpu(op, name, tensor);
  check_rank(op, name, tensor, 1, "[n]");
  check_index_dtype(op, name, tensor);
  const Tensor packed = torch::stable::contiguous(tensor);
  const int64_t n = packed.numel();
  std::vector<int64_t> values(n);
  if (packed.scalar_type() == ScalarType::Long) {
    const int64_t* data = static_cast<const int64_t*>(packed.const_data_ptr());
    values.assign(data, data + n);
  } else {
    const int32_t* data = static_cast<const int32_t*>(packed.const_data_ptr());
    values.assign(data, data + n);
  }
  return values;
}

// Sequence boundaries: 0 <= offsets[i] <= offsets[i + 1] <= total, lengths at most max_len. Rows from offsets[-1] on
// are padding: ops write zeros there and read nothing.
inline std::vector<int64_t> read_offsets(const char* op, const char* name, const Tensor& tensor, int64_t total,
                                         const char* max_name, int64_t max_len) {
  std::vector<int64_t> offsets = read_indices(op, name, tensor);
  check(!offsets.empty(), op, name, " must have batch + 1 entries, found none");
  check(max_len >= 0, op, max_name, " must not be negative, found ", max_len);
  check(offsets.front() == 0, op, name, " must start at 0, found ", offsets.front());
  for (size_t i = 1; i < offsets.size(); ++i) {
    const int64_t length = offsets[i] - offsets[i - 1];
    check(length >= 0, op, name, " must not decrease, found ", offsets[i - 1], " then ", offsets[i], " at index ", i);
    check(length <= max_len, op, max_name, " must be at least the longest sequence, found ", max_len, " for sequence ",
          i - 1, " of length ", length);
  }
  check(offsets.back() <= total, op, name, " must end within the packed rows (", total, "), found ", offsets.back());
  return offsets;
}

// What an op does with an index that names nothing.
enum class IndexPolicy { kRaise, kZero };

inline IndexPolicy parse_policy(const char* op, const std::string& policy) {
  if (policy == "raise") return IndexPolicy::kRaise;
  if (policy == "zero") return IndexPolicy::kZero;
  fail(op, "policy must be 'raise' or 'zero', found '", policy, "'");
}

}  // namespace vista
