// Quantize and dequantize, compiled once per instruction set. Plain loops over a group: the compiler vectorises them.
#pragma once

#include "vector_math.h"
#include "vista/cache_rows.h"

namespace vista::cpu {
namespace VISTA_ISA {

constexpr float kMaxHalf = 65504.f;
constexpr float kMaxE4M3 = 448.f;

// To the nearest integer, ties to even, for |x| < 2^22.
inline float round_even(float x) { return (x + 12582912.f) - 12582912.f; }

inline float clamp(float x, float low, float high) { return x < low ? low : (x > high ? high : x); }

inline uint8_t to_e4m3(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint8_t sign = static_cast<uint8_t>((bits >> 24) & 0x80);
  const float magnitude = clamp(x < 0.f ? -x : x, 0.f, kMaxE4M3);
  if (magnitude < 0.015625f)
    return sign | static_cast<uint8_t>(round_even(magnitude * 512.f));  // subnormal: 2^-9 steps
  std::memcpy(&bits, &magnitude, 4);
  bits += 0x7ffff + ((bits >> 20) & 1);  // to 3 mantissa bits, ties to even
  return sign | static_cast<uint8_t>((bits >> 20) - ((127 - 7) << 3));
}

inline float from_e4m3(uint8_t code) {
  const int exponent = (code >> 3) & 15, mantissa = code & 7;
  float magnitude = exponent == 0 ? mantissa * 0.001953125f : 0.f;
  if (exponent != 0) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 127 - 7) << 23 | static_cast<uint32_t>(mantissa) << 20;
    std::memcpy(&magnitude, &bits, 4);
  }
  return (code & 0x80) ? -magnitude : magnitude;
}

inline void write_half(uint8_t* at, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  std::memcpy(at, &half, 2);
}

inline float read_half(const uint8_t* at) {
  _Float16 half;
  std::memcpy(&half, at, 2);
  return static_cast<float>(half);
}

// A group that cannot be represented gets a NaN scale: it reads back as NaN, visibly, and nothing waits for a check.
inline bool representable(const float* x, int64_t n, float* low, float* high) {
  *low = *high = x[0];
  bool finite = true;
  for (int64_t i = 0; i < n; ++i) {
    finite &= x[i] - x[i] == 0.f;  // false for NaN and infinities
    *low = x[i] < *low ? x[i] : *low;
    *high = x[i] > *high ? x[i] : *high;
  }
  *low += 0.f;  // a zero has no sign: the bytes must not depend on which of the group's zeros came first
  *high += 0.f;
  return finite;
}

inline void quantize_group(RowScheme scheme, const float* x, int64_t n, uint8_t* payload, uint8_t* scale_at,
                           uint8_t* bias_at) {
  float low, high;
  bool usable = representable(x, n, &low, &high);
  const float most = -low > high ? -low : high;
  float scale = 0.f, bias = 0.f;
  if (scheme == RowScheme::kInt8) scale = most / 127.f;
  if (scheme == RowScheme::kFp8E4M3) scale = most / kMaxE4M3;
  if (scheme == RowScheme::kInt4) {
    scale = (high - low) / 15.f;
    usable = usable && most <= kMaxHalf;
    bias = low;
    write_half(bias_at, usable ? bias : 0.f);
    bias = read_half(bias_at);
  }
  usable = usable && scale <= kMaxHalf;
  write_half(scale_at, usable ? scale : __builtin_nanf(""));
  scale = usable ? read_half(scale_at) : 0.f;  // quantize with the scale as stored
  const float unit = scale > 0.f ? scale : 1.f;
  const float keep = scale > 0.f ? 1.f : 0.f;
  switch (scheme) {
    case RowScheme::kInt8:
      for (int64_t i = 0; i < n; ++i) {
        const float value = keep > 0.f ? clamp(x[i] / unit, -127.f, 127.f) : 0.f;
        payload[i] = static_cast<uint8_t>(static_cast<int8_t>(static_cast<int32_t>(round_even(value))));
      }
      break;
    case RowScheme::kInt4:
      for (int64_t i = 0; i < n; i += 2) {
        const float even = keep > 0.f ? clamp((x[i] - bias) / unit, 0.f, 15.f) : 0.f;
        const float odd = keep > 0.f ? clamp((x[i + 1] - bias) / unit, 0.f, 15.f) : 0.f;
        payload[i / 2] =
            static_cast<uint8_t>(static_cast<int32_t>(round_even(even)) | static_cast<int32_t>(round_even(odd)) << 4);
      }
      break;
    case RowScheme::kFp8E4M3:
      for (int64_t i = 0; i < n; ++i) payload[i] = keep > 0.f ? to_e4m3(x[i] / unit) : 0;
      break;
  }
}

inline void dequantize_group(RowScheme scheme, const uint8_t* payload, float scale, float bias, int64_t n, float* to) {
  switch (scheme) {
    case RowScheme::kInt8:
      for (int64_t i = 0; i < n; ++i) to[i] = scale * static_cast<float>(static_cast<int8_t>(payload[i]));
      break;
    case RowScheme::kInt4:
      for (int64_t i = 0; i < n / 2; ++i) {
        to[2 * i] = scale * static_cast<float>(payload[i] & 15) + bias;
        to[2 * i + 1] = scale * static_cast<float>(payload[i] >> 4) + bias;
      }
      break;
    case RowScheme::kFp8E4M3:
      for (int64_t i = 0; i < n; ++i) to[i] = scale * from_e4m3(payload[i]);
      break;
  }
}

inline int64_t payload_bytes(const RowLayout& layout, int64_t values) {
  return layout.scheme == RowScheme::kInt4 ? values / 2 : values;
}

void quantize_users(const RowsParams& p, int64_t begin, int64_t end, float* scratch) {
  const RowLayout& layout = p.layout;
  const int64_t groups = layout.dim / layout.group;
  for (int64_t user = begin; user < end; ++user) {
    uint8_t* row = p.rows + user * layout.row_bytes;
    std::memset(row, 0, layout.row_bytes);
    for (int64_t token = 0; token < layout.tokens; ++token) {
      load_row(p.dtype, p.x, (user * layout.tokens + token) * layout.dim, scratch, layout.dim, layout.dim);
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t group = token * groups + g;
        quantize_group(layout.scheme, scratch + g * layout.group, layout.group,
                       row + payload_bytes(layout, group * layout.group), row + layout.scales_offset + 2 * group,
                       row + layout.biases_offset + 2 * group);
      }
    }
  }
}

void dequantize_users(const RowsParams& p, int64_t begin, int64_t end, float* scratch) {
  const RowLayout& layout = p.layout;
  const int64_t groups = layout.dim / layout.group;
  const bool biased = layout.scheme == RowScheme::kInt4;
  for (int64_t user = begin; user < end; ++user) {
    const uint8_t* row = p.slots[user] < 0 ? nullptr : p.cache + p.slots[user] * layout.row_bytes;
    if (row == nullptr) std::memset(scratch, 0, layout.dim * sizeof(float));
    for (int64_t token = 0; token < layout.tokens; ++token) {
      for (int64_t g = 0; row != nullptr && g < groups; ++g) {
        const int64_t group = token * groups + g;
        dequantize_group(layout.scheme, row + payload_bytes(layout, group * layout.group),
                         read_half(row + layout.scales_offset + 2 * group),
                         biased ? read_half(row + layout.biases_offset + 2 * group) : 0.f, layout.group,
                         scratch + g * layout.group);
      }
      store_row(p.dtype, p.out, (user * layout.tokens + token) * layout.dim, scratch, layout.dim);
    }
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
