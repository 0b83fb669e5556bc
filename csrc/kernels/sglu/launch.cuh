// From runtime dtype and sizes to a kernel instance, and its launch.
#pragma once

#include "../common/dispatch.cuh"
#include "../common/mma.cuh"
#include "vista/cuda/sglu.h"

namespace vista::cuda {

inline void check_sglu(const SgluParams& p) {
  const void* pointers[] = {p.x,   p.up,     p.gate,         p.down,           p.down_t,     p.grad_out,
                            p.out, p.grad_x, p.grad_up_rows, p.grad_gate_rows, p.hidden_rows};
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
      throw std::invalid_argument("sglu kernels take rows and weights at multiples of 16 bytes");
  if (p.dim < 16 || p.dim > 256 || p.dim % 8 != 0)
    throw std::invalid_argument("sglu kernels are built for a dim that is a multiple of 8 from 16 to 256, found " +
                                std::to_string(p.dim));
  if (p.hidden < 8 || p.hidden % 8 != 0 || p.hidden > 1 << 24)
    throw std::invalid_argument(
        "sglu kernels are built for a hidden width that is a multiple of 8 from 8 to 2^24, found " +
        std::to_string(p.hidden));
}

// Calls f(Math{}, Dim<D>{}) with the smallest D >= dim.
template <class F>
int dispatch(const SgluParams& p, F f) {
  check_sglu(p);
  const auto with_dim = [&](auto math) {
    if (p.dim <= 64) return f(math, Dim<64>{});
    return p.dim <= 128 ? f(math, Dim<128>{}) : f(math, Dim<256>{});
  };
  switch (p.dtype) {
    case DType::kBFloat16: return with_dim(MmaMath<BFloat16>{});
    case DType::kHalf: return with_dim(MmaMath<Half>{});
    default: throw std::invalid_argument("sglu kernels are built for bfloat16 and float16");
  }
}

// One block for each kRows rows.
template <class Shape>
int launch_rows(void (*kernel)(SgluParams), const SgluParams& p, Stream stream) {
  static_assert(Shape::kSharedBytes <= kMostSharedBytes);
  const int64_t blocks = (p.total + Shape::kRows - 1) / Shape::kRows;
  if (blocks > INT32_MAX)
    throw std::invalid_argument("sglu kernels take at most 2^31 - 1 blocks of " + std::to_string(Shape::kRows) +
                                " rows");
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error = allow_shared(kernel, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(p);
  return cudaGetLastError();
}

}  // namespace vista::cuda
