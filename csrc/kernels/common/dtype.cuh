// Element types of rows as raw bits, and their 16-byte vectors and pairs as floats. The kernels compute in fp32 and
// meet a narrow type only where they read and write memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vista::cuda {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

template <class T>
constexpr int kPerVector = 16 / sizeof(T);

__device__ inline uint32_t pack2(float low, float high, BFloat16) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline uint32_t pack2(float low, float high, Half) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

__device__ inline float2 unpack2(uint32_t packed, BFloat16) {
  return {__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000u)};
}

__device__ inline float2 unpack2(uint32_t packed, Half) {
  float2 x;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(packed));
  return x;
}

// Two neighbours of a row, as they come out of and go into a matrix fragment.
template <class T>
struct Pair {
  using Bits = uint32_t;
  static __device__ float2 unpack(Bits bits) { return unpack2(bits, T{}); }
  static __device__ Bits pack(float2 x) { return pack2(x.x, x.y, T{}); }
};

template <>
struct Pair<float> {
  using Bits = float2;
  static __device__ float2 unpack(Bits bits) { return bits; }
  static __device__ Bits pack(float2 x) { return x; }
};

template <class T>
__device__ inline float2 load_pair(const T* from) {
  return Pair<T>::unpack(*reinterpret_cast<const typename Pair<T>::Bits*>(from));
}

template <class T>
__device__ inline void store_pair(T* to, typename Pair<T>::Bits bits) {
  *reinterpret_cast<typename Pair<T>::Bits*>(to) = bits;
}

template <class T>
__device__ inline void unpack_vector(uint4 bits, float (&x)[kPerVector<T>]) {
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      x[i] = __uint_as_float(words[i]);
    } else {
      const float2 two = unpack2(words[i], T{});
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

template <class T>
__device__ inline uint4 pack_vector(const float (&x)[kPerVector<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4)
      words[i] = __float_as_uint(x[i]);
    else
      words[i] = pack2(x[2 * i], x[2 * i + 1], T{});
  }
  return {words[0], words[1], words[2], words[3]};
}

template <class T>
__device__ inline uint4 load_vector(const T* from) {
  return *reinterpret_cast<const uint4*>(from);
}

template <class T>
__device__ inline void store_vector(T* to, uint4 bits) {
  *reinterpret_cast<uint4*>(to) = bits;
}

template <class T>
__device__ inline void store_four(T* to, const float (&x)[4]) {
  if constexpr (sizeof(T) == 4)
    store_vector(to, pack_vector<T>(x));
  else
    *reinterpret_cast<uint2*>(to) = {pack2(x[0], x[1], T{}), pack2(x[2], x[3], T{})};
}

// Results in global memory. An intrinsic, because nvcc now and then splits the plain assignment of a vector.
template <class T>
__device__ inline void write_vector(T* to, uint4 bits) {
  __stcg(reinterpret_cast<uint4*>(to), bits);
}

}  // namespace vista::cuda
