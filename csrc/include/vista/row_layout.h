// The quantized row: how one user's summary lies in memory, on disk, in a message and on the device.
// docs/row_layout.md is this header in prose; vista_ext._C.row_layout is its Python view. Nothing else computes it.
//
//   row = payload | scales | biases (int4 only) | zero padding to a multiple of 128 bytes
//
// payload: tokens x dim values, token by token. int8 and fp8: one byte each. int4: two a byte, even index in the low
// nibble. scales, biases: fp16, one per group of `group` consecutive values of a token, tokens x (dim / group) of each.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace vista {

enum class RowScheme : int32_t { kInt8 = 0, kInt4 = 1, kFp8E4M3 = 2 };

constexpr int64_t kRowAlignment = 128;
constexpr int64_t kMinGroup = 32;
constexpr int64_t kMaxExtent = INT32_MAX;

struct RowLayout {
  RowScheme scheme;
  int64_t tokens;
  int64_t dim;
  int64_t group;          // values that share a scale; divides dim
  int64_t scales_offset;  // bytes from the start of the row
  int64_t biases_offset;  // == scales end for schemes without a bias
  int64_t row_bytes;      // stride between users, a multiple of kRowAlignment
  int64_t groups() const { return tokens * (dim / group); }
};

inline const char* row_scheme_name(RowScheme scheme) {
  switch (scheme) {
    case RowScheme::kInt8: return "int8";
    case RowScheme::kInt4: return "int4";
    case RowScheme::kFp8E4M3: return "fp8_e4m3";
  }
  return "?";
}

inline RowScheme parse_row_scheme(const std::string& name) {
  if (name == "int8") return RowScheme::kInt8;
  if (name == "int4") return RowScheme::kInt4;
  if (name == "fp8_e4m3") return RowScheme::kFp8E4M3;
  throw std::invalid_argument("scheme must be 'int8', 'int4' or 'fp8_e4m3', found '" + name + "'");
}

// group <= 0 asks for the default: the whole token for int8 and fp8, 64 for int4 (the token where 64 does not divide
// it).
inline RowLayout make_row_layout(RowScheme scheme, int64_t tokens, int64_t dim, int64_t group = 0) {
  // The record's header gives each 32 bits; below that no size of a row overflows.
  if (tokens < 1 || tokens > kMaxExtent)
    throw std::invalid_argument("tokens must be from 1 to 2^31 - 1, found " + std::to_string(tokens));
  if (dim < 1 || dim > kMaxExtent)
    throw std::invalid_argument("dim must be from 1 to 2^31 - 1, found " + std::to_string(dim));
  if (scheme == RowScheme::kInt4 && dim % 2 != 0)
    throw std::invalid_argument("dim must be even for int4, found " + std::to_string(dim));
  if (group <= 0) group = (scheme == RowScheme::kInt4 && dim % 64 == 0) ? 64 : dim;
  if (dim % group != 0 || (group < kMinGroup && group != dim) || (scheme == RowScheme::kInt4 && group % 2 != 0))
    throw std::invalid_argument("group must divide dim (" + std::to_string(dim) + ") and be at least 32, found " +
                                std::to_string(group));
  const int64_t payload = scheme == RowScheme::kInt4 ? tokens * dim / 2 : tokens * dim;
  RowLayout layout{scheme, tokens, dim, group, 0, 0, 0};
  layout.scales_offset = (payload + 1) / 2 * 2;  // fp16 scales stay 2-byte aligned
  layout.biases_offset = layout.scales_offset + 2 * layout.groups();
  const int64_t end = layout.biases_offset + (scheme == RowScheme::kInt4 ? 2 * layout.groups() : 0);
  layout.row_bytes = (end + kRowAlignment - 1) / kRowAlignment * kRowAlignment;
  return layout;
}

}  // namespace vista
