// Memory as the row kernels see it: values 16 bytes at a time, the codes of as many values beside them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "codes.cuh"
#include "vista/cuda/launch.h"
#include "vista/types.h"

namespace vista::cuda::rows {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kSlots = 4;  // vectors that a thread has in flight

template <typename T>
constexpr int kVectorValues = 16 / sizeof(T);

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }

template <typename T>
__device__ inline T narrow(float x) {
  if constexpr (std::is_same_v<T, float>) return x;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __float2bfloat16_rn(x);
  if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
}

template <typename T>
__device__ inline void load_vector(const T* from, float (&x)[kVectorValues<T>]) {
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
  for (int i = 0; i < kVectorValues<T>; ++i) {
    if constexpr (std::is_same_v<T, float>) x[i] = __uint_as_float(words[i]);
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      x[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000);
    if constexpr (std::is_same_v<T, __half>)
      x[i] = __half2float(__ushort_as_half(static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)))));
  }
}

// kValues: a vector or one. Where `lost`, x are NaNs: stored is the one that the CPU kernels write.
template <typename T, int kValues>
__device__ inline void store_values(T* to, const float (&x)[kValues], bool lost) {
  constexpr uint32_t kNan = sizeof(T) == 4 ? 0x7fc00000 : std::is_same_v<T, __half> ? 0x7e007e00 : 0x7fc07fc0;
  if constexpr (kValues == 1 && sizeof(T) == 4) {
    *to = lost ? __uint_as_float(kNan) : x[0];
  } else if constexpr (kValues == 1) {
    const T value = narrow<T>(x[0]);
    *reinterpret_cast<uint16_t*>(to) = lost ? kNan & 0xffff : *reinterpret_cast<const uint16_t*>(&value);
  } else {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if constexpr (sizeof(T) == 4) {
        words[i] = __float_as_uint(x[i]);
      } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      } else {
        const __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
        words[i] = *reinterpret_cast<const uint32_t*>(&pair);
      }
      if (lost) words[i] = kNan;
    }
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// kBytes of codes, a power of two up to 8, at an address aligned to them.
template <int kBytes>
__device__ inline void load_codes(const uint8_t* from, uint32_t (&words)[2]) {
  words[1] = 0;
  if constexpr (kBytes == 8) {
    const uint2 both = *reinterpret_cast<const uint2*>(from);
    words[0] = both.x;
    words[1] = both.y;
  }
  if constexpr (kBytes == 4) words[0] = *reinterpret_cast<const uint32_t*>(from);
  if constexpr (kBytes == 2) words[0] = *reinterpret_cast<const uint16_t*>(from);
  if constexpr (kBytes == 1) words[0] = *from;
}

template <int kBytes>
__device__ inline void store_codes(uint8_t* to, const uint32_t (&words)[2]) {
  if constexpr (kBytes == 8) *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
  if constexpr (kBytes == 4) *reinterpret_cast<uint32_t*>(to) = words[0];
  if constexpr (kBytes == 2) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0]);
}

// A float16 of a row, which may lie at any address unless it is aligned.
template <bool kAligned>
__device__ inline float load_half(const uint8_t* from) {
  const uint16_t bits = kAligned ? *reinterpret_cast<const uint16_t*>(from) : from[0] | from[1] << 8;
  return __half2float(__ushort_as_half(bits));
}
__device__ inline void store_half_anywhere(uint8_t* to, uint16_t bits) {
  to[0] = static_cast<uint8_t>(bits);
  to[1] = static_cast<uint8_t>(bits >> 8);
}

__device__ inline int64_t load_index(const Indices& indices, int64_t i) {
  return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i] : static_cast<const int32_t*>(indices.data)[i];
}

__device__ inline void count_bad(int64_t* num_bad) { atomicAdd(reinterpret_cast<unsigned long long*>(num_bad), 1ull); }

// blockIdx.x: tile of a user or a row; blockIdx.y: the user, the rest of them by the grid's stride.
inline dim3 grid_for(int64_t tiles, int64_t users) {
  if (tiles > INT32_MAX) throw std::invalid_argument("built for rows of up to 2^31 - 1 tiles, found a longer one");
  return dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(std::min<int64_t>(users, 65535)));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

template <RowScheme kScheme>
using SchemeTag = std::integral_constant<RowScheme, kScheme>;

// run(a value of the C++ type, a SchemeTag); both are arguments for the sake of their types.
template <typename Run>
int dispatch(DType dtype, RowScheme scheme, const Run& run) {
  const auto with_dtype = [&](auto tag) {
    switch (dtype) {
      case DType::kFloat: return run(float{}, tag);
      case DType::kBFloat16: return run(__nv_bfloat16{}, tag);
      case DType::kHalf: return run(__half{}, tag);
    }
    throw std::invalid_argument("built for float32, bfloat16 and float16, found another dtype");
  };
  switch (scheme) {
    case RowScheme::kInt8: return with_dtype(SchemeTag<RowScheme::kInt8>{});
    case RowScheme::kInt4: return with_dtype(SchemeTag<RowScheme::kInt4>{});
    case RowScheme::kFp8E4M3: return with_dtype(SchemeTag<RowScheme::kFp8E4M3>{});
  }
  throw std::invalid_argument("built for int8, int4 and fp8_e4m3, found another scheme");
}

}  // namespace vista::cuda::rows
