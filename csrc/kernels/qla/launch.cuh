// From runtime dtype and sizes to a kernel instance, and its launch.
#pragma once

#include "../common/mma.cuh"
#include "plan.cuh"

namespace vista::cuda {

template <int D>
struct Dim {
  static constexpr int value = D;
};

// The backward kernels that read each row once keep D x D and tiles of two tensors in shared memory, 99 KB at most.
// Where rows are wider than this, dQ and W (dK and dV) take a pass each.
template <class Math, int D>
constexpr bool kFusedBackward = D * sizeof(typename Math::T) <= 256;

inline void check_alignment(const QlaParams& p) {
  const void* pointers[] = {p.q,   p.k,      p.v,      p.grad_out, p.state,     p.grad_state,
                            p.out, p.grad_q, p.grad_k, p.grad_v,   p.state_out, p.grad_state_out};
  for (const void* pointer : pointers)
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0)
      throw std::invalid_argument("qla kernels take rows and states at multiples of 16 bytes");
}

// Calls f(Math{}, Dim<D>{}) with the smallest D >= d, e: columns beyond d and e are zeros in shared memory.
template <class F>
int dispatch(const QlaParams& p, F f) {
  check_alignment(p);
  const int64_t widest = p.d > p.e ? p.d : p.e, narrowest = p.d < p.e ? p.d : p.e;
  if (narrowest < 16 || widest > 256 || p.d % 8 != 0 || p.e % 8 != 0)
    throw std::invalid_argument(
        "qla kernels are built for head dimensions that are multiples of 8 from 16 to 256, found " +
        std::to_string(p.d) + " and " + std::to_string(p.e));
  const auto with_dim = [&](auto math) {
    if (widest <= 32) return f(math, Dim<32>{});
    if (widest <= 64) return f(math, Dim<64>{});
    if (widest <= 128) return f(math, Dim<128>{});
    return f(math, Dim<256>{});
  };
  switch (p.dtype) {
    case DType::kBFloat16: return with_dim(MmaMath<BFloat16>{});
    case DType::kHalf: return with_dim(MmaMath<Half>{});
    case DType::kFloat: return p.allow_tf32 ? with_dim(Tf32Math{}) : with_dim(FmaMath{});
  }
  throw std::invalid_argument("qla kernels are built for float32, bfloat16 and float16");
}

constexpr int kMostSharedBytes = 99 * 1024;  // what a block may have on every architecture from sm_80 on

// One block for each item, head and slice. Blocks beyond the plan's items return at once.
template <class Shape, class... Parameters, class... Arguments>
int launch_items(void (*kernel)(Parameters...), const QlaParams& p, int slices, Stream stream, Arguments... arguments) {
  static_assert(Shape::kSharedBytes <= kMostSharedBytes);
  const int64_t blocks = most_items(p) * p.heads * slices;
  if (blocks > INT32_MAX)
    throw std::invalid_argument("qla kernels take at most 2^31 - 1 blocks: (total / " + std::to_string(p.chunk_rows) +
                                " + batch) * heads is too large");
  if (p.heads == 0 || p.batch + p.total == 0) return cudaSuccess;
  // Above 48 KB a kernel has to ask. Asking every time costs less than remembering per device.
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape::kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<static_cast<unsigned>(blocks), Shape::kThreads, Shape::kSharedBytes, static_cast<cudaStream_t>(stream)>>>(
      p, arguments...);
  return cudaGetLastError();
}

}  // namespace vista::cuda
