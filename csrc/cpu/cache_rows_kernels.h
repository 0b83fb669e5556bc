// Quantize and dequantize, compiled once per instruction set: vectors over a group, its last values one by one.
#pragma once

#include "row_vectors.h"
#include "vista/cache_rows.h"

namespace vista::cpu {
namespace VISTA_ISA {

constexpr float kMaxHalf = 65504.f;
constexpr float kMaxE4M3 = 448.f;

inline float read_half(const uint8_t* at) {
  _Float16 half;
  std::memcpy(&half, at, 2);
  return static_cast<float>(half);
}

constexpr int64_t payload_bytes(RowScheme scheme, int64_t values) {
  return scheme == RowScheme::kInt4 ? values / 2 : values;
}

// n values, fewer than kLanes, and `rest` beyond them.
inline vf load_part(const float* from, int64_t n, float rest) {
  vf part = splat(rest);
  std::memcpy(&part, from, n * 4);
  return part;
}

// Of as many groups as are quantized at a time: one by one, each of these would be waited for.
struct Groups {
  float most[kQuantizeGroups];  // the largest magnitude; not finite if one of the values is not
  float low[kQuantizeGroups], high[kQuantizeGroups];
  float scale[kQuantizeGroups], bias[kQuantizeGroups];  // as stored; a scale of zero where all codes are zero
  float inverse[kQuantizeGroups];                       // of the scale
  uint8_t stored_scale[2 * kQuantizeGroups], stored_bias[2 * kQuantizeGroups];
};

// `x`: n values of the dtype, which are kept as floats where they are not.
template <bool kEnds, DType kDType>
inline void measure(const char* x, int64_t n, float* kept, Groups& groups, int64_t g) {
  vf low = splat(__builtin_inff()), high = -low, most{};
  const auto take = [&](vf value) {
    // As integers magnitudes compare as they do as numbers, and those that are not finite are the largest.
    const vi magnitude = reinterpret_cast<vi>(value) & 0x7fffffff;
    const vi before = reinterpret_cast<vi>(most);
    most = reinterpret_cast<vf>(magnitude > before ? magnitude : before);
    if (kEnds) low = min_v(value, low), high = max_v(value, high);
  };
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + kLanes <= n; i += kLanes) {
    const vf values = read<kDType>(x + i * value_bytes(kDType));
    if (kDType != DType::kFloat) store(kept + i, values);
    take(values);
  }
  if (i < n) {
    if (kDType != DType::kFloat) load_row(kDType, x, i, kept + i, n - i, n - i);
    const float* rest = kDType == DType::kFloat ? reinterpret_cast<const float*>(x) + i : kept + i;
    take(load_part(rest, n - i, rest[0]));
  }
  const auto larger = [](vf a, vf b) {
    const vi one = reinterpret_cast<vi>(a), other = reinterpret_cast<vi>(b);
    return reinterpret_cast<vf>(one > other ? one : other);
  };
  groups.most[g] = fold(most, larger);
  // Zeros lose their sign: the bytes must not depend on which of the group's zeros came first.
  if (kEnds) groups.low[g] = fold(low, min_v) + 0.f, groups.high[g] = fold(high, max_v) + 0.f;
}

template <RowScheme kScheme>
inline void choose_scales(Groups& of) {
  for (int64_t g = 0; g < kQuantizeGroups; g += kLanes) {
    const vf most = load(of.most + g);
    const float largest = kScheme == RowScheme::kInt4 ? kMaxHalf : __FLT_MAX__;
    vf scale = most / (kScheme == RowScheme::kInt8 ? 127.f : kMaxE4M3);
    if (kScheme == RowScheme::kInt4) scale = (load(of.high + g) - load(of.low + g)) / 15.f;
    // A group that cannot be represented gets a NaN scale and reads back as NaN, visibly: nothing waits for a check.
    const vi usable = (most <= largest) & (scale <= kMaxHalf);
    put_half(of.stored_scale + 2 * g, usable ? scale : splat(__builtin_nanf("")), false);
    scale = usable ? halves(of.stored_scale + 2 * g) : vf{};
    store(of.scale + g, scale);
    store(of.inverse + g, 1.f / scale);
    if (kScheme != RowScheme::kInt4) continue;
    put_half(of.stored_bias + 2 * g, most <= kMaxHalf ? load(of.low + g) : vf{}, false);
    store(of.bias + g, halves(of.stored_bias + 2 * g));
  }
}

// `next`: what to ask the memory for meanwhile, as many values of `kBytes` each.
template <RowScheme kScheme, int64_t kBytes>
inline void write_group(const float* x, int64_t n, const Groups& groups, int64_t g, const char* next, uint8_t* payload,
                        bool past) {
  if (!(groups.scale[g] > 0.f)) return std::memset(payload, 0, payload_bytes(kScheme, n)), void();
  const vf unit = splat(groups.scale[g]), inverse = splat(groups.inverse[g]);
  const vf start = kScheme == RowScheme::kInt4 ? splat(groups.bias[g]) : vf{};
  const auto write = [&](const float* from, uint8_t* to, bool past_caches) {
    vf quotients[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const vf value = load(from + i * kLanes);
      quotients[i] = divide(kScheme == RowScheme::kInt4 ? value - start : value, unit, inverse);
      if (kScheme == RowScheme::kFp8E4M3) quotients[i] = with_sign_of(value, quotients[i]);  // zeros have one there
    }
    write_codes<kScheme>(to, quotients, past_caches);
  };
  int64_t i = 0;
  for (; i + kQuad <= n; i += kQuad) {
#pragma GCC unroll 4
    for (int64_t line = 0; line < kQuad * kBytes; line += kLine) prefetch(next + i * kBytes + line);
    write(x + i, payload + payload_bytes(kScheme, i), past);
  }
  if (i < n) {
    float rest[kQuad] = {};
    uint8_t codes[kQuad];
    std::memcpy(rest, x + i, (n - i) * 4);
    write(rest, codes, false);
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

template <RowScheme kScheme, DType kDType>
void quantize(const RowsParams& p, int64_t begin, int64_t end, float* scratch) {
  const RowLayout& layout = p.layout;
  const int64_t used = layout.biases_offset + (kScheme == RowScheme::kInt4 ? 2 * layout.groups() : 0);
  const int64_t payload = payload_bytes(kScheme, layout.tokens * layout.dim);
  constexpr int64_t kBytes = value_bytes(kDType);
  Groups measured{};  // of the last groups in part
  for (int64_t user = begin; user < end; ++user) {
    uint8_t* row = p.rows + user * layout.row_bytes;
    std::memset(row + payload, 0, layout.scales_offset - payload);
    std::memset(row + used, 0, layout.row_bytes - used);
    for (int64_t first = 0; first < layout.groups(); first += kQuantizeGroups) {
      const int64_t left = layout.groups() - first, groups = left < kQuantizeGroups ? left : kQuantizeGroups;
      const int64_t at = user * layout.tokens * layout.dim + first * layout.group, values = groups * layout.group;
      const int64_t bytes = values * kBytes;
      // The batch after this one comes while codes are computed; the pages of the one after that are looked up first.
      const char* from = static_cast<const char*>(p.x) + at * kBytes;
      const char* next = from + bytes;
      for (int64_t page = 0; page < bytes; page += kPage) prefetch(next + bytes + page);
      for (int64_t g = 0; g < groups; ++g)
        measure<kScheme == RowScheme::kInt4, kDType>(from + g * layout.group * kBytes, layout.group,
                                                     scratch + g * layout.group, measured, g);
      const float* x = kDType == DType::kFloat ? reinterpret_cast<const float*>(from) : scratch;
      choose_scales<kScheme>(measured);
      std::memcpy(row + layout.scales_offset + 2 * first, measured.stored_scale, 2 * groups);
      if (kScheme == RowScheme::kInt4)
        std::memcpy(row + layout.biases_offset + 2 * first, measured.stored_bias, 2 * groups);
      uint8_t* to = row + payload_bytes(kScheme, first * layout.group);
      const bool past = p.stream && layout.group % kQuad == 0 && can_stream(to, payload_bytes(kScheme, values));
      for (int64_t g = 0; g < groups; ++g)
        write_group<kScheme, kBytes>(x + g * layout.group, layout.group, measured, g, next + g * layout.group * kBytes,
                                     to + payload_bytes(kScheme, g * layout.group), past);
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
      for (int64_t line = 0; next != nullptr && line < token_payload; line += kLine)
        prefetch(next + token * token_payload + line);
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

template <RowScheme kScheme>
void quantize(const RowsParams& p, int64_t begin, int64_t end, float* scratch) {
  switch (p.dtype) {
    case DType::kFloat: return quantize<kScheme, DType::kFloat>(p, begin, end, scratch);
    case DType::kBFloat16: return quantize<kScheme, DType::kBFloat16>(p, begin, end, scratch);
    case DType::kHalf: return quantize<kScheme, DType::kHalf>(p, begin, end, scratch);
  }
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
