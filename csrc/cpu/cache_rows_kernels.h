// Quantize and dequantize, compiled once per instruction set: vectors over a group, its last values one by one.
#pragma once

#include "row_vectors.h"
#include "vista/cache_rows.h"

namespace vista::cpu {
namespace VISTA_ISA {

constexpr float kMaxHalf = 65504.f;
constexpr float kMaxE4M3 = 448.f;

inline void write_half(uint8_t* at, float value) {
  const _Float16 half = static_cast<_Float16>(value);
  std::memcpy(at, &half, 2);
}

inline float read_half(const uint8_t* at) {
  _Float16 half;
  std::memcpy(&half, at, 2);
  return static_cast<float>(half);
}

constexpr int64_t value_bytes(DType dtype) { return dtype == DType::kFloat ? 4 : 2; }

constexpr int64_t payload_bytes(RowScheme scheme, int64_t values) {
  return scheme == RowScheme::kInt4 ? values / 2 : values;
}

// n values, fewer than kLanes, and `rest` beyond them.
inline vf load_part(const float* from, int64_t n, float rest) {
  vf part = splat(rest);
  std::memcpy(&part, from, n * 4);
  return part;
}

struct Extent {
  float low, high;  // zeros have no sign: the bytes must not depend on which of the group's zeros came first
  float most;       // the largest magnitude; not finite if one of the values is not
};

template <bool kEnds>
inline Extent extent(const float* x, int64_t n) {
  vf low = splat(x[0]), high = low, most{};
  const auto take = [&](vf value) {
    // As integers magnitudes compare as they do as numbers, and those that are not finite are the largest.
    const vi magnitude = reinterpret_cast<vi>(value) & 0x7fffffff;
    const vi before = reinterpret_cast<vi>(most);
    most = reinterpret_cast<vf>(magnitude > before ? magnitude : before);
    if (kEnds) low = min_v(value, low), high = max_v(value, high);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) take(load(x + i));
  if (i < n) take(load_part(x + i, n - i, x[0]));
  const auto larger = [](vf a, vf b) {
    const vi one = reinterpret_cast<vi>(a), other = reinterpret_cast<vi>(b);
    return reinterpret_cast<vf>(one > other ? one : other);
  };
  Extent all{0.f, 0.f, fold(most, larger)};
  if (kEnds) all.low = fold(low, min_v) + 0.f, all.high = fold(high, max_v) + 0.f;
  return all;
}

struct Scale {
  float scale, bias;  // as stored; a scale of zero where all codes are zero
};

template <RowScheme kScheme>
inline Scale write_scale(const float* x, int64_t n, uint8_t* scale_at, uint8_t* bias_at) {
  const Extent of = extent<kScheme == RowScheme::kInt4>(x, n);
  bool usable = of.most < __builtin_inff();
  float scale = 0.f, bias = 0.f;
  if (kScheme == RowScheme::kInt8) scale = of.most / 127.f;
  if (kScheme == RowScheme::kFp8E4M3) scale = of.most / kMaxE4M3;
  if (kScheme == RowScheme::kInt4) {
    scale = (of.high - of.low) / 15.f;
    usable = usable && of.most <= kMaxHalf;
    write_half(bias_at, usable ? of.low : 0.f);
    bias = read_half(bias_at);
  }
  // A group that cannot be represented gets a NaN scale: it reads back as NaN, visibly, and nothing waits for a check.
  usable = usable && scale <= kMaxHalf;
  write_half(scale_at, usable ? scale : __builtin_nanf(""));
  return {usable ? read_half(scale_at) : 0.f, bias};
}

template <RowScheme kScheme>
inline void write_group(const float* x, int64_t n, Scale by, uint8_t* payload) {
  if (!(by.scale > 0.f)) return std::memset(payload, 0, payload_bytes(kScheme, n)), void();
  const vf unit = splat(by.scale), inverse = splat(1.f / by.scale), start = splat(by.bias);
  const auto quotients = [&](vf value) {
    return divide(kScheme == RowScheme::kInt4 ? value - start : value, unit, inverse);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    write_codes<kScheme>(payload + payload_bytes(kScheme, i), quotients(load(x + i)));
  if (i < n) {
    uint8_t codes[kLanes];
    write_codes<kScheme>(codes, quotients(load_part(x + i, n - i, 0.f)));
    std::memcpy(payload + payload_bytes(kScheme, i), codes, payload_bytes(kScheme, n - i));
  }
}

template <RowScheme kScheme, DType kDType>
inline void dequantize_group(const uint8_t* payload, float scale, float bias, int64_t n, char* to, bool past) {
  const vf unit = splat(scale), start = splat(bias);
  const auto value = [&](const uint8_t* codes) {
    return kScheme == RowScheme::kInt4 ? fma_v(numbers<kScheme>(codes), unit, start) : numbers<kScheme>(codes) * unit;
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    put<kDType>(to + i * value_bytes(kDType), value(payload + payload_bytes(kScheme, i)), past);
  if (i < n) {
    uint8_t codes[kLanes] = {};
    char values[kLanes * 4];
    std::memcpy(codes, payload + payload_bytes(kScheme, i), payload_bytes(kScheme, n - i));
    put<kDType>(values, value(codes), false);
    std::memcpy(to + i * value_bytes(kDType), values, (n - i) * value_bytes(kDType));
  }
}

template <RowScheme kScheme>
void quantize(const RowsParams& p, int64_t begin, int64_t end, float* scratch) {
  const RowLayout& layout = p.layout;
  const int64_t used = layout.biases_offset + (kScheme == RowScheme::kInt4 ? 2 * layout.groups() : 0);
  const int64_t payload = payload_bytes(kScheme, layout.tokens * layout.dim);
  uint8_t* codes = reinterpret_cast<uint8_t*>(scratch + kQuantizeGroups * layout.group);
  for (int64_t user = begin; user < end; ++user) {
    uint8_t* row = p.rows + user * layout.row_bytes;
    std::memset(row + payload, 0, layout.scales_offset - payload);
    std::memset(row + used, 0, layout.row_bytes - used);
    // Several groups at a time: the scales of all, then the codes of all. One by one each scale is waited for.
    for (int64_t first = 0; first < layout.groups(); first += kQuantizeGroups) {
      const int64_t left = layout.groups() - first, groups = left < kQuantizeGroups ? left : kQuantizeGroups;
      const int64_t at = user * layout.tokens * layout.dim + first * layout.group, values = groups * layout.group;
      const char* next = static_cast<const char*>(p.x) + (at + 2 * values) * value_bytes(p.dtype);
      const float* x = static_cast<const float*>(p.x) + at;
      if (p.dtype != DType::kFloat) {
        load_row(p.dtype, p.x, at, scratch, values, values);
        x = scratch;
      }
      Scale scales[kQuantizeGroups];
      for (int64_t g = 0; g < groups; ++g)
        scales[g] =
            write_scale<kScheme>(x + g * layout.group, layout.group, row + layout.scales_offset + 2 * (first + g),
                                 row + layout.biases_offset + 2 * (first + g));
      uint8_t* to = row + payload_bytes(kScheme, first * layout.group);
      const int64_t bytes = payload_bytes(kScheme, values);
      const bool past = p.stream && can_stream(to, bytes);
      for (int64_t g = 0; g < groups; ++g) {
        prefetch(next + g * layout.group * value_bytes(p.dtype), layout.group * value_bytes(p.dtype));
        write_group<kScheme>(x + g * layout.group, layout.group, scales[g],
                             (past ? codes : to) + payload_bytes(kScheme, g * layout.group));
      }
      for (int64_t i = 0; past && i < bytes; i += 4 * kLanes)
        stream(reinterpret_cast<float*>(to + i), load(reinterpret_cast<const float*>(codes + i)));
    }
  }
  drain();
}

template <RowScheme kScheme, DType kDType>
void dequantize(const RowsParams& p, int64_t begin, int64_t end) {
  const RowLayout& layout = p.layout;
  const int64_t groups = layout.dim / layout.group, group_bytes = layout.group * value_bytes(kDType);
  const int64_t token_payload = payload_bytes(kScheme, layout.dim);
  char* to = static_cast<char*>(p.out) + begin * layout.tokens * layout.dim * value_bytes(kDType);
  // A store past the caches must be aligned.
  const bool past = p.stream && can_stream(to, group_bytes);
  for (int64_t user = begin; user < end; ++user) {
    if (p.slots[user] < 0) {
      std::memset(to, 0, layout.tokens * layout.dim * value_bytes(kDType));
      to += layout.tokens * layout.dim * value_bytes(kDType);
      continue;
    }
    const uint8_t* row = p.cache + p.slots[user] * layout.row_bytes;
    const bool more = user + 1 < end && p.slots[user + 1] >= 0;
    const uint8_t* next = more ? p.cache + p.slots[user + 1] * layout.row_bytes : nullptr;
    for (int64_t token = 0; token < layout.tokens; ++token) {
      if (next != nullptr) prefetch(next + token * token_payload, token_payload);
      for (int64_t g = 0; g < groups; ++g, to += group_bytes) {
        const int64_t group = token * groups + g;
        const float scale = read_half(row + layout.scales_offset + 2 * group);
        const float bias = kScheme == RowScheme::kInt4 ? read_half(row + layout.biases_offset + 2 * group) : 0.f;
        dequantize_group<kScheme, kDType>(row + payload_bytes(kScheme, group * layout.group), scale, bias, layout.group,
                                          to, past);
      }
    }
  }
  drain();
}

void quantize_users(const RowsParams& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.layout.scheme) {
    case RowScheme::kInt8: return quantize<RowScheme::kInt8>(p, begin, end, scratch);
    case RowScheme::kInt4: return quantize<RowScheme::kInt4>(p, begin, end, scratch);
    case RowScheme::kFp8E4M3: return quantize<RowScheme::kFp8E4M3>(p, begin, end, scratch);
  }
}

template <RowScheme kScheme>
void dequantize(const RowsParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kFloat: return dequantize<kScheme, DType::kFloat>(p, begin, end);
    case DType::kBFloat16: return dequantize<kScheme, DType::kBFloat16>(p, begin, end);
    case DType::kHalf: return dequantize<kScheme, DType::kHalf>(p, begin, end);
  }
}

void dequantize_users(const RowsParams& p, int64_t begin, int64_t end) {
  switch (p.layout.scheme) {
    case RowScheme::kInt8: return dequantize<RowScheme::kInt8>(p, begin, end);
    case RowScheme::kInt4: return dequantize<RowScheme::kInt4>(p, begin, end);
    case RowScheme::kFp8E4M3: return dequantize<RowScheme::kFp8E4M3>(p, begin, end);
  }
}

}  // namespace VISTA_ISA
}  // namespace vista::cpu
